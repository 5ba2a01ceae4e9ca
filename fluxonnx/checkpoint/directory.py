"""A model directory in the layout that diffusers saves: one folder per component, or parts from elsewhere."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from fluxonnx.checkpoint.config import Config
from fluxonnx.checkpoint.files import has_weights, listed, part_file, read_part, read_tensors, weight_files
from fluxonnx.checkpoint.formats import resolve
from fluxonnx.checkpoint.hub import REPOSITORY
from fluxonnx.checkpoint.part_names import vae_channels
from fluxonnx.checkpoint.reading import exists, is_file, is_folder, shown
from fluxonnx.checkpoint.safetensors import Tensor, read_metadata
from fluxonnx.errors import CheckpointError

# What describes a model: a pipeline of diffusers, or a modular one.
INDEXES = ("model_index.json", "modular_model_index.json")
# The pipeline of models that keep what they read of references; diffusers takes them to be distilled.
KEEPING = "Flux2KleinKVPipeline"
# The modular pipeline of distilled models, whose index may not say so.
DISTILLED = "Flux2KleinModularPipeline"
# Classes whose weights hold another's: the bare model of a language model.
INSIDE = {"Qwen3ForCausalLM": "Qwen3Model"}

__all__ = ["Checkpoint", "read_tensors", "weight_files"]


def _placed(file: Path, root: Path) -> Path:
    """Return a file's path relative to `root` (as given) if it lies there, else its absolute path."""
    absolute, folder = file.parent.resolve() / file.name, root.resolve()
    return root / absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute


def _check_folder(root: Path) -> None:
    try:
        is_directory = stat.S_ISDIR(root.stat().st_mode)
    except ValueError:
        raise CheckpointError(f"model directory {shown(str(root))}: no folder can have such a name") from None
    except (FileNotFoundError, NotADirectoryError):
        if REPOSITORY.fullmatch(root.as_posix()):
            raise CheckpointError(
                f"model directory {root} does not exist: if that is a repository of the hub, download it with "
                f"`fluxonnx download {root} -o {root.name}` and pass -d {root.name}"
            ) from None
        raise CheckpointError(
            f"model directory {root} does not exist: pass the folder that holds model_index.json"
        ) from None
    except OSError as error:
        raise CheckpointError(f"model directory {root} can't be read: {error.strerror or error}") from None
    if not is_directory:
        raise CheckpointError(f"model directory {root} is not a directory: pass the folder that holds model_index.json")


class Checkpoint:
    """A model directory: its configs, its tensors, and the parts whose weights come from elsewhere.

    Attributes:
        root: The directory.
        parts: The file, or index of files, that replaces the weights of a component, by the component's folder.
        may_link: Whether builds in the directory may have hard links to weights that lie elsewhere.
    """

    may_link = True

    def __init__(
        self,
        root: str | Path,
        transformer: str | Path | None = None,
        *,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
    ) -> None:
        """Open the directory; `contract.open_checkpoint` also checks which kind of model it is.

        Args:
            root: The directory.
            transformer: A file, or the folder of one, that replaces the transformer's weights.
            text_encoder: Likewise for the text encoder.
            vae: Likewise for the autoencoder.

        Raises:
            CheckpointError: The directory does not exist or has no model_index.json, or one of the others is not there.
        """
        self.root = Path(root)
        _check_folder(self.root)
        given = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
        self.parts = {
            name: _placed(part_file(Path(path), name), self.root) for name, path in given.items() if path is not None
        }
        index = next((name for name in INDEXES if exists(self.root / name)), INDEXES[0])
        self.index = Config(self.root / index)

    @property
    def transformer(self) -> Path | None:
        """The file that replaces the transformer's weights."""
        return self.parts.get("transformer")

    @property
    def name(self) -> str:
        """The model's name as a person knows it: the folder's, or the repository's in a hub cache."""
        path = self.root.resolve()
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            return path.parent.parent.name.split("--")[-1]
        return path.name

    @property
    def keeps_references(self) -> bool:
        """Whether the model was made to look at references once, and keep their keys and values for all steps."""
        return self.index.values.get("_class_name") == KEEPING

    @cached_property
    def is_distilled(self) -> bool:
        """Whether the model was distilled to run in a few steps without guidance."""
        return self.index.flag("is_distilled", self.index.values.get("_class_name") in (DISTILLED, KEEPING))

    def config_path(self, component: str) -> Path:
        """Return the config.json of `component`: the one beside the weights that replace it, else the directory's."""
        part = self.parts.get(component)
        beside = part.parent / "config.json" if part else None
        return beside if beside and exists(beside) else self.root / component / "config.json"

    def config(self, component: str, expected: str) -> Config:
        """Read the config.json of `component`, which must describe a model of class `expected`.

        Raises:
            CheckpointError: The file is missing, corrupt, or describes another class.
        """
        config = Config(self.config_path(component))
        architectures = config.values.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else None
        found = config.values.get("_class_name") or first
        if found not in (expected, INSIDE.get(expected, expected)):
            name = found if isinstance(found, str) else shown(found)
            raise CheckpointError(f"{config.path} describes a {name[:100]}, but fluxonnx knows only {expected}")
        if component == "vae" and component in self.parts:
            # the small decoder comes as one file, and the directory's config describes the large one
            return Config(config.path, {**config.values, **vae_channels(self.tensors(component))})
        return config

    def tensors(self, component: str) -> dict[str, Tensor]:
        """Return the tensors of `component` by the names that diffusers and transformers give them.

        Raises:
            CheckpointError: A file is missing or corrupt, or holds a quantisation format that is not known.
        """
        if part := self.parts.get(component):
            return resolve(*read_part(part), component)
        tensors = read_tensors(self.root / component)
        files = sorted({tensor.file for tensor in tensors.values()})
        return resolve(tensors, [read_metadata(file) for file in files], component)

    def has_weights(self, component: str) -> bool:
        """Whether `component` has weight files; a self-contained copy of a build has only those of the build."""
        return component in self.parts or has_weights(self.root / component)

    @property
    def export_place(self) -> str:
        """The flags of `fluxonnx export` that add a build to this directory, which may be a copy without weights."""
        return f"-d {self.root}" if self.has_weights("transformer") else f"-d CHECKPOINT -o {self.root}"

    def files(self, components: Iterable[str]) -> Iterator[Path]:
        """Yield every file in the directory that these components need: configs, tokenizer, weights."""
        yield self.index.path
        for folder in ("scheduler", "tokenizer"):
            if is_folder(self.root / folder):
                yield from sorted(path for path in listed(self.root / folder) if is_file(path))
        for component in components:
            config = self.root / component / "config.json"
            if component not in self.parts:
                yield config
                index, files = weight_files(self.root / component)
                if index is not None:
                    yield index
                yield from files
            elif exists(config):
                yield config
