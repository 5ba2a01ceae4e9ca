"""Many pictures in one process: threads, files and memory stay as they are after the first ones.

FLUXONNX_SOAK sets the number of pictures; 300 take some minutes.
"""

from __future__ import annotations

import gc
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxonnx
from fluxonnx.errors import Cancelled, UsageError
from fluxonnx.runtime.fields import MAX_SIDE
from fluxonnx.runtime.pipeline import Flux
from fluxonnx.runtime.request import Request

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")]

DEMO_MODEL = Path(__file__).parents[1] / "models/tiny-klein"
PICTURES = int(os.environ.get("FLUXONNX_SOAK", "20"))
SIZES = [(64, 64), (128, 64), (96, 160), (128, 128), (256, 192)]
# What the allocator may keep besides: one run of the largest of these sizes takes more.
GROWTH = 48 << 20


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("soak") / "tiny-klein"
    return Path(shutil.copytree(DEMO_MODEL, root, ignore=shutil.ignore_patterns("training", "*.png")))


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def generate(flux: Flux, prompt: str, size: tuple[int, int], seed: int) -> None:
    flux.generate(prompt, *size, steps=2, seed=seed)


def paint_over(flux: Flux, prompt: str, size: tuple[int, int], seed: int) -> None:
    flux.img2img(prompt, photo(*size), 0.5, seed)


def edit(flux: Flux, prompt: str, size: tuple[int, int], seed: int) -> None:
    flux.edit(prompt, [photo(*size), photo(64, 64)], seed, steps=1)


def several(flux: Flux, prompt: str, size: tuple[int, int], seed: int) -> None:
    list(flux.pictures(Request(prompt=prompt, width=size[0], height=size[1], steps=1), [seed, seed + 1]))


def watch_steps(flux: Flux, prompt: str, size: tuple[int, int], seed: int) -> None:
    for step in flux.steps(Request(prompt=prompt, width=size[0], height=size[1], steps=2), seed):
        step.preview()
    step.image()


def break_off(flux: Flux, prompt: str, size: tuple[int, int], seed: int) -> None:
    for _ in flux.steps(Request(prompt=prompt, width=size[0], height=size[1]), seed):
        break


def cancel(flux: Flux, prompt: str, size: tuple[int, int], seed: int) -> None:
    with pytest.raises(Cancelled):
        flux.generate(prompt, *size, seed=seed, callback=lambda *step: False)


def refuse(flux: Flux, prompt: str, size: tuple[int, int], seed: int) -> None:
    with pytest.raises(UsageError):
        flux.generate(prompt, MAX_SIDE + size[0], seed=seed)


def tiles(flux: Flux, prompt: str, size: tuple[int, int], seed: int) -> None:
    flux.generate(prompt, 512, 64, steps=1, seed=seed, tile=384)


MODES: list[Callable[[Flux, str, tuple[int, int], int], None]] = [
    *(generate, paint_over, edit, several, watch_steps, break_off, cancel, refuse, tiles)
]


def work(flux: Flux, count: int) -> None:
    modes: Iterator = itertools.cycle(MODES)
    for i in range(count):
        # more prompts than are remembered
        next(modes)(flux, f"a red circle number {i % 40}", SIZES[i % len(SIZES)], i)


def state() -> tuple[int, int, int]:
    """Threads, open files, and bytes of memory that are no pages of files."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    anonymous = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), anonymous  # noqa: PTH208


def test_nothing_grows(demo, tmp_path):
    with fluxonnx.load(demo, cache_dir=tmp_path / "cache") as flux:
        work(flux, len(MODES) * 2)
        before = state()
        work(flux, PICTURES)
        after = state()
    assert after[:2] == before[:2]
    assert after[2] - before[2] < GROWTH, f"{before} -> {after}"
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_nothing_is_left_of_models_that_were_closed(demo):
    def open_and_close() -> None:
        with fluxonnx.load(demo) as flux:
            generate(flux, "a red circle", (64, 64), 1)

    open_and_close()
    before = state()
    for _ in range(max(3, PICTURES // 10)):
        open_and_close()
    after = state()
    assert after[:2] == before[:2]
    assert after[2] - before[2] < GROWTH, f"{before} -> {after}"
