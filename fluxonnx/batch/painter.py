"""A function from a batch of rows to a batch of pictures, which any engine can send to any machine."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxonnx.batch.columns import rows_of, with_columns
from fluxonnx.batch.names import ROW_KEYS, file_name, seed_of
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.runtime.prompt_file import checked, cleaned

if TYPE_CHECKING:
    from fluxonnx.auto import Choice
    from fluxonnx.runtime.input_files import Load
    from fluxonnx.runtime.pipeline import Flux
    from fluxonnx.runtime.request import Request

# The columns that a painter adds.
RESULTS = ("picture", "seed", "sha256", "seconds", "worker", "error", "warning", "parameters")
# Prompts that are encoded ahead together, so that the text encoder is loaded once for all of them.
PROMPTS_AHEAD = 8
# A model whose files take less than this part of the free memory stays loaded from one picture to the next: to load
# the graphs of the demo model again takes five times as long as its picture.
SMALL_PART = 1 / 8

_lock = threading.RLock()
_opened: tuple[Painter, Flux] | None = None


@dataclass(frozen=True)
class Painter:
    """Settings of a model, and a call that makes pictures: what Ray's, Dask's and Spark's functions over batches take.

    An instance holds only strings and numbers, so it can be pickled. The model is opened when the first batch comes,
    once in each process, and on each machine for itself: the paths have to exist there.

        from fluxonnx.batch import Painter

        paint = Painter("/models/klein", "int8", threads=8)
        paint({"prompt": ["a cat", "a dog"], "seed": [1, 2]})["picture"]  # two PNG files, as bytes

    Attributes:
        model: The model directory, or a repository of the hub; None for the default of `fluxonnx.load` on the machine.
        precision: As for `fluxonnx.load`; likewise the attributes that follow.
        text_encoder_precision: Likewise.
        provider: Likewise.
        provider_options: Pairs of a name and a value.
        flavour: Likewise.
        threads: Threads per operator; None for one per core that the process may use.
        low_memory: Likewise.
        keep_loaded: Whether graphs stay loaded between pictures; None to let small models.
        cache_dir: Likewise.
        transformer: Likewise.
        text_encoder: Likewise.
        vae: Likewise.
        lora: LoRA files, as FILE or FILE:SCALE.
        format: png, jpg, jpeg, webp or ppm.
        folder: A folder that all machines share, into which pictures are written; then a column `file` has their names
            in the place of `picture`. None to return the pictures.
    """

    model: str | Path | None = None
    precision: str | None = None
    text_encoder_precision: str | None = None
    provider: str | None = None
    provider_options: tuple[tuple[str, str], ...] = ()
    flavour: str | None = None
    threads: int | None = None
    low_memory: bool = False
    keep_loaded: bool | None = None
    cache_dir: str | Path | None = None
    transformer: str | Path | None = None
    text_encoder: str | Path | None = None
    vae: str | Path | None = None
    lora: tuple[str, ...] = ()
    format: str = "png"
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        """Give the settings their plain types, and check those that can be checked anywhere."""
        from fluxonnx.runtime.saving import FORMATS

        for name in ("model", "cache_dir", "transformer", "text_encoder", "vae", "folder"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, os.fspath(value))
        pairs = self.provider_options
        object.__setattr__(self, "provider_options", tuple(pairs.items() if isinstance(pairs, Mapping) else pairs))
        object.__setattr__(self, "lora", (self.lora,) if isinstance(self.lora, str) else tuple(self.lora))
        if f".{self.format}" not in FORMATS:
            known = ", ".join(name[1:] for name in FORMATS)
            raise UsageError(f"format {self.format!r} is unknown: choose one of {known}")

    def __call__(self, batch: Any) -> Any:
        """Make a picture for each row of a batch.

        Args:
            batch: Columns by their names, each a list or an array: `prompt`, and any other key of a line of a prompt
                file (docs/batch.md); columns of other names are not read. Also a DataFrame of pandas, and a table of
                pyarrow. Cells that hold None or NaN say nothing. A row without a seed gets one from its `id` or its
                `row`, else from what it holds, so that it is the same when an engine tries again.

        Returns:
            The same kind with the same columns, and further ones: `picture` (bytes of a file, None for an error) or
            `file`, `seed`, `sha256` of the file, `seconds`, `worker` (machine:process), `error` and `warning` (a line,
            or None), and `parameters` (JSON, what the picture says about itself).
        """
        rows = rows_of(batch)
        results = list(self.paint(rows))
        names = ["file" if name == "picture" and self.folder else name for name in RESULTS]
        columns = {name: [result[name] for result in results] for name in names}
        return with_columns(batch, columns)

    def paint(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Make a picture for each row, and yield its results in the order of the rows; see `__call__`.

        What is wrong with a row, or with the model, is the `error` of its results; nothing is raised for it.
        """
        source = iter(rows)
        while group := list(islice(source, PROMPTS_AHEAD)):
            yield from self._group(group)

    def open(
        self,
        on_export: Callable[[Path], None] | None = None,
        on_choice: Callable[[Choice], None] | None = None,
    ) -> Flux:
        """Return the model, which the process keeps open until a painter with other settings is called.

        Args:
            on_export: As for `fluxonnx.load`.
            on_choice: Likewise.

        Raises:
            FluxonnxError: As `fluxonnx.load` and `Flux.load_lora`.
        """
        global _opened
        with _lock:
            if _opened and _opened[0] == self:
                return _opened[1]
            close()
            flux = self._load(on_export, on_choice)
            _opened = self, flux
            return flux

    def _load(self, on_export: Callable[[Path], None] | None, on_choice: Callable[[Choice], None] | None) -> Flux:
        from fluxonnx import api
        from fluxonnx.runtime.lora_files import find_file, parse

        flux = api.load(
            self.model,
            precision=self.precision,
            text_encoder_precision=self.text_encoder_precision,
            provider=self.provider,
            provider_options=dict(self.provider_options),
            flavour=self.flavour,
            threads=self.threads,
            low_memory=self.low_memory,
            keep_loaded=self._is_small() if self.keep_loaded is None else self.keep_loaded,
            cache_dir=self.cache_dir,
            transformer=self.transformer,
            text_encoder=self.text_encoder,
            vae=self.vae,
            on_export=on_export,
            on_choice=on_choice,
        )
        for i, text in enumerate(self.lora):
            wanted = parse(text)
            find_file(wanted.file)
            flux.load_lora(wanted.file, wanted.scale, name=str(i))
        return flux

    def _is_small(self) -> bool:
        from fluxonnx.api import find_model
        from fluxonnx.machine import available_memory

        size = 0
        for file in find_model(self.model).rglob("*.*"):
            with suppress(OSError):  # another process may have removed it
                size += file.stat().st_size
        return not self.low_memory and size < SMALL_PART * available_memory()

    def _group(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Make the pictures of some rows, whose prompts are encoded together."""
        from fluxonnx.runtime.input_files import loader

        load = loader()
        drawings: list[Drawing] = []
        with _lock:
            for row in rows:
                drawings.append(self._prepared(row, load))
            prompts: dict[int | None, list[str]] = {}
            for item in drawings:
                if item.request is not None:
                    prompts.setdefault(item.request.max_sequence_length, []).append(item.request.prompt)
            for length, texts in prompts.items():
                with suppress(FluxonnxError, MemoryError):  # each row will say what is wrong with it
                    self.open().encode_prompts(texts, length)
        for item in drawings:
            with _lock:
                result = self._drawn(item)
            yield result

    def _prepared(self, row: Mapping[str, Any], load: Load) -> Drawing:
        from fluxonnx.runtime.lines import combined, request_of

        start, seed = time.perf_counter(), None
        request, error = None, None
        inputs: Mapping[str, Any] = {}
        values = cleaned({name: value for name, value in row.items() if name in ROW_KEYS}, ROW_KEYS)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                values = checked("the row", values, ROW_KEYS)
                seed = seed_of(values)
                flux = self.open()
                request, inputs = request_of(combined(values, {}), values, load)
                flux.check(request)
            except Exception as problem:
                request, error = None, _line(problem)
        return Drawing(values, seed, request, inputs, error, _texts(told), time.perf_counter() - start)

    def _drawn(self, drawing: Drawing) -> dict[str, Any]:
        start = time.perf_counter()
        found: dict[str, Any] = dict.fromkeys(RESULTS if self.folder is None else (*RESULTS, "file"))
        found.update(row=drawing.values.get("row"), seed=drawing.seed, error=drawing.error, worker=worker_name())
        told = list(drawing.warnings)
        if drawing.request is not None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    found.update(self._made(drawing))
                except Exception as problem:
                    found["error"] = _line(problem)
            told += _texts(caught)
        found["warning"] = "; ".join(dict.fromkeys(told)) or None
        found["seconds"] = drawing.seconds + time.perf_counter() - start
        return found

    def _made(self, drawing: Drawing) -> dict[str, Any]:
        from fluxonnx.runtime.outputs import write_output
        from fluxonnx.runtime.saving import encoded

        assert drawing.request is not None
        assert drawing.seed is not None
        ((_, image),) = self.open().pictures(drawing.request, [drawing.seed])
        parameters: dict[Any, Any] = {**image.info, **drawing.inputs}
        suffix = Path(drawing.values.get("output", f".{self.format}")).suffix or f".{self.format}"
        data = encoded(image, suffix, parameters)
        sha256 = hashlib.sha256(data).hexdigest()
        found: dict[str, Any] = {
            "picture": data,
            "sha256": sha256,
            "parameters": json.dumps(parameters, sort_keys=True, default=str),
        }
        if self.folder is not None:
            file = file_name(drawing.values, self.format) or f"{sha256[:16]}{suffix}"
            path = Path(self.folder, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_output(path, data)
            found.update(picture=None, file=file)
        return found


@dataclass(frozen=True)
class Drawing:
    """A row on its way to a picture; without a request it is wrong."""

    values: Mapping[str, Any]
    seed: int | None
    request: Request | None
    inputs: Mapping[str, Any]
    error: str | None
    warnings: Sequence[str]
    seconds: float


def close() -> None:
    """Close the model that the process keeps open, if there is one."""
    global _opened
    with _lock:
        if _opened:
            _opened[1].close()
            _opened = None


def worker_name() -> str:
    """Name this process among those of all machines."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory: choose a smaller size"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    text = " ".join(str(error).split())
    return (
        text
        if isinstance(error, FluxonnxError)
        else f"internal error, please report it: {type(error).__name__}: {text}"
    )


def _texts(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    return [str(item.message) for item in caught if issubclass(item.category, UserWarning)]
