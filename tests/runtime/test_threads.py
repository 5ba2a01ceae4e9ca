"""One model used by several threads: calls run one after the other, loops take turns, nothing waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

import fluxonnx
from fluxonnx.runtime.request import Request
from tests.support import Case

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
REQUEST = Request(prompt="a", width=64, height=64, steps=2)
# Far more than anything here takes; a test that gets there has found a deadlock.
FOREVER = 300


@pytest.fixture
def flux(checkpoints, engine):
    with fluxonnx.load(checkpoints.exported(CASE), engine=engine) as flux:
        yield flux


def by_call(flux, seed: int) -> bytes:
    return flux.generate("a", 64, 64, steps=2, seed=seed).tobytes()


def by_pictures(flux, seed: int) -> bytes:
    ((_, image),) = flux.pictures(REQUEST, [seed])
    return image.tobytes()


def by_steps(flux, seed: int) -> bytes:
    for step in flux.steps(REQUEST, seed):
        step.preview()
    return step.image().tobytes()


def by_ending_early(flux, seed: int) -> bytes:
    """Breaks out of a loop, encodes another prompt, and frees all memory before the picture."""
    for _ in flux.steps(REQUEST, seed):
        break
    flux.encode_prompts([f"another {seed}"])
    flux.close()
    return by_call(flux, seed)


def at_once(flux, *ways: Callable[..., bytes]) -> list[bytes]:
    """Run each way twice in a thread of its own, with the seed of its place; all start together."""
    start = threading.Barrier(len(ways))

    def work(way: Callable[..., bytes], seed: int) -> list[bytes]:
        start.wait(FOREVER)
        return [way(flux, seed), way(flux, seed)]

    with ThreadPoolExecutor(len(ways)) as pool:
        futures = [pool.submit(work, way, seed) for seed, way in enumerate(ways)]
        found = [future.result(FOREVER) for future in futures]
    assert all(first == second for first, second in found)
    return [first for first, _ in found]


def test_threads_get_the_pictures_that_they_get_alone(flux, engine):
    ways = (by_call, by_pictures, by_steps, by_ending_early)
    expected = [by_call(flux, seed) for seed in range(len(ways))]
    assert at_once(flux, *ways) == expected
    flux.close()
    assert engine.open == []


def test_calls_run_one_after_the_other(flux, engine):
    """So that two of them never need memory for two graphs."""
    at_once(flux, by_call, by_call, by_call)
    assert engine.most_open == 1


def test_a_picture_inside_a_loop_and_inside_a_callback(flux):
    expected = by_call(flux, 1)
    inside = [by_call(flux, 1) for _ in flux.steps(REQUEST, 2)]
    inside += [by_call(flux, 1) for _ in flux.pictures(REQUEST, [2, 3])]
    flux.generate("a", 64, 64, steps=2, callback=lambda *step: inside.append(by_call(flux, 1)))
    assert inside == [expected] * 6


def test_an_unfinished_loop_holds_nobody_up(flux):
    """Not even if another thread ends it."""
    steps = flux.steps(REQUEST, 2)
    next(steps)
    with ThreadPoolExecutor(1) as pool:
        assert len(pool.submit(by_call, flux, 1).result(FOREVER)) == 64 * 64 * 3
        pool.submit(steps.close).result(FOREVER)
    assert len(by_call(flux, 1)) == 64 * 64 * 3
