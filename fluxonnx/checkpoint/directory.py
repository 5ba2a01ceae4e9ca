"""A model directory in the layout that diffusers saves: one folder per component, weights in one file or in shards."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from fluxonnx.checkpoint.config import Config, read_json
from fluxonnx.checkpoint.formats import refuse_quantised_encoder, resolve
from fluxonnx.checkpoint.names import with_prefix
from fluxonnx.checkpoint.reading import exists, is_file, is_folder, shown
from fluxonnx.checkpoint.safetensors import Tensor, read_header, read_metadata
from fluxonnx.errors import CheckpointError

# File name stems by which diffusers and transformers save a component.
STEMS = ("diffusion_pytorch_model", "model")
# A repository of the hub, which people pass for a folder.
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def weight_files(folder: Path) -> tuple[Path | None, list[Path]]:
    """Find a component's safetensors files.

    Returns:
        The index file (None when the component is a single file) and the files it names, sorted.
    """
    for stem in STEMS:
        single = folder / f"{stem}.safetensors"
        if exists(single):
            return None, [single]
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if exists(index):
            names = sorted(set(_weight_map(index).values()))
            if any(Path(name).name != name for name in names):
                raise CheckpointError(f"{index} names a file outside its folder, which is never right")
            return index, [folder / name for name in names]
    expected = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    if other := _other_weights(folder):
        raise CheckpointError(f"{folder} holds {other}, but fluxonnx reads only {expected}: rename or download it")
    raise CheckpointError(f"{folder} holds no weights (expected {expected}): download the model's safetensors files")


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file that holds each tensor."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index} has no "weight_map": download it again')
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index}: the file of {shown(name)} is {shown(file)}, expected a name")
    return weight_map


def _other_weights(folder: Path) -> str | None:
    """Return the name of a weight file that is there in another form: a variant (fp16), another format."""
    names = sorted(path.name for path in _listed(folder))
    variants = [name for name in names if name.startswith(STEMS) and name.endswith(".safetensors")]
    others = [name for name in names if name.endswith((".bin", ".gguf", ".pt", ".pth", ".ckpt"))]
    return next(iter(variants + others), None)


def _listed(folder: Path) -> list[Path]:
    """Return what is in a folder; unlike `glob`, not silently less where it can't be read."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} can't be read: {error.strerror or error}") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read a component's tensor table from its single file or from all of its shards.

    Raises:
        CheckpointError: A file or a tensor that the index names is missing, or a file is corrupt.
    """
    index, files = weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"{name} is in both {tensors[name].file.name} and {file.name} of {folder}")
            tensors[name] = tensor
    if index is not None:
        for name, file_name in _weight_map(index).items():
            if name not in tensors or tensors[name].file.name != file_name:
                raise CheckpointError(
                    f"{index} says that {shown(name)} is in {shown(file_name)}, where it is not: download it again"
                )
    return tensors


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
                f"`hf download {root} --local-dir {root.name}` and pass -d {root.name}"
            ) from None
        raise CheckpointError(
            f"model directory {root} does not exist: pass the folder that holds model_index.json"
        ) from None
    except OSError as error:
        raise CheckpointError(f"model directory {root} can't be read: {error.strerror or error}") from None
    if not is_directory:
        raise CheckpointError(f"model directory {root} is not a directory: pass the folder that holds model_index.json")


class Checkpoint:
    """A model directory: its configs, its tensors, and where the transformer's weights come from."""

    def __init__(self, root: str | Path, transformer: str | Path | None = None) -> None:
        """Open the directory; `contract.open_checkpoint` also checks which kind of model it is.

        Args:
            root: The directory.
            transformer: A safetensors file that replaces the transformer's weights.

        Raises:
            CheckpointError: The directory does not exist or has no model_index.json, or `transformer` is not a file.
        """
        self.root = Path(root)
        _check_folder(self.root)
        if transformer and not is_file(Path(transformer)):
            raise CheckpointError(f"--transformer {transformer} is not a file: pass a .safetensors file")
        self.transformer = _placed(Path(transformer), self.root) if transformer else None
        self.index = Config(self.root / "model_index.json")

    @property
    def name(self) -> str:
        """The model's name as a person knows it: the folder's, or the repository's in a hub cache."""
        path = self.root.resolve()
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            return path.parent.parent.name.split("--")[-1]
        return path.name

    @cached_property
    def is_distilled(self) -> bool:
        """Whether the model was distilled to run in a few steps without guidance."""
        return self.index.flag("is_distilled", False)

    def config(self, component: str, expected: str) -> Config:
        """Read the config.json of `component`, which must describe a model of class `expected`.

        Raises:
            CheckpointError: The file is missing, corrupt, or describes another class.
        """
        config = Config(self.root / component / "config.json")
        architectures = config.values.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else None
        found = config.values.get("_class_name") or first
        if found != expected:
            name = found if isinstance(found, str) else shown(found)
            raise CheckpointError(f"{config.path} describes a {name[:100]}, but fluxonnx knows only {expected}")
        return config

    def tensors(self, component: str) -> dict[str, Tensor]:
        """Return the tensors of `component` by name, the transformer's by diffusers' names.

        Raises:
            CheckpointError: A file is missing or corrupt, or holds a quantisation format that is not known.
        """
        if component != "transformer":
            tensors = read_tensors(self.root / component)
            if component == "text_encoder":
                refuse_quantised_encoder(tensors)
                return with_prefix(tensors)
            return tensors
        tensors = read_header(self.transformer) if self.transformer else read_tensors(self.root / component)
        files = sorted({tensor.file for tensor in tensors.values()})
        return resolve(tensors, [read_metadata(file) for file in files])

    def has_weights(self, component: str) -> bool:
        """Whether `component` has weight files; a self-contained copy of a build has only those of the build."""
        folder = self.root / component
        return any(exists(folder / f"{stem}.safetensors{end}") for stem in STEMS for end in ("", ".index.json"))

    @property
    def export_place(self) -> str:
        """The flags of `fluxonnx export` that add a build to this directory, which may be a copy without weights."""
        return f"-d {self.root}" if self.has_weights("transformer") else f"-d CHECKPOINT -o {self.root}"

    def files(self, components: Iterable[str]) -> Iterator[Path]:
        """Yield every file in the directory that these components need: configs, tokenizer, weights."""
        yield self.index.path
        for folder in ("scheduler", "tokenizer"):
            if is_folder(self.root / folder):
                yield from sorted(path for path in _listed(self.root / folder) if is_file(path))
        for component in components:
            yield self.root / component / "config.json"
            if component == "transformer" and self.transformer:
                continue
            index, files = weight_files(self.root / component)
            if index is not None:
                yield index
            yield from files
