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
from fluxonnx.errors import FluxonnxError
from fluxonnx.measure.quality import psnr
from fluxonnx.runtime.request import Request

SUBJECT = "picture"
# The model whose pictures are known.
KNOWN_MODEL = "FLUX.2-klein-4B"
NOISE = "flux2c"
# Below this, in dB, a quantised build's picture shares little with the original's; of trained weights, builds of 8 and
# 4 bits are far above (docs/precisions.md).
LOWEST_PSNR = 10.0


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
    """Draw the known pictures and compare them.

    Args:
        root: The model directory.
        reference: The known pictures.
        precisions: The builds that draw them; further ones are also compared with the first. None is the only build
            of a directory without other weights.
        looks_random: Whether the weights look like random numbers.
        say: Called with each line of progress.
        load: `api.load`, or something that takes its place.
    """
    first: list[Image.Image] = []
    for precision in precisions:
        try:
            drawn, seconds = _draw(root, reference, precision, say, load)
        except FluxonnxError as error:
            yield Finding(FAILED, SUBJECT, one_line(f"{precision or 'the build'}: {error}"))
            continue
        first = first or drawn
        others = [] if drawn is first else first
        for i, picture in enumerate(reference.pictures):
            yield _compared(
                picture, drawn[i], precision, reference.allowed, looks_random, others[i : i + 1], seconds[i]
            )


def _draw(
    root: Path, reference: Reference, precision: str | None, say: Callable[[str], None], load: Callable[..., Any]
) -> tuple[list[Image.Image], list[float]]:
    pictures, seconds = [], []
    with load(root, precision=precision, on_export=lambda folder: say(f"Exporting {folder} ...")) as flux:
        for known_picture in reference.pictures:
            start = time.perf_counter()
            say(f'{precision or "the build"} draws "{known_picture.prompt}"')
            request = Request(
                prompt=known_picture.prompt,
                width=known_picture.width,
                height=known_picture.height,
                steps=known_picture.steps,
                noise=NOISE,
                max_sequence_length=512,
            )
            pictures.append(flux.run(request, [known_picture.seed])[0])
            seconds.append(time.perf_counter() - start)
    return pictures, seconds


def _compared(
    picture: KnownPicture,
    drawn: Image.Image,
    precision: str | None,
    allowed: float,
    looks_random: bool,
    original: Image.Image | None,
    seconds: float,
) -> Finding:
    found = difference(drawn, picture.colours)
    what = f'{precision or "the build"}, "{picture.prompt}" at {picture.width}x{picture.height}, {picture.steps} steps'
    distance = f"mean colours differ by {found:.1f} of 255 from the published picture"
    figures: dict[str, Any] = {
        **{"precision": precision, "prompt": picture.prompt, "seed": picture.seed, "steps": picture.steps},
        **{"width": picture.width, "height": picture.height, "difference": found, "allowed": allowed},
        "seconds": seconds,
    }
    text = f"{what}: {distance} ({allowed:g} are allowed), {seconds:.0f} s"
    state = OK
    if original is not None:
        figures["psnr"] = against = psnr(drawn, original)
        text += f"; PSNR {against:.1f} dB against the first build"
        if against < LOWEST_PSNR:
            state = WARNING
    if found > allowed:
        state = FAILED
        cause = (
            "these are not the released weights, but look like random ones: download the model"
            if looks_random
            else "these are not the released weights, or they are computed wrongly here: download the model again, and "
            "report the last line if it stays"
        )
        text = f"{text}: {cause}"
    return Finding(state, SUBJECT, text, figures)


def skipped(why: str) -> Finding:
    """Say why no picture is drawn."""
    return Finding(SKIPPED, SUBJECT, why)
