"""What a line of a prompt file asks for: its values together with those of flags, and the request that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxonnx.runtime.fields import FIELDS
from fluxonnx.runtime.input_files import Load, load_inputs
from fluxonnx.runtime.request import Request

# The values that name pictures, several each.
PICTURE_FILES = ("input", "reference")
# The values that say that the input is painted over, and not only looked at.
PAINTS_OVER = ("strength", "expand")


def combined(line: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a `Request` that flags say, and else a line; both by the names of the table of fields.

    A size that flags give replaces that of the line, in whichever form it is; sigmas make a custom schedule.
    """
    values = {field.name: line[field.name] for field in FIELDS if "request" in field.places and field.name in line}
    if "size" in flags:
        values = {name: value for name, value in values.items() if name not in ("width", "height")}
    elif {"width", "height"} & flags.keys():
        values.pop("size", None)
    values |= flags
    if "sigmas" in values:
        if "sigmas" in flags and "schedule" not in flags:
            values["schedule"] = "custom"
        values.setdefault("schedule", "custom")
        if "steps" not in flags:  # the sigmas say how many
            values.pop("steps", None)
    return values


def request_of(
    values: Mapping[str, Any],
    line: Mapping[str, Any],
    load: Load,
    *,
    files: Mapping[str, Sequence[Path]] | None = None,
    mask: Path | None = None,
    source: Path | None = None,
    said: Mapping[str, Any] | None = None,
    absolute_paths: bool = False,
) -> tuple[Request, Mapping[str, Any]]:
    """Load the pictures that a line names, and make the request.

    Args:
        values: Attributes of `Request` by the names of the table of fields; see `combined`.
        line: The line, or the values of the picture that is made again.
        load: Reads a picture, see `input_files.loader`.
        files: Pictures that flags name, which replace those of the line: "input" and "reference".
        mask: Likewise for the mask.
        source: The picture that is made again.
        said: The values that say whether the input is painted over; by default `values`.
        absolute_paths: Whether pictures say where their input pictures are, and not only their names.

    Returns:
        The request, and the names and digests of its input pictures, which are written into the picture.

    Raises:
        UsageError: Values contradict each other.
        ImageError: A picture is missing or can't be read.
    """
    arguments: dict[str, Any] = {
        name: tuple(value) if name in ("expand", "sigmas") else value for name, value in values.items()
    }
    # A line of a prompt file has the paths of its pictures; the picture to make again has names to look for.
    chosen = {name: (files or {}).get(name) or [Path(file) for file in line.get(name, ())] for name in PICTURE_FILES}
    mask = mask or (Path(line["mask"]) if "mask" in line else None)
    inputs = load_inputs(
        chosen["input"],
        chosen["reference"],
        mask is not None or any(name in (values if said is None else said) for name in PAINTS_OVER),
        line,
        source,
        absolute_paths,
        load,
        mask,
    )
    if inputs.image and line.get("strength") == 0 and inputs.image.size == (line.get("width"), line.get("height")):
        # A copy of the input, which has sizes that can't be drawn, and again has its size if none is given.
        for name in ("width", "height"):
            if arguments.get(name) == line[name]:
                arguments.pop(name)
    return Request(**arguments | inputs.pictures), inputs.metadata
