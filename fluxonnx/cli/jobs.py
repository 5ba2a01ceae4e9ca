"""From the flags of `generate` to the pictures to make."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxonnx.errors import UsageError
from fluxonnx.runtime.fields import FIELD
from fluxonnx.runtime.input_files import Load, loader
from fluxonnx.runtime.lines import combined, request_of
from fluxonnx.runtime.metadata import read_values
from fluxonnx.runtime.prompt_file import prompt_file_name, read_prompt_file
from fluxonnx.runtime.providers import CPU, OPENBLAS, available
from fluxonnx.runtime.request import Request
from fluxonnx.runtime.saving import check_output_path
from fluxonnx.runtime.seeds import random_seed

# Values by the names of the table of fields, with its types.
Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the flags of `generate` say about pictures; None or empty where they say nothing.

    Attributes:
        values: Attributes of `Request`; they override the values of a file.
        seed: The seeds.
        count: The number of pictures to make from one seed.
        files: Pictures by the flag that names them: "input" for pictures to look at, or with a strength, a mask or
            borders the one to paint over; "reference" for more pictures to look at.
        mask: The part of the input to paint.
        output: The file to write.
        prompt_file: A file with prompts.
        absolute_paths: Whether pictures say where their input pictures are, and not only their names.
    """

    values: Values
    seed: list[int] | None = None
    count: int | None = None
    files: Mapping[str, list[Path]]
    mask: Path | None = None
    output: Path | None = None
    prompt_file: Path | None = None
    absolute_paths: bool = False


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
        inputs: The names and digests of the input pictures, which are written into the picture.
        where: What messages call the job; empty if it is the only one.
    """

    request: Request
    seeds: list[int]
    output: Path
    numbered: bool
    inputs: Mapping[str, Any]
    where: str = ""


@dataclass(frozen=True)
class BuildChoice:
    """The build that a picture was made with or that flags name; None where neither says."""

    precision: str | None
    text_encoder_precision: str | None
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
    load = loader()
    if wanted.prompt_file:
        if "prompt" in wanted.values or source:
            raise UsageError("--prompt-file cannot be combined with -p or --from: choose one")
        lines = read_prompt_file(wanted.prompt_file)
        jobs = []
        for number, line in enumerate(lines, 1):
            where = f"prompt {number} of {prompt_file_name(wanted.prompt_file).removeprefix('prompt file ')}"
            with located(where):
                jobs.append(_job(wanted, line, None, len(lines) > 1, load, where))
        return jobs
    if "prompt" not in wanted.values and not source:
        raise UsageError("there is nothing to draw: say what with -p, --prompt-file or --from")
    return [_job(wanted, source.values if source else {}, source.path if source else None, False, load)]


@contextmanager
def located(where: str) -> Iterator[None]:
    """Say in the message of a usage error which job is wrong."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") if where else error from None


def choose_build(
    precision: str | None, text_encoder_precision: str | None, provider: str | None, source: Source | None, model: str
) -> BuildChoice:
    """Choose the build that flags name, else the one that the picture to make again was made with.

    Args:
        precision: The flag's.
        text_encoder_precision: The flag's.
        provider: The flag's.
        source: The picture to make again.
        model: The name of the model; a warning tells if the picture was made with another one.
    """
    if source is None:
        return BuildChoice(precision, text_encoder_precision, provider, None)
    known = source.values
    if known.get("model", model) != model:
        warnings.warn(f"{source.path} was made with {known['model']}, not with {model}", stacklevel=2)
    if not provider:
        provider = known.get("provider")
        if provider and provider not in (*available(), OPENBLAS):
            warnings.warn(
                f"{source.path} was made on {provider}, which is not available: on the CPU it will differ a little",
                stacklevel=2,
            )
            provider = CPU
    flavour = known.get("flavour") if (provider or CPU) == known.get("provider", CPU) else None
    text_encoder_precision = text_encoder_precision or known.get("text_encoder_precision")
    return BuildChoice(precision or known.get("precision"), text_encoder_precision, provider, flavour)


def _job(wanted: Wanted, known: Values, source: Path | None, numbered: bool, load: Load, where: str = "") -> Job:
    """Combine the flags with the values of a line of a prompt file, or of the picture to make again."""
    values = combined(known, wanted.values)
    request, inputs = request_of(
        values,
        known,
        load,
        files=wanted.files,
        mask=wanted.mask,
        source=source,
        said=wanted.values if source else values,
        absolute_paths=wanted.absolute_paths,
    )
    seeds = _seeds(wanted, known)
    output = Path(known.get("output") or wanted.output or FIELD["output"].default)
    numbered = (numbered and "output" not in known) or len(seeds) > 1
    check_output_path(output, numbered)
    return Job(request, seeds, output, numbered, inputs, where)


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
