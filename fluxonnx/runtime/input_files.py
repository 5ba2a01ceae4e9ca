"""The input pictures of a job: which are painted over or looked at, where they are, and what a picture says of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from fluxonnx.errors import ImageError, UsageError
from fluxonnx.runtime.fields import MAX_REFERENCES
from fluxonnx.runtime.images import BLACK, digest, load_image

# load(path, is_mask=False) reads a picture, and says its digest: a file of the same name can have changed later.
Load = Callable[..., tuple[Image.Image, str]]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The pictures of a request, and what is written about them into the picture that it makes."""

    image: Image.Image | None = None
    mask: Image.Image | None = None
    references: tuple[Image.Image, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pictures(self) -> dict[str, Any]:
        """The arguments of `Request`."""
        return {"image": self.image, "mask": self.mask, "references": self.references}


def loader() -> Load:
    """Return a function that reads each file once: all lines of a prompt file look at the same pictures."""

    @cache
    def load(path: Path, is_mask: bool = False) -> tuple[Image.Image, str]:
        image = load_image(path, BLACK).convert("L") if is_mask else load_image(path)
        return image, digest(image)

    return load


def load_inputs(
    input: Sequence[Path],
    reference: Sequence[Path],
    paints_over: bool,
    known: Mapping[str, Any],
    source: Path | None,
    absolute_paths: bool,
    load: Load,
    mask: Path | None = None,
) -> Inputs:
    """Load the pictures that flags name, else those of the picture that is made again.

    -i without -t is a reference: that is what FLUX.2 was trained for and what most tools mean by editing.

    Args:
        input: Those of -i.
        reference: Those of -r.
        paints_over: Whether -t, a mask or borders to add are given.
        known: The values of the picture that is made again.
        source: That picture.
        absolute_paths: Whether to write down where files are, and not only their names.
        load: Reads a picture.
        mask: That of --mask.

    Raises:
        UsageError: Flags contradict each other, or there are too many pictures.
        ImageError: A picture is missing or can't be read.
    """
    if paints_over and len(input) > 1:
        raise UsageError("-t, --mask and --expand paint over one picture: give one -i, and the others with -r")
    if paints_over and not input and "image_file" not in known:
        raise UsageError("-t, --mask and --expand say how to paint over a picture: give the picture with -i")
    looked_at = [*([] if paints_over else input), *reference]
    count = len(looked_at or known.get("reference_files", []))
    if count > MAX_REFERENCES:
        raise UsageError(f"{count} reference images are too many: {MAX_REFERENCES} at most")

    def given(path: Path, is_mask: bool = False) -> tuple[Image.Image, str, str]:
        image, sha256 = load(path, is_mask)
        return image, str(path.absolute()) if absolute_paths else path.name, sha256

    def remembered(name: str, expected: str | None, is_mask: bool = False) -> tuple[Image.Image, str, str]:
        path = _find(name, expected, source, partial(load, is_mask=is_mask))
        image, sha256 = load(path, is_mask)
        if sha256 != expected:
            warnings.warn(f"{path} has changed since: the result will differ", stacklevel=5)
        return image, str(path.absolute()) if absolute_paths else name, sha256

    start = None
    if paints_over and input:
        start = given(input[0])
    elif known.get("image_file"):
        start = remembered(known["image_file"], known.get("image_sha256"))
    painted = None
    if mask is not None:
        painted = given(mask, is_mask=True)
    elif start and known.get("mask_file"):
        painted = remembered(known["mask_file"], known.get("mask_sha256"), is_mask=True)
    if looked_at:
        others = [given(path) for path in looked_at]
    else:
        names, hashes = known.get("reference_files", []), known.get("reference_sha256", [])
        others = [remembered(name, hashes[i] if i < len(hashes) else None) for i, name in enumerate(names)]
    metadata: dict[str, Any] = {}
    if start:
        metadata |= {"image_file": start[1], "image_sha256": start[2]}
    if painted:
        metadata |= {"mask_file": painted[1], "mask_sha256": painted[2]}
    if others:
        metadata |= {"reference_files": [other[1] for other in others], "reference_sha256": [o[2] for o in others]}
    return Inputs(
        image=start[0] if start else None,
        mask=painted[0] if painted else None,
        references=tuple(image for image, _, _ in others),
        metadata=metadata,
    )


def _find(name: str, expected: str | None, source: Path | None, load: Load) -> Path:
    """Find an input picture of a picture that is made again: where it was, beside that picture, or here.

    Only its name is looked for outside of an absolute path, which older pictures have: a stranger's picture must not
    lead through folders.
    """
    beside = source.parent if source else Path()
    places = [Path(name)] if Path(name).is_absolute() else []
    places += [beside / Path(name).name, Path(Path(name).name)]
    found = [place for place in dict.fromkeys(places) if os.path.isfile(place)]  # noqa: PTH113 - it never raises
    if not found:
        raise ImageError(f"{name} does not exist beside {source} or here: bring it back, or give it with -i or -r")
    for place in found:
        try:
            if load(place)[1] == expected:
                return place
        except ImageError:
            continue
    return found[0]
