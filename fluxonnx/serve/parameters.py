"""What a job asks for: its JSON checked by the table of fields, and turned into a request for pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxonnx.checkpoint.reading import is_text
from fluxonnx.errors import FluxonnxError
from fluxonnx.runtime.adapters import MOST_SCALE
from fluxonnx.runtime.fields import FIELD, MAX_REFERENCES
from fluxonnx.runtime.images import BLACK, digest, load_image
from fluxonnx.runtime.request import Request, resolve
from fluxonnx.runtime.seeds import random_seed
from fluxonnx.serve.errors import from_ours, wrong
from fluxonnx.serve.fields import RENAMED, VALUES, values_of
from fluxonnx.serve.models import Held, Models
from fluxonnx.serve.settings import Limits
from fluxonnx.serve.warned import silently

# The others.
PICTURES = ("input", "references", "mask")
OTHERS = (*PICTURES, "lora", "model", "precision", "count", "seed")
# The values that say that the input is painted over, and not only looked at; as on the command line.
PAINTS_OVER = ("strength", "expand", "mask")
# The least common multiple of the sides of all models.
UNIT = 16
MOST_LORAS = 16

# find(id of an upload or a picture, name of the parameter) -> its file
Find = Callable[[str, str], Path]


@dataclass(frozen=True)
class Accepted:
    """A job that can be done.

    Attributes:
        parameters: What it asks for, without what it leaves to the model.
        seeds: One for each picture.
        batch: Equal for jobs whose pictures differ in nothing but the seed.
    """

    parameters: dict[str, Any]
    seeds: list[int]
    batch: str


def read_job(body: Any, models: Models, limits: Limits, find: Find, private: Mapping[Path, str]) -> Accepted:
    """Check a job before it is accepted, as far as that is possible without drawing.

    Args:
        body: The JSON that a client sent.
        models: The models that there are.
        limits: What may be asked for.
        find: Returns the files of pictures.
        private: Folders whose names are not told.

    Raises:
        ApiError: It can't be done.
    """
    if not isinstance(body, Mapping):
        raise wrong("the job has to be a JSON object with a prompt")
    given: dict[str, Any] = {str(RENAMED.get(name, name)): value for name, value in body.items() if value is not None}
    for name in given:
        if name not in VALUES and name not in OTHERS:
            known = ", ".join((*VALUES, *OTHERS))
            raise wrong(f"there is no parameter {name[:60]!r}: known are {known}", name[:60])
    if "prompt" not in given:
        raise wrong("there is no prompt: say what to draw", "prompt")
    parameters: dict[str, Any] = {}
    for name, field in VALUES.items():
        if name in given:
            if error := field.type_error(given[name]):
                raise wrong(error.replace(f'"{field.name}"', f'"{name}"', 1), name)
            parameters[name] = list(given[name]) if field.many else given[name]
    for name, value in given.items():
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and not is_text(text) for text in texts):
            raise wrong(f"{name} holds characters that are no text", name)
    if not parameters["prompt"].strip():
        raise wrong("the prompt is empty: say what to draw", "prompt")
    parameters |= _pictures(given)
    held = models.find(_text(given, "model"))
    parameters["model"] = held.id
    parameters["precision"] = held.checked_precision(_text(given, "precision"))
    if loras := _loras(given.get("lora", []), models):
        parameters["lora"] = loras
    seeds = _seeds(given, limits.count)
    for name in PICTURES:  # each is there, and the error names the right one
        for identifier in _several(parameters.get(name)):
            find(identifier, name)
    _check(parameters, held, find, limits, private)
    batch = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()
    return Accepted({**parameters, "seed": seeds[0], "count": len(seeds)}, seeds, batch)


def _check(parameters: Mapping[str, Any], held: Held, find: Find, limits: Limits, private: Mapping[Path, str]) -> None:
    """Check what the values say together, as the model's `check` does."""
    try:
        with silently():
            request, _ = to_request(parameters, find)
            held.flux.check(request)
            quiet: Callable[[str], None] = lambda message: None  # noqa: E731
            drawn = resolve(request, held.flux.is_distilled, UNIT, held.flux.defaults, quiet)
    except FluxonnxError as error:
        found = from_ours(error, private)
        found.param = RENAMED.get(found.param or "", found.param)
        raise found from None
    if drawn.width * drawn.height > limits.pixels:
        raise wrong(
            f"{drawn.width}x{drawn.height} are {drawn.width * drawn.height} pixels, more than the "
            f"{limits.pixels} that this server draws: choose a smaller size",
            "width",
        )


