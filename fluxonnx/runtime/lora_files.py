"""Where a LoRA file is: a path, a folder, or a repository of the Hugging Face hub; and how flags name one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fluxonnx.checkpoint import hub
from fluxonnx.checkpoint.reading import is_file, is_folder, shown
from fluxonnx.errors import CheckpointError, UsageError

ENDING = ".safetensors"
# What tools call the file, best first: diffusers, PEFT.
USUAL_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True)
class Found:
    """A LoRA file, and what a picture calls it: its name without folders, or its place on the hub."""

    path: Path
    name: str


@dataclass(frozen=True)
class Wanted:
    """A LoRA to load, and how strongly it counts."""

    file: str
    scale: float


def parse(text: str) -> Wanted:
    """Parse FILE or FILE:SCALE; a file whose name ends like a scale is taken for a file.

    Raises:
        UsageError: There is no file.
    """
    file, colon, scale = text.rpartition(":")
    wanted = Wanted(text, 1.0)
    if colon and not is_file(Path(text)):
        try:
            wanted = Wanted(file, float(scale))
        except ValueError:
            if is_file(Path(file)):
                raise UsageError(f"--lora {text}: {scale!r} is no number: write FILE or FILE:SCALE") from None
    if not wanted.file:
        raise UsageError("--lora has no file: write FILE or FILE:SCALE")
    return wanted


def find_file(name: str) -> Found:
    """Find a LoRA file; one on the hub is downloaded, if it is not in the hub's cache.

    Raises:
        CheckpointError: There is none, or several.
    """
    path = Path(name)
    if is_file(path):
        return Found(path, path.name)
    if is_folder(path):
        chosen = _chosen([child.name for child in sorted(path.iterdir())], name)
        return Found(path / chosen, chosen)
    local = is_folder(path.parent) or (name.endswith(ENDING) and name.count("/") < 2)
    if hub.FILE.fullmatch(name) and not local:
        return Found(*hub.download_file(name, partial(_chosen, where=name)))
    raise CheckpointError(f"{name} does not exist: name a LoRA's .safetensors file, or a repository as OWNER/NAME")


def _chosen(names: Iterable[str], where: str) -> str:
    """Choose the LoRA among the files of a folder or of a repository."""
    files = [name for name in names if name.endswith(ENDING)]
    usual = [name for name in USUAL_NAMES if name in files]
    if usual or len(files) == 1:
        return (usual or files)[0]
    if not files:
        raise CheckpointError(f"{where} holds no {ENDING} file: name a LoRA's file")
    some = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    raise CheckpointError(f"{where} holds {len(files)} {ENDING} files ({some}): name one, as {where}/FILE")


def remembered(values: Mapping[str, Any], source: Path | None, model: Path) -> list[Wanted]:
    """Find the LoRA files of a picture that is made again: here, beside the picture or the model, or on the hub.

    Only the name of a file is looked for: a stranger's picture must not lead through folders.

    Raises:
        CheckpointError: One is missing, or is another file.
    """
    from fluxonnx.lora.file import digest

    names, hashes = values.get("lora_files", []), values.get("lora_sha256", [])
    scales = values.get("lora_scales", [])
    found = []
    for i, name in enumerate(names):
        scale = float(scales[i]) if i < len(scales) else 1.0
        expected = hashes[i] if i < len(hashes) else ""
        bare = Path(name).name
        beside = source.parent if source else Path()
        places = [folder / bare for folder in (Path(), Path("loras"), beside, beside / "loras", model, model / "loras")]
        here = [place for place in dict.fromkeys(places) if is_file(place)]
        same = next((place for place in here if digest(place) == expected), None)
        if same is None and not here and hub.FILE.fullmatch(name) and name.count("/") > 1:
            # a stranger's picture must not cause a download either
            place, _ = hub.download_file(name, partial(_chosen, where=name), cached=True)
            if digest(place) == expected:
                found.append(Wanted(name, scale))
                continue
        if same is None:
            what = (
                f"{here[0]} is another file than"
                if here
                else f"{name if name.isprintable() else shown(name)} is missing, which is"
            )
            raise CheckpointError(
                f"{what} the LoRA that {source} was made with (SHA-256 {expected[:12]}...): bring it here, or choose "
                "others with --lora"
            )
        found.append(Wanted(str(same), scale))
    return found


def chosen(flags: Sequence[str], values: Mapping[str, Any], source: Path | None, model: Path) -> list[Wanted]:
    """Return the LoRA files that flags name, else those of the picture that is made again, after finding each.

    Args:
        flags: FILE or FILE:SCALE each; "none" alone for none, whatever the picture says.
        values: The values of the picture that is made again.
        source: That picture.
        model: The model directory.

    Raises:
        UsageError: A flag names no file.
        CheckpointError: A file is missing.
    """
    if not flags:
        return remembered(values, source, model)
    if list(flags) == ["none"]:
        return []
    found = [parse(flag) for flag in flags]
    for item in found:
        find_file(item.file)
    return found
