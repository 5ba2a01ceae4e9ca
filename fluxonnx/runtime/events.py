"""What can be watched inside a run: phases, calls of graphs, and the time of operators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class PhaseBegan:
    """A phase of a run began, or goes on after an inner one ended.

    Attributes:
        name: "encode prompt", say; "" when no phase is under way.
    """

    name: str


@dataclass(frozen=True)
class GraphRan:
    """A graph was run once.

    Attributes:
        component: Its name, a key of `contract.COMPONENTS`.
        inputs: By name; read-only for watchers.
        outputs: In the order of `contract.graph_ports`.
    """

    component: str
    inputs: dict[str, np.ndarray]
    outputs: list[np.ndarray]


@dataclass(frozen=True)
class Operator:
    """All nodes of one operator type in one graph.

    Attributes:
        type: "Gemm", say.
        calls: How often such nodes ran.
        seconds: How long they took together.
        share: Their part of the time of all nodes of the graph, in [0, 1].
    """

    type: str
    calls: int
    seconds: float
    share: float


@dataclass(frozen=True)
class OperatorsTimed:
    """A session that ran under the profiler was closed.

    Attributes:
        component: The name of its graph.
        operators: The operator types, the slowest first.
    """

    component: str
    operators: tuple[Operator, ...]


@dataclass(frozen=True)
class StepEnded:
    """A denoising step of the pictures that are made in one pass ended; `Flux.pictures` tells of it.

    Attributes:
        index: 1 after the first step.
        steps: How many there are.
        count: How many pictures are in the pass.
        preview: preview(i) draws a small version of the i-th of them as it is expected to be: RGB, see `Step.preview`.
            It may be called until the next step.
    """

    index: int
    steps: int
    count: int
    preview: Callable[[int], Image.Image]


Event = PhaseBegan | GraphRan | OperatorsTimed | StepEnded
Watch = Callable[[Event], None]


def ranked(times: Iterable[tuple[str, int, int]]) -> tuple[Operator, ...]:
    """Add up times by operator type.

    Args:
        times: Any number of (operator type, calls, microseconds).

    Returns:
        One entry per type, the slowest first.
    """
    calls: dict[str, int] = defaultdict(int)
    spent: dict[str, int] = defaultdict(int)
    for type, count, microseconds in times:
        calls[type] += count
        spent[type] += microseconds
    whole = sum(spent.values())
    rows = (Operator(type, calls[type], took / 1e6, took / whole if whole else 0.0) for type, took in spent.items())
    return tuple(sorted(rows, key=lambda row: (-row.seconds, row.type)))


def total(events: Iterable[Event]) -> dict[str, list[Operator]]:
    """Add up the times of all sessions of each graph; events of other kinds are skipped."""
    times: dict[str, list[tuple[str, int, int]]] = {}
    for event in events:
        if isinstance(event, OperatorsTimed):
            rows = [(row.type, row.calls, round(row.seconds * 1e6)) for row in event.operators]
            times.setdefault(event.component, []).extend(rows)
    return {component: list(ranked(rows)) for component, rows in times.items()}
