"""Whether a model draws the pictures that are known of the released one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fluxonnx import api
from fluxonnx.check.findings import FAILED, OK, SKIPPED, WARNING, Finding, one_line
from fluxonnx.contract import MAX_SEQUENCE_LENGTH
from fluxonnx.errors import FluxonnxError
from fluxonnx.measure.quality import psnr
from fluxonnx.runtime.request import Request

SUBJECT = "picture"
# The model whose pictures are known.
KNOWN_MODEL = "FLUX.2-klein-4B"
NOISE = "flux2c"
# In dB. The two known pictures, which have nothing in common, are at 10.3 from each other (their mean colours).
LOWEST_PSNR = 12.0


@dataclass(frozen=True)
class KnownPicture:
    """A published picture.

    Attributes:
        prompt: What it shows.
        seed: Of flux2.c's noise.
        steps: Denoising steps.
        width: In pixels.
        height: In pixels.
        colours: Its mean colours, 0 to 255: float64 [rows, columns, 3].
    """

    prompt: str
    seed: int
    steps: int
    width: int
    height: int
    colours: np.ndarray


@dataclass(frozen=True)
class Reference:
    """Published pictures, and the mean difference of colours that is allowed, of 255."""

    pictures: tuple[KnownPicture, ...]
    allowed: float


def known() -> Reference:
    """Return the pictures that flux2.c publishes of the released FLUX.2-klein-4B."""
    values = json.loads(files("fluxonnx.check").joinpath("data/pictures.json").read_text("utf-8"))
    pictures = tuple(
        KnownPicture(
            **{name: item[name] for name in ("prompt", "seed", "steps", "width", "height")},
            colours=np.array(item["mean_rgb_16x16"], np.float64),
        )
        for item in values["pictures"]
    )
    return Reference(pictures, float(values["allowed"]))


def mean_colours(image: Image.Image, rows: int, columns: int) -> np.ndarray:
    """Return the mean colours of equal cells: float64 [rows, columns, 3], 0 to 255.

    Args:
        image: A picture whose height is a multiple of `rows`, and its width of `columns`.
        rows: Of cells.
        columns: Of cells.
    """
    pixels = np.asarray(image.convert("RGB"), np.float64)
    height, width = pixels.shape[:2]
    return pixels.reshape(rows, height // rows, columns, width // columns, 3).mean((1, 3))


def difference(image: Image.Image, expected: np.ndarray) -> float:
    """Return the mean difference of a picture's mean colours [rows, columns, 3] from the expected ones, of 255."""
    return float(np.abs(mean_colours(image, *expected.shape[:2]) - expected).mean())


def check(
    root: Path,
    reference: Reference,
    precisions: Sequence[str | None],
    looks_random: bool,
    say: Callable[[str], None],
    load: Callable[..., Any] = api.load,
) -> Iterator[Finding]:
    """Draw the known pictures and compare them, the small one first; after a wrong one, a build draws no more.

    Args:
        root: The model directory.
        reference: The known pictures.
        precisions: The builds that draw them; further ones are also compared with the first. None is the only build
            of a directory without other weights.
        looks_random: Whether the weights look like random numbers.
        say: Called with each line of progress.
        load: `api.load`, or something that takes its place.
    """
    originals: list[Image.Image] = []
    original = ""
    for precision in precisions:
        name = precision or "the build"
        drawn: list[Image.Image] = []
        try:
            with load(root, precision=precision, on_export=lambda folder: say(f"Exporting {folder} ...")) as flux:
                for i, picture in enumerate(reference.pictures):
                    say(f'{name} draws "{picture.prompt}" at {picture.width}x{picture.height}')
                    start = time.perf_counter()
                    drawn.append(flux.run(_request(picture), [picture.seed])[0])
                    seconds = time.perf_counter() - start
                    compared = _compared(picture, drawn[i], name, reference.allowed, looks_random, seconds)
                    yield compared
                    if i < len(originals):
                        yield _distance(picture, drawn[i], name, originals[i], original)
                    if compared.state == FAILED and i + 1 < len(reference.pictures):
                        yield skipped(f"{name} draws nothing larger, since this picture is wrong already")
                        break
        except FluxonnxError as error:
            yield Finding(FAILED, SUBJECT, one_line(f"{name}: {error}"))
            continue
        if not originals:
            originals, original = drawn, name


def _request(picture: KnownPicture) -> Request:
    return Request(
        prompt=picture.prompt,
        width=picture.width,
        height=picture.height,
        steps=picture.steps,
        noise=NOISE,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
    )


def _compared(
    picture: KnownPicture, drawn: Image.Image, name: str, allowed: float, looks_random: bool, seconds: float
) -> Finding:
    found = difference(drawn, picture.colours)
    text = (
        f'{name}, "{picture.prompt}" at {picture.width}x{picture.height}, {picture.steps} steps: mean colours differ '
        f"by {found:.1f} of 255 from the published picture, {allowed:g} are allowed ({seconds:.0f} s)"
    )
    figures = {
        **{"precision": name, "prompt": picture.prompt, "seed": picture.seed, "steps": picture.steps},
        **{"width": picture.width, "height": picture.height, "difference": found, "allowed": allowed},
        "seconds": seconds,
    }
    if found <= allowed:
        return Finding(OK, SUBJECT, text, figures)
    cause = (
        "these are not the released weights: they look like random ones; download the model"
        if looks_random
        else "these are not the released weights, or this machine computes them wrongly: download the model again, and "
        "if that does not help, report the last line"
    )
    return Finding(FAILED, SUBJECT, f"{text}: {cause}", figures)


def _distance(picture: KnownPicture, drawn: Image.Image, name: str, original: Image.Image, by: str) -> Finding:
    found = psnr(drawn, original)
    text = f'{name}, "{picture.prompt}": PSNR {found:.1f} dB against {by}'
    figures = {"precision": name, "prompt": picture.prompt, "against": by, "psnr": found}
    if found >= LOWEST_PSNR:
        return Finding(OK, SUBJECT, text, figures)
    return Finding(
        WARNING, SUBJECT, f"{text}, which is another picture: see what fluxonnx compare says of the layers", figures
    )


def skipped(why: str) -> Finding:
    """Say why no picture is drawn."""
    return Finding(SKIPPED, SUBJECT, why)
