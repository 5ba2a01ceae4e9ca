"""From the flags of `generate` to the pictures that are to be made."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fluxonnx.errors import UsageError
from fluxonnx.runtime.images import check_output_path, digest, load_image
from fluxonnx.runtime.metadata import read_parameters
from fluxonnx.runtime.pipeline import random_seed
from fluxonnx.runtime.providers import CPU, available
from fluxonnx.runtime.request import MAX_REFERENCES, Request

DEFAULT_OUTPUT = Path("out.png")
MAX_COUNT = 1000

# Flags that override what a prompt file or a picture says, and the fields of a Request they set.
OVERRIDES = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "max_sequence_length": "max_sequence_length",
    "width": "width",
    "height": "height",
    "strength": "strength",
    "steps": "steps",
    "guidance": "guidance_scale",
    "sampler": "sampler",
    "schedule": "schedule",
    "sigmas": "sigmas",
    "power_alpha": "power_alpha",
    "noise": "noise",
}

# What a line of a prompt file may hold, and of which type.
LINE_KEYS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "negative_prompt": (str,),
    "width": (int,),
    "height": (int,),
    "seed": (int,),
    "steps": (int,),
    "guidance_scale": (int, float),
    "sampler": (str,),
    "schedule": (str,),
    "power_alpha": (int, float),
    "noise": (str,),
    "output": (str,),
}


@dataclass(frozen=True)
class Job:
    """Pictures that differ in their seed only.

    Attributes:
        request: What to draw.
        seeds: One per picture.
        output: The file, or what numbers are added to.
        numbered: Whether they are: then nothing is ever overwritten.
        files: The paths of the input pictures, to be written into the picture.
    """

    request: Request
    seeds: list[int]
    output: Path
    numbered: bool
    files: dict[str, Any]


def plan(arguments: argparse.Namespace) -> list[Job]:
    """Read all inputs and decide what to make.

    Raises:
        UsageError: Flags contradict each other, or a line of the prompt file is wrong.
        ImageError: An input picture can't be read.
    """
    given = [name for name in ("prompt", "prompt_file", "source") if getattr(arguments, name) is not None]
    if not given:
        raise UsageError("there is nothing to draw: say what with -p, --prompt-file or --from")
    if arguments.prompt_file and len(given) > 1:
        raise UsageError("--prompt-file does not go with -p or --from: choose one")
    if arguments.prompt_file:
        lines = read_prompt_file(arguments.prompt_file)
        return [_job(arguments, line, numbered=len(lines) > 1) for line in lines]
    return [_job(arguments, read_parameters(arguments.source) if arguments.source else {}, numbered=False)]


def build(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    """Return precision, provider and flavour for `api.load`: the flag's, else those of the picture that is made again.

    None is for what neither says.
    """
    known = read_parameters(arguments.source) if arguments.source else {}
    if known.get("model", model) != model:
        warnings.warn(f"{arguments.source} was made with {known['model']}, not with {model}", stacklevel=3)
    provider = arguments.provider or known.get("provider")
    if not arguments.provider and provider and provider not in available():
        warnings.warn(
            f"{arguments.source} was made on {provider}, which is not here: on the CPU, it will differ a little",
            stacklevel=3,
        )
        provider = CPU
    return {
        "precision": arguments.precision or known.get("precision"),
        "provider": provider,
        "flavour": known.get("flavour") if (provider or CPU) == known.get("provider", CPU) else None,
    }


def _job(arguments: argparse.Namespace, known: dict[str, Any], numbered: bool) -> Job:
    values = {item.name: known[item.name] for item in fields(Request) if item.name in known}
    flags = {field: getattr(arguments, flag) for flag, field in OVERRIDES.items()}
    values.update({field: value for field, value in flags.items() if value is not None})
    if values.get("sigmas") is not None:
        values["sigmas"] = tuple(values["sigmas"])
        values.setdefault("schedule", "custom")
        if arguments.sigmas is not None and arguments.schedule is None:
            values["schedule"] = "custom"
        if arguments.steps is None:
            values.pop("steps", None)
    files = _input_files(arguments, known)
    request = Request(**values, **_pictures(files, known))
    seeds = _seeds(arguments, known)
    output = Path(known.get("output") or arguments.output or DEFAULT_OUTPUT)
    check_output_path(output)
    return Job(request, seeds, output, (numbered and "output" not in known) or len(seeds) > 1, files)


def _seeds(arguments: argparse.Namespace, known: dict[str, Any]) -> list[int]:
    seeds, count = arguments.seed, arguments.count
    if count is not None and not 1 <= count <= MAX_COUNT:
        raise UsageError(f"count is {count}, but must be from 1 to {MAX_COUNT}")
    if seeds is not None and len(seeds) > 1:
        if count is not None:
            raise UsageError("-n counts up from one seed: leave it out, or give one seed")
        return list(seeds)
    first = seeds[0] if seeds else known.get("seed", random_seed())
    return [first + i for i in range(count or 1)]


def _input_files(arguments: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    """Decide which picture is painted over and which are looked at.

    -i without -t is a reference: what FLUX.2 was trained for, and what most tools mean by editing.
    """
    if arguments.strength is not None and len(arguments.input) > 1:
        raise UsageError("-t paints over one picture: give one -i, and the others with -r")
    if arguments.strength is not None and not arguments.input and "image_file" not in known:
        raise UsageError("-t says how much of a picture to paint over: give it with -i")
    painted_over = bool(arguments.input) and arguments.strength is not None
    references = [*([] if painted_over else arguments.input), *arguments.reference]
    if len(references) > MAX_REFERENCES:
        raise UsageError(f"{len(references)} reference images are too many: {MAX_REFERENCES} at most")
    files: dict[str, Any] = {}
    image = str(arguments.input[0].absolute()) if painted_over else known.get("image_file")
    if image:
        files["image_file"] = image
    looked_at = [str(path.absolute()) for path in references] or known.get("reference_files")
    if looked_at:
        files["reference_files"] = looked_at
    return files


def _pictures(files: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Load the input pictures, and note in `files` what they look like: the same name may hold another one later."""
    pictures: dict[str, Any] = {}
    if "image_file" in files:
        pictures["image"] = load_image(files["image_file"])
        files["image_sha256"] = digest(pictures["image"])
    if "reference_files" in files:
        pictures["references"] = tuple(load_image(path) for path in files["reference_files"])
        files["reference_sha256"] = [digest(picture) for picture in pictures["references"]]
    for file, sha256 in (("image_file", "image_sha256"), ("reference_files", "reference_sha256")):
        if file in known and files.get(file) == known[file] and files[sha256] != known.get(sha256):
            warnings.warn(f"{files[file]} has changed since: the result will differ", stacklevel=4)
    return pictures


