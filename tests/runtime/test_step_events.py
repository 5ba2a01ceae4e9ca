"""What `Flux.pictures` tells of each step of a batch."""

from __future__ import annotations

import pytest

import fluxonnx
from fluxonnx.runtime.events import StepEnded
from fluxonnx.runtime.request import Request
from tests.support import Case

pytestmark = pytest.mark.slow


def test_previews_are_those_of_single_steps(checkpoints):
    """Picture by picture, as each is drawn alone."""
    request = Request(prompt="a cat", width=64, height=64, steps=3, sampler="heun")
    seen: list[tuple[int, int, bytes]] = []

    def watch(event: object) -> None:
        if isinstance(event, StepEnded):
            seen.extend((event.index, event.steps, event.preview(i).tobytes()) for i in range(event.count))

    with fluxonnx.load(checkpoints.exported(Case("odd-heads")), precision="bf16", threads=2, watch=watch) as flux:
        flux.run(request, [1, 2])
        alone = [[step.preview("fast").tobytes() for step in flux.steps(request, seed)] for seed in (1, 2)]
    # One at a time: two threads share few columns.
    assert [(index, steps) for index, steps, _ in seen] == [(1, 3), (2, 3), (3, 3)] * 2
    assert [data for _, _, data in seen] == [*alone[0], *alone[1]]
