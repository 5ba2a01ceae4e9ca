"""Where the weights of a component lie: which files of a folder, which file of a person, and in which format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fluxonnx.checkpoint.config import read_json
from fluxonnx.checkpoint.gguf import is_gguf, read_gguf
from fluxonnx.checkpoint.reading import exists, is_file, is_folder, shown
from fluxonnx.checkpoint.safetensors import Tensor, read_header, read_metadata
from fluxonnx.errors import CheckpointError

# File name stems by which diffusers and transformers save a component.
STEMS = ("diffusion_pytorch_model", "model")
INDEX = ".safetensors.index.json"
# Variants as diffusers and transformers name them: STEM.fp16.safetensors; indexes STEM.safetensors.index.fp16.json
# or STEM.fp16.safetensors.index.json.
VARIANT = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)(\.(?P<name>\w+)\.safetensors(\.index\.json)?"
    r"|\.safetensors\.index\.(?P<indexed>\w+)\.json)"
)
# Which of several variants is read: the one that is nearest to the original.
PREFERRED = ("bf16", "fp32", "fp16")
OTHER_FORMATS = (".bin", ".gguf", ".pt", ".pth", ".ckpt", ".onnx", ".msgpack", ".h5")


def weight_files(folder: Path) -> tuple[Path | None, list[Path]]:
    """Find a component's safetensors files.

    Returns:
        The index file (None when the component is a single file) and the files it names, sorted.
    """
    if (found := _main_file(folder)) is not None:
        return files_of(found)
    expected = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    other = _other_weights(folder)
    if other and other.endswith(".gguf"):
        raise CheckpointError(f"{folder} holds {other}: pass it with --transformer or --text-encoder")
    if other:
        raise CheckpointError(f"{folder} holds {other}, but fluxonnx reads only {expected}: rename or download it")
    raise CheckpointError(f"{folder} holds no weights (expected {expected}): download the model's safetensors files")


def has_weights(folder: Path) -> bool:
    """Whether a component's folder holds safetensors files that `weight_files` finds."""
    return _main_file(folder) is not None


def files_of(file: Path) -> tuple[Path | None, list[Path]]:
    """Return the index that a file is, if it is one, and the files that it names, sorted; else the file itself."""
    if file.suffix != ".json":
        return None, [file]
    names = sorted(set(_weight_map(file).values()))
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{file} names a file outside its folder, which is never right")
    return file, [file.parent / name for name in names]


def _main_file(folder: Path) -> Path | None:
    """Return a component's file or index: the plain one, else a variant."""
    for ending in (".safetensors", INDEX):
        for stem in STEMS:
            if exists(folder / f"{stem}{ending}"):
                return folder / f"{stem}{ending}"
    variants = {path: match for path in sorted(listed(folder)) if (match := VARIANT.fullmatch(path.name))}
    if not variants:
        return None

    def order(path: Path) -> tuple[int, str]:
        name = variants[path]["name"] or variants[path]["indexed"]
        return PREFERRED.index(name) if name in PREFERRED else len(PREFERRED), path.name

    return min(variants, key=order)


def part_file(path: Path, component: str) -> Path:
    """Return the file, or the index of files, that a person names as the weights of a component.

    Args:
        path: A file; or a folder: a component's, a model's, or any other one with one safetensors or GGUF file.
        component: The component's folder in a model directory.

    Raises:
        CheckpointError: There is no such file, or there are several.
    """
    flag = f"--{component.replace('_', '-')}"
    if is_file(path):
        return path
    if not is_folder(path):
        raise CheckpointError(f"{flag} {path} is not a file: pass a .safetensors or .gguf file, or the folder of one")
    if exists(path / "model_index.json") and is_folder(path / component):
        path = path / component
    if (found := _main_file(path)) is not None:
        return found
    files = sorted(file for file in listed(path) if file.suffix in (".safetensors", ".gguf") and is_file(file))
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files[:3])
        raise CheckpointError(f"{flag} {path} holds several files ({names}{', ...' * (len(files) > 3)}): pass one")
    return weight_files(path)[1][0]


def read_part(file: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Read the tensor table and the metadata of a safetensors or GGUF file, or of an index of safetensors files.

    Raises:
        CheckpointError: A file is missing, corrupt or of another kind.
    """
    if file.suffix == ".json":
        return _indexed(file), [read_metadata(shard) for shard in files_of(file)[1]]
    if is_gguf(file):
        return read_gguf(file)[0], []
    return read_header(file), [read_metadata(file)]


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
    names = sorted(path.name for path in listed(folder))
    variants = [name for name in names if name.startswith(STEMS) and name.endswith(".safetensors")]
    return next(iter(variants + [name for name in names if name.endswith(OTHER_FORMATS)]), None)


def listed(folder: Path) -> list[Path]:
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
    return _indexed(index or files[0])


def _indexed(main: Path) -> dict[str, Tensor]:
    index, files = files_of(main)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"{name} is in both {tensors[name].file.name} and {file.name} of {main.parent}")
            tensors[name] = tensor
    if index is not None:
        for name, file_name in _weight_map(index).items():
            if name not in tensors or tensors[name].file.name != file_name:
                raise CheckpointError(
                    f"{index} says that {shown(name)} is in {shown(file_name)}, where it is not: download it again"
                )
    return tensors