def read_prompt_file(path: Path) -> list[dict[str, Any]]:
    """Read a prompt a line; a line that starts with { is a JSON object with parameters of its own.

    Raises:
        UsageError: The file can't be read or is empty, or a line is wrong: the message has its number.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"prompt file {path} can't be read: {reason}") from None
    lines = [
        _read_line(f"{path}, line {number}", line.strip())
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]
    if not lines:
        raise UsageError(f"prompt file {path} holds no prompt")
    return lines


def _read_line(where: str, line: str) -> dict[str, Any]:
    if not line.startswith("{"):
        return {"prompt": line}
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(values.get("prompt"), str) or not values["prompt"].strip():
        raise UsageError(f'{where} has no "prompt"')
    for key, value in values.items():
        if key not in LINE_KEYS:
            raise UsageError(f'{where} has an unknown key "{key}": known are {", ".join(LINE_KEYS)}')
        if not isinstance(value, LINE_KEYS[key]) or isinstance(value, bool):
            raise UsageError(f'{where}: "{key}" is {value!r}, expected {LINE_KEYS[key][-1].__name__}')
    return values


def output_names(output: Path, numbered: bool, count: int) -> Iterator[Path]:
    """Yield the name of each picture: `output`, or cat-0001.png, cat-0002.png, ..., skipping those that exist."""
    number = 1
    for _ in range(count):
        path = output
        while numbered:
            path = output.with_name(f"{output.stem}-{number:04}{output.suffix}")
            number += 1
            if not path.exists():
                break
        yield path