def to_request(parameters: Mapping[str, Any], find: Find) -> tuple[Request, dict[str, Any]]:
    """Return the request for a job's pictures, and what they say of the pictures that it takes.

    Raises:
        FluxonnxError: A picture is gone or can't be read, or a value is impossible.
    """
    values: dict[str, Any] = {
        field.name: tuple(parameters[name]) if field.many else parameters[name]
        for name, field in VALUES.items()
        if name in parameters
    }
    # as on the command line
    if "sigmas" in values:
        values.setdefault("schedule", "custom")
    facts: dict[str, Any] = {}
    others = [(identifier, "references") for identifier in _several(parameters.get("references"))]
    if identifier := parameters.get("input"):
        if any(name in parameters for name in PAINTS_OVER):
            values["image"] = load_image(find(identifier, "input"))
            facts |= {"image_file": identifier, "image_sha256": digest(values["image"])}
        else:
            others.insert(0, (identifier, "input"))
    if identifier := parameters.get("mask"):
        values["mask"] = load_image(find(identifier, "mask"), behind=BLACK)
        facts |= {"mask_file": identifier, "mask_sha256": digest(values["mask"].convert("L"))}
    if others:
        pictures = [load_image(find(identifier, name)) for identifier, name in others]
        values["references"] = tuple(pictures)
        facts["reference_files"] = [identifier for identifier, _ in others]
        facts["reference_sha256"] = [digest(picture) for picture in pictures]
    return Request(**values), facts


def again(parameters: Mapping[str, Any], facts: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the parameters of a job that makes one picture of another job again.

    Args:
        parameters: Those of the other job.
        facts: The metadata of the picture.
    """
    kept = {name: value for name, value in parameters.items() if name not in ("count", "size")}
    return {**kept, **values_of(facts)}


def _several(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _text(given: Mapping[str, Any], name: str) -> str | None:
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong(f'"{name}" has to be a string', name)
    return value


def _pictures(given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("input", "mask"):
        value = _text(given, name)
        if value is not None:
            found[name] = value
    references = given.get("references", [])
    if not isinstance(references, list) or not all(isinstance(item, str) for item in references):
        raise wrong('"references" has to be a list of ids of pictures', "references")
    if len(references) > MAX_REFERENCES:
        raise wrong(f"{len(references)} references are too many: {MAX_REFERENCES} at most", "references")
    if references:
        found["references"] = references
    if "input" not in found and any(name in given for name in PAINTS_OVER):
        raise wrong("strength, mask and expand say how to paint over a picture: give its id as input", "input")
    return found


def _loras(value: Any, models: Models) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > MOST_LORAS:
        raise wrong(f'"lora" has to be a list of at most {MOST_LORAS} objects with a name and a scale', "lora")
    found = []
    for item in value:
        if not isinstance(item, Mapping) or not isinstance(item.get("name"), str) or item.keys() - {"name", "scale"}:
            raise wrong('each item of "lora" has to be an object with a name and a scale', "lora")
        scale = item.get("scale", 1.0)
        number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not number or not abs(scale) <= MOST_SCALE:
            raise wrong(f"the scale of a LoRA must be a number from -{MOST_SCALE:g} to {MOST_SCALE:g}", "lora")
        models.lora_file(item["name"])
        found.append({"name": item["name"], "scale": float(scale)})
    names = [item["name"] for item in found]
    if len(set(names)) < len(names):
        raise wrong("a LoRA is named twice: give one scale", "lora")
    return found


def _seeds(given: Mapping[str, Any], most: int) -> list[int]:
    count, first = given.get("count", 1), given.get("seed")
    for name, value in (("count", count), ("seed", first)):
        if value is None:
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong(f'"{name}" has to be an integer', name)
        try:
            FIELD[name].check(value)
        except FluxonnxError as error:
            raise wrong(str(error), name) from None
    count = int(count)
    if count > most:
        raise wrong(f"count is {count}, but this server makes at most {most} pictures in a job", "count")
    first = random_seed() if first is None else int(first)
    if first + count > 2**64:
        raise wrong("the seeds of so many pictures end above 2**64 - 1: choose a smaller seed", "seed")
    return [first + i for i in range(count)]
