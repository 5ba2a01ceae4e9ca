"""The model of a session: loaded when it is first needed, kept as memory allows, changed when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxonnx.errors import FluxonnxError
from fluxonnx.machine import available_memory

if TYPE_CHECKING:
    from fluxonnx.runtime.events import Event
    from fluxonnx.runtime.pipeline import Flux


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which model, and how it runs; see `api.load`.

    Attributes:
        dir: The model directory; None for the default.
        lora: LoRA files, as FILE or FILE:SCALE.
    """

    dir: str | None = None
    precision: str | None = None
    text_encoder_precision: str | None = None
    provider: str | None = None
    provider_option: tuple[tuple[str, str], ...] = ()
    threads: int | None = None
    low_memory: bool = False
    cache_dir: Path | None = None
    parts: dict[str, Path | None] = field(default_factory=dict)
    lora: tuple[str, ...] = ()


@dataclass(frozen=True)
class Keeping:
    """What stays in memory between pictures.

    Attributes:
        model: Whether all graphs do.
        text_encoder: Whether the text encoder does while the picture is drawn.
    """

    model: bool
    text_encoder: bool


def keeping(model_bytes: int, free: int, working: float) -> Keeping:
    """Decide what stays in memory.

    Args:
        model_bytes: The files of the model.
        free: Free memory.
        working: What drawing needs besides.
    """
    return Keeping(model_bytes <= free, model_bytes + working <= free)


class Studio:
    """A model that is opened when it is first asked for."""

    def __init__(
        self,
        choice: Choice,
        find_model: Callable[[str | None], Path],
        say: Callable[[str], None],
        watch: Callable[[Event], None],
        free_memory: Callable[[], int] = available_memory,
    ) -> None:
        """Load nothing yet.

        Args:
            choice: The model.
            find_model: Returns the directory for `Choice.dir`.
            say: Told what happens.
            watch: Called with each event of a run.
            free_memory: Returns how many bytes of memory are free.
        """
        self.choice = choice
        self._find_model, self._say, self._watch = find_model, say, watch
        self._free_memory = free_memory
        self._flux: Flux | None = None
        self._text_encoder_stays = True

    def flux(self) -> Flux:
        """Return the model; the first call loads it.

        Raises:
            FluxonnxError: It can't be loaded.
        """
        if self._flux is None:
            self._flux = self._opened(self.choice)
        return self._flux

    def change(self, **values: Any) -> None:
        """Use another model, or the same in another way; where that fails, nothing changes.

        Raises:
            FluxonnxError: It can't be loaded.
        """
        before, wanted = self.choice, replace(self.choice, **values)
        self.close()
        try:
            self._flux = self._opened(wanted)
        except BaseException:
            self.choice = before  # loaded again when it is needed
            raise
        self.choice = wanted

    def use_loras(self, files: tuple[str, ...]) -> None:
        """Use these LoRA files instead of others; where that fails, nothing changes.

        Raises:
            FluxonnxError: One can't be used.
        """
        flux, before = self.flux(), self.choice.lora
        flux.unload_lora()
        try:
            _load_loras(flux, files)
        except BaseException:
            with suppress(FluxonnxError):
                flux.unload_lora()
                _load_loras(flux, before)
            raise
        self.choice = replace(self.choice, lora=files)

    def close(self) -> None:
        """Free all memory."""
        if self._flux is not None:
            self._flux.close()
            self._flux = None

    def _opened(self, choice: Choice) -> Flux:
        from fluxonnx import api
        from fluxonnx.runtime.memory import WORKING_MEMORY

        model = self._find_model(choice.dir)

        def opened(keep_loaded: bool) -> Flux:
            return api.load(
                model,
                precision=choice.precision,
                text_encoder_precision=choice.text_encoder_precision,
                provider=choice.provider,
                provider_options=dict(choice.provider_option),
                threads=choice.threads,
                low_memory=choice.low_memory,
                keep_loaded=keep_loaded,
                cache_dir=choice.cache_dir,
                on_export=lambda root: self._say(f"Exporting {root} ..."),
                on_choice=lambda found: self._say(str(found)),
                watch=self._event,
                transformer=choice.parts.get("transformer"),
                text_encoder=choice.parts.get("text_encoder"),
                vae=choice.parts.get("vae"),
            )

        flux = opened(True)  # which loads no graph yet, but has all of them exported
        keep = keeping(_model_bytes(model), self._free_memory(), WORKING_MEMORY)
        if not keep.model:
            self._say("The model does not fit into free memory as a whole: its parts are loaded for each picture")
            flux = opened(False)
        self._text_encoder_stays = keep.text_encoder or not keep.model
        _load_loras(flux, choice.lora)
        return flux

    def _event(self, event: Event) -> None:
        from fluxonnx.runtime.events import PhaseBegan

        is_encoded = isinstance(event, PhaseBegan) and event.name == "load transformer"
        if is_encoded and self._flux is not None and not self._text_encoder_stays:
            self._flux.release_text_encoder()
        self._watch(event)


def _load_loras(flux: Flux, files: Iterable[str]) -> None:
    from fluxonnx.runtime.lora_files import parse

    for i, wanted in enumerate(map(parse, files)):
        flux.load_lora(wanted.file, wanted.scale, name=str(i))


def _model_bytes(root: Path) -> int:
    """Return how much the files of a build take, of the largest one if there are several."""
    from fluxonnx.checkpoint.manifest import Manifest, depended_on, read_manifest

    builds = (read_manifest(root) or Manifest()).builds.values()
    files = [
        {name for part in build.components.values() for name in (part.graph, *part.weights, *depended_on(part))}
        for build in builds
    ]
    return max((sum(_size(root / name) for name in names) for names in files), default=0)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
