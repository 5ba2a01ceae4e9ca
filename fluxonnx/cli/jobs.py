"""From the flags of `generate` to the pictures to make."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxonnx.cli.prompt_file import read_prompt_file
from fluxonnx.errors import UsageError
from fluxonnx.runtime.fields import FIELD, FIELDS, MAX_REFERENCES
from fluxonnx.runtime.images import digest, load_image
from fluxonnx.runtime.metadata import read_values
from fluxonnx.runtime.pipeline import random_seed
from fluxonnx.runtime.providers import CPU, available
from fluxonnx.runtime.request import Request
from fluxonnx.runtime.saving import check_output_path

# Values by the names of the table of fields, with its types.
Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the flags of `generate` say about pictures; None or empty where they say nothing.

    Attributes:
        values: Attributes of `Request`; they override the values of a file.
        seed: The seeds.
        count: The number of pictures to make from one seed.
        input: Pictures to look at, or with a strength the one to paint over.
        reference: More pictures to look at.
        output: The file to write.
        prompt_file: A file with prompts.
    """

    values: Values
    seed: list[int] | None = None
    count: int | None = None
    input: list[Path]
    reference: list[Path]
    output: Path | None = None
    prompt_file: Path | None = None


@dataclass(frozen=True)
class Source:
    """A picture to make again, and the values that made it."""

    path: Path
    values: Values


@dataclass(frozen=True)
class Job:
    """Pictures that differ only in their seed.

    Attributes:
        request: What to draw.
        seeds: One per picture.
        output: The file, or the name that numbers are added to.
        numbered: Whether numbers are added: then nothing is ever overwritten.
        files: The paths and digests of the input pictures, which are written into the picture.
    """

    request: Request
    seeds: list[int]
    output: Path
    numbered: bool
    files: dict[str, Any]


@dataclass(frozen=True)
class BuildChoice:
    """The build that a picture was made with or that flags name; None where neither says."""

    precision: str | None
    provider: str | None
    flavour: str | None


def read_source(path: Path) -> Source:
    """Read the picture to make again.

    Raises:
        ImageError: It can't be read, or its parameters are damaged.
    """
    return Source(path, read_values(path))


def plan(wanted: Wanted, source: Source | None) -> list[Job]:
    """Read all inputs and decide which pictures to make.

    Args:
        wanted: The flags.
        source: The picture to make again.

    Raises:
        UsageError: Flags contradict each other, or a line of the prompt file is wrong.
        ImageError: An input picture can't be read.
    """
    if wanted.prompt_file:
        if "prompt" in wanted.values or source:
            raise UsageError("--prompt-file cannot be combined with -p or --from: choose one")
        lines = read_prompt_file(wanted.prompt_file)
        return [_job(wanted, line, numbered=len(lines) > 1) for line in lines]
    if "prompt" not in wanted.values and not source:
        raise UsageError("there is nothing to draw: say what with -p, --prompt-file or --from")
    return [_job(wanted, source.values if source else {}, numbered=False)]


def choose_build(precision: str | None, provider: str | None, source: Source | None, model: str) -> BuildChoice:
    """Choose the build that flags name, else the one that the picture to make again was made with.

    Args:
        precision: The flag's.
        provider: The flag's.
        source: The picture to make again.
        model: The name of the model; a warning tells if the picture was made with another one.
    """
    if source is None:
        return BuildChoice(precision, provider, None)
    known = source.values
    if known.get("model", model) != model:
        warnings.warn(f"{source.path} was made with {known['model']}, not with {model}", stacklevel=2)
    if not provider:
        provider = known.get("provider")
        if provider and provider not in available():
            warnings.warn(
                f"{source.path} was made on {provider}, which is not available: on the CPU it will differ a little",
                stacklevel=2,
            )
            provider = CPU
    flavour = known.get("flavour") if (provider or CPU) == known.get("provider", CPU) else None
    return BuildChoice(precision or known.get("precision"), provider, flavour)


def _job(wanted: Wanted, known: Values, numbered: bool) -> Job:
    """Combine the flags with the values of a line of a prompt file, or of the picture to make again."""
    values = {field.name: known[field.name] for field in FIELDS if "request" in field.places and field.name in known}
    values.update(wanted.values)
    if "sigmas" in values:
        values["sigmas"] = tuple(values["sigmas"])
        if "sigmas" in wanted.values and "schedule" not in wanted.values:
            values["schedule"] = "custom"
        values.setdefault("schedule", "custom")
        if "steps" not in wanted.values:
            values.pop("steps", None)
    files = _input_files(wanted, known)
    request = Request(**values, **_load_inputs(files, known))
    seeds = _seeds(wanted, known)
    output = Path(known.get("output") or wanted.output or FIELD["output"].default)
    numbered = (numbered and "output" not in known) or len(seeds) > 1
    check_output_path(output, numbered)
    return Job(request, seeds, output, numbered, files)


def _seeds(wanted: Wanted, known: Values) -> list[int]:
    count = FIELD["count"].default if wanted.count is None else wanted.count
    FIELD["count"].check(count)
    seeds = wanted.seed or [known.get("seed", random_seed())]
    if len(seeds) > 1 and wanted.count is not None:
        raise UsageError("-n counts up from one seed: leave it out, or give one seed")
    if len(seeds) == 1:
        seeds = [seeds[0] + i for i in range(count)]
    for seed in seeds:
        FIELD["seed"].check(seed)
    return seeds


def _input_files(wanted: Wanted, known: Values) -> dict[str, Any]:
    """Decide which picture is painted over and which are looked at.

    -i without -t is a reference: that is what FLUX.2 was trained for and what most tools mean by editing.
    """
    strength = "strength" in wanted.values
    if strength and len(wanted.input) > 1:
        raise UsageError("-t paints over one picture: give one -i, and the others with -r")
    if strength and not wanted.input and "image_file" not in known:
        raise UsageError("-t sets how much of a picture to paint over: give the picture with -i")
    files: dict[str, Any] = {}
    image = str(wanted.input[0].absolute()) if strength and wanted.input else known.get("image_file")
    if image:
        files["image_file"] = image
    looked_at = [*([] if strength else wanted.input), *wanted.reference]
    references = [str(path.absolute()) for path in looked_at] or known.get("reference_files", [])
    if len(references) > MAX_REFERENCES:
        raise UsageError(f"{len(references)} reference images are too many: {MAX_REFERENCES} at most")
    if references:
        files["reference_files"] = references
    return files


def _load_inputs(files: dict[str, Any], known: Values) -> dict[str, Any]:
    """Load the input pictures, and add their digests to `files`: a file of the same name can have changed later."""
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
