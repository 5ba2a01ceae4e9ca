"""The LoRA files of a model that is open: which are loaded, how strongly each counts, and the graphs with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.manifest import Build, unpacked_scaling
from fluxonnx.contract import COMPONENTS, KV_COMPONENTS, Architecture, open_checkpoint
from fluxonnx.errors import CheckpointError, UsageError
from fluxonnx.lora.names import ENCODER, TRANSFORMER, Layers
from fluxonnx.runtime.engine import SessionOptions
from fluxonnx.runtime.lora_files import find_file
from fluxonnx.runtime.models import Models
from fluxonnx.runtime.notices import warn
from fluxonnx.runtime.prompts import Prompts

if TYPE_CHECKING:
    from fluxonnx.lora.adapted import Adapted
    from fluxonnx.lora.file import Lora

# Far beyond what any picture survives.
MOST_SCALE = 100.0
# Precisions whose weights are scaled for rounding.
SCALED = ("int8", "int4")


@dataclass(frozen=True)
class Loaded:
    """A LoRA that is loaded, what pictures call its file, and how strongly it counts."""

    lora: Lora
    file: str
    scale: float


class Adapters:
    """LoRA files by the names that a program gives them, in the order in which they were loaded."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        build: Build,
        encoder: Build,
        sizes: Architecture,
        options: SessionOptions,
        lock: AbstractContextManager,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            checkpoint: The model directory.
            build: The build of the transformer.
            encoder: The build of the text encoder.
            sizes: The model's.
            options: How graphs are run.
            lock: Held while something changes.
        """
        self._checkpoint, self._options, self._lock = checkpoint, options, lock
        self._builds = {TRANSFORMER: build, ENCODER: encoder}
        self._layers = Layers(sizes)
        self._loaded: dict[str, Loaded] = {}

    def attach(self, models: Models, prompts: Prompts) -> None:
        """Have graphs adapted when they are loaded, and prompts encoded anew after the text encoder has changed."""
        models.adapt, prompts.adapted = self.graph, self.identity

        def changed(components: Collection[str]) -> None:
            for component in components:
                models.close(component, *(name for name, owner in KV_COMPONENTS.items() if owner == component))
            if ENCODER in components:
                prompts.forget()

        self._changed: Callable[[Collection[str]], None] = changed

    def load(self, path: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """See `Flux.load_lora`."""
        from fluxonnx.lora.file import read_lora

        scale = _checked(scale)
        found = find_file(str(path))
        name = found.path.stem if name is None else name
        with self._lock:
            if name in self._loaded:
                raise UsageError(f"there is a LoRA {name!r} already: give this one another name, or unload that one")
            if self._options.engine is not None:
                raise UsageError("a LoRA needs an engine of fluxonnx: load the model without engine=")
            lora = read_lora(found.path, self._layers, self._checkpoint.name, self._weights)
            if lora.about_unused:
                warn(lora.about_unused)
            for component in lora.changes:
                self._check_build(component)
            self._loaded[name] = Loaded(lora, found.name, scale)
            self._tell(lora)
        return name

    def set_scale(self, name: str, scale: float) -> None:
        """See `Flux.set_lora_scale`."""
        scale = _checked(scale)
        with self._lock:
            known = self._find(name)
            self._loaded[name] = replace(known, scale=scale)
            self._tell(known.lora)

    def unload(self, name: str | None = None) -> None:
        """See `Flux.unload_lora`."""
        with self._lock:
            for found in list(self._loaded) if name is None else [name]:
                known = self._find(found)
                del self._loaded[found]
                self._tell(known.lora)

    def metadata(self) -> dict[str, Any]:
        """Return what a picture says of the LoRA files that it was made with."""
        used = [loaded for loaded in self._loaded.values() if loaded.scale]
        if not used:
            return {}
        return {
            "lora_files": [loaded.file for loaded in used],
            "lora_sha256": [loaded.lora.sha256 for loaded in used],
            "lora_scales": [loaded.scale for loaded in used],
        }

    def identity(self, component: str) -> str:
        """Return what tells a graph with these LoRA files from others; "" without any."""
        used = [
            f"{loaded.lora.sha256} {loaded.scale!r}"
            for loaded in self._loaded.values()
            if loaded.scale and component in loaded.lora.changes
        ]
        return ", ".join(used)

    def graph(self, component: str, path: Path) -> Adapted | None:
        """Return a graph with the changes of all LoRA files; None if none changes it.

        Raises:
            UsageError: The weights of this build can't be changed so.
            CheckpointError: The graph can't be read, or is not as the exporter wrote it.
        """
        owner = KV_COMPONENTS.get(component, component)
        if not self.identity(owner):
            return None
        import onnx

        from fluxonnx.lora.graph import Active, Scales, adapt

        layers: dict[str, list[Active]] = {}
        for loaded in self._loaded.values():
            for layer, change in loaded.lora.changes.get(owner, {}).items():
                layers.setdefault(layer, []).append(Active(change, loaded.scale))
        try:
            model = onnx.load(str(path), load_external_data=False)
        except Exception:  # protobuf's errors have no base that it exports
            raise CheckpointError(f"{path} is no ONNX file: export again with --force") from None
        build = self._builds[owner]
        packed = build.components[component].scaling or {}
        scales = {name: Scales(**unpacked_scaling(value)) for name, value in packed.items()}
        return adapt(model, layers, scales, build.precision)

    def _find(self, name: str) -> Loaded:
        if name not in self._loaded:
            known = ", ".join(map(repr, self._loaded)) or "none"
            raise UsageError(f"there is no LoRA {name!r}: loaded are {known}")
        return self._loaded[name]

    def _tell(self, lora: Lora) -> None:
        self._changed(lora.changes.keys())

    def _check_build(self, component: str) -> None:
        """Check that it is known how the weights of a build were scaled for rounding.

        Raises:
            CheckpointError: An older version exported it.
        """
        build = self._builds[component]
        if build.precision in SCALED and build.components[component].scaling is None:
            root = self._checkpoint.root
            raise CheckpointError(
                f"the {build.precision} build of {root} was exported by a version that knew no LoRA: run fluxonnx "
                f"export -d {root} --precision {build.precision} --flavour {build.flavour} --force"
            )

    def _weights(self, component: str, path: str) -> np.ndarray:
        """Return the checkpoint's weights of a layer, float32 [out, in].

        Raises:
            CheckpointError: The checkpoint does not have them as floats.
        """
        checkpoint, build = self._checkpoint, self._builds[component]
        if (name := build.parsed_settings.parts.get(component)) and not checkpoint.parts:
            sources = build.components[component].sources
            files = ((checkpoint.root / source).with_name(name) for source in sources)
            file = next((file for file in files if file.is_file()), None)
            which = {"transformer" if component == TRANSFORMER else "text_encoder": file}
            checkpoint = open_checkpoint(checkpoint.root, **which)
        tensor = checkpoint.tensors(COMPONENTS[component]).get(f"{path}.weight")
        if tensor is None or tensor.quantisation:
            raise CheckpointError(
                f"a DoRA needs the weights that it was trained on, but {checkpoint.root} has no {path}.weight of "
                "floats: use it with the original checkpoint"
            )
        return tensor.array().astype(np.float32)


def _checked(scale: Any) -> float:
    number = float(scale) if isinstance(scale, Real) and not isinstance(scale, bool) else math.nan
    if not abs(number) <= MOST_SCALE:
        raise UsageError(
            f"the scale of a LoRA is {scale!r}, but must be a number from -{MOST_SCALE:g} to {MOST_SCALE:g}"
        )
    return number
