"""The models of a server: which there are, which stay in memory, and the LoRA files that may be used with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxonnx import api
from fluxonnx.auto import ENCODER
from fluxonnx.checkpoint.manifest import FILE_NAME, Build, read_manifest
from fluxonnx.errors import CheckpointError, FluxonnxError
from fluxonnx.machine import available_memory
from fluxonnx.runtime.events import Watch
from fluxonnx.runtime.memory import SMALL, WORKING_MEMORY
from fluxonnx.runtime.pipeline import Flux
from fluxonnx.runtime.request import Request
from fluxonnx.serve.errors import wrong
from fluxonnx.serve.settings import Settings

log = logging.getLogger("fluxonnx.serve")

# What a run of a small model needs besides its weights.
SMALL_WORKING_MEMORY = 300e6


@dataclass
class Opened:
    """A model that is open in one precision.

    Attributes:
        flux: The model.
        stays: Whether its graphs stay loaded, as there was memory for all of them when it was opened.
        weights: Bytes of the weights of all components.
        encoder: Bytes of the text encoder's.
        loras: The LoRA files that are loaded, how strongly each counts, and when it was changed.
        used: The higher, the later it was used; 0 if nothing is in memory.
    """

    flux: Flux
    stays: bool
    weights: int
    encoder: int
    loras: tuple[tuple[str, float, int], ...] = ()
    used: int = 0

    @property
    def working(self) -> float:
        """Bytes that a run needs besides the weights."""
        return WORKING_MEMORY if self.weights > SMALL else SMALL_WORKING_MEMORY


@dataclass
class Held:
    """A model directory.

    Attributes:
        id: The name of the folder, which clients use.
        root: The folder.
        precision: The one that is used if a job names none.
        precisions: Those of the builds that the folder holds.
        opened: By precision.
        created: When its manifest was last written, in seconds since 1970.
    """

    id: str
    root: Path
    precision: str
    precisions: list[str]
    opened: dict[str, Opened] = field(default_factory=dict)
    created: int = 0

    @property
    def flux(self) -> Flux:
        """The model in its default precision."""
        return self.opened[self.precision].flux

    def checked_precision(self, name: str | None) -> str:
        """Return a precision that can be used; raises ApiError for others."""
        if name is None:
            return self.precision
        if name not in self.precisions:
            known = ", ".join(self.precisions)
            raise wrong(f"{self.id} has no build of precision {name[:40]!r}: there are {known}", "precision")
        return name


class Models:
    """The models of a server. One thread draws with them; others may ask what there is."""

    def __init__(self, settings: Settings, free_memory: Callable[[], int] = available_memory) -> None:
        """Nothing is opened yet.

        Args:
            settings: Which models, and how they are run.
            free_memory: Returns how many bytes of memory are free.
        """
        self._settings, self._free_memory = settings, free_memory
        self._held: dict[str, Held] = {}
        self._clock = 0
        self.watch: Watch = lambda event: None

    def open(
        self, on_export: Callable[[Path], None] | None = None, on_choice: Callable[[Any], None] | None = None
    ) -> None:
        """Open every model in its default precision, exporting what is missing.

        Raises:
            FluxonnxError: One can't be opened.
        """
        for root in self._settings.models:
            flux_precision = self._settings.precision
            name = root.resolve().name or "model"
            known = [held.id for held in self._held.values()]
            identifier = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if n not in known)
            opened = self._load(root, flux_precision, on_export, on_choice)
            manifest = read_manifest(root)
            if manifest is None:
                raise CheckpointError(f"{root} has lost its manifest: export it again")
            created = int((root / FILE_NAME).stat().st_mtime)
            precision = opened.flux.builds["precision"]
            precisions = list(dict.fromkeys([precision, *(b.precision for b in manifest.builds.values())]))
            self._held[identifier] = Held(identifier, root, precision, precisions, {precision: opened}, created)

    def _load(
        self,
        root: Path,
        precision: str | None,
        on_export: Callable[[Path], None] | None = None,
        on_choice: Callable[[Any], None] | None = None,
    ) -> Opened:
        settings = self._settings
        options: dict[str, Any] = {
            "precision": precision,
            "provider": settings.provider,
            "threads": settings.threads,
            "low_memory": settings.low_memory,
            "watch": self._watched,
        }
        flux = api.load(root, on_export=on_export, on_choice=on_choice, **options)
        weights, encoder = _sizes(root, flux)
        stays = not settings.low_memory and weights - encoder + WORKING_MEMORY < self._free_memory()
        if stays:
            flux = api.load(root, keep_loaded=True, **options)
        return Opened(flux, stays, weights, encoder)

    def _watched(self, event: Any) -> None:
        self.watch(event)

    @property
    def all(self) -> list[Held]:
        """Every model, the default one first."""
        return list(self._held.values())

    def find(self, name: str | None) -> Held:
        """Return a model by its id; the default one for None.

        Raises:
            ApiError: There is none.
        """
        if name is None:
            return next(iter(self._held.values()))
        if name not in self._held:
            raise wrong(f"there is no model {name[:80]!r}: there are {', '.join(self._held)}", "model")
        return self._held[name]

    def lora_files(self) -> dict[str, Path]:
        """Return the LoRA files that may be used, by name."""
        folder = self._settings.lora_dir
        try:
            files = sorted(folder.glob("*.safetensors")) if folder else []
        except OSError:
            return {}
        return {file.stem: file for file in files if file.is_file()}

    def lora_file(self, name: str) -> Path:
        """Return a LoRA file by its name, with or without the ending.

        Raises:
            ApiError: There is none.
        """
        files = self.lora_files()
        found = files.get(name.removesuffix(".safetensors"))
        if found is None:
            known = ", ".join(files) or "none"
            raise wrong(f"there is no LoRA {name[:80]!r}: there are {known}", "lora")
        return found

    def ready(self, parameters: Mapping[str, Any]) -> Opened:
        """Return the model that a job names, with its LoRA files, after making room for it in memory.

        Raises:
            FluxonnxError: It can't be opened, or a LoRA does not fit.
        """
        held, precision = self.find(parameters["model"]), parameters["precision"]
        if precision not in held.opened:
            held.opened[precision] = self._load(held.root, precision)
        opened = held.opened[precision]
        self._make_room(opened)
        self._clock += 1
        opened.used = self._clock
        files = [(self.lora_file(item["name"]), item["scale"]) for item in parameters.get("lora", ())]
        wanted = tuple((file.name, scale, file.stat().st_mtime_ns) for file, scale in files)
        if wanted != opened.loras:
            opened.flux.unload_lora()
            opened.loras = ()
            try:
                for i, (file, scale) in enumerate(files):
                    opened.flux.load_lora(file, scale, name=str(i))
            except FluxonnxError:
                opened.flux.unload_lora()
                raise
            opened.loras = wanted
        return opened

    def _make_room(self, wanted: Opened) -> None:
        """Free the models that were not used for longest, until there is memory for another one."""
        needed = wanted.working + (0 if wanted.used else wanted.weights)
        warm = [
            opened
            for held in self._held.values()
            for opened in held.opened.values()
            if opened.used and opened is not wanted
        ]
        for opened in sorted(warm, key=lambda opened: opened.used):
            if self._free_memory() >= needed:
                return
            opened.flux.close()
            opened.used = 0
            log.info("model freed", extra={"facts": {"model": opened.flux.name}})

    def encode(self, opened: Opened, request: Request) -> None:
        """Encode a request's prompts; the text encoder is freed unless there is memory to keep it beside the rest."""
        if not opened.stays:
            return
        guided = not opened.flux.is_distilled or request.guidance_scale not in (None, 1)
        prompts = [request.prompt, request.negative_prompt] if guided else [request.prompt]
        opened.flux.encode_prompts(prompts, request.max_sequence_length)
        if self._free_memory() < opened.weights - opened.encoder + opened.working:
            opened.flux.release_text_encoder()

    def close(self) -> None:
        """Free all memory."""
        for held in self._held.values():
            for opened in held.opened.values():
                opened.flux.close()


def _sizes(root: Path, flux: Flux) -> tuple[int, int]:
    """Return the bytes of the weights of all components, and of the text encoder's."""
    manifest = read_manifest(root)
    names = flux.builds
    builds = [] if manifest is None else list(manifest.builds.values())
    encoder = names.get("text_encoder_precision", names["precision"])
    every, own = 0, 0
    for build in builds:
        if build.shape or build.flavour != names["flavour"]:
            continue
        if build.precision == names["precision"]:
            every += sum(_bytes(root, build, name) for name in build.components if name != ENCODER)
        if build.precision == encoder:
            own = _bytes(root, build, ENCODER)
    return every + own, own


def _bytes(root: Path, build: Build, component: str) -> int:
    files = build.components.get(component)
    paths = {root / name for name in files.weights} if files else set()
    return sum(path.stat().st_size for path in paths if path.is_file())
