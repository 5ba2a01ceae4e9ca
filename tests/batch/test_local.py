"""The engine of one machine: its processes, their threads, and what happens when one dies."""

from __future__ import annotations

import os

import pytest

from fluxonnx.batch.local import engine, share_of_cores
from fluxonnx.errors import UsageError
from fluxonnx.machine import usable_cores
from tests.batch.support import Mortal, drawn

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals differ")]


def rows(*prompts: str) -> list[dict]:
    return [{"row": number, "prompt": prompt, "seed": number} for number, prompt in enumerate(prompts, 1)]


def test_processes_divide_the_rows_and_the_cores(tmp_path):
    values = rows(*map(str, range(30)))
    results = list(engine(2)(Mortal(folder=str(tmp_path)), values))
    assert sorted(result["row"] for result in results) == list(range(1, 31))
    workers = {result["worker"] for result in results}
    assert {worker.split()[1] for worker in workers} == {str(max(1, usable_cores() // 2))}
    assert str(os.getpid()) not in {worker.split()[0] for worker in workers}
    for result in results:
        assert result["picture"] == drawn(values[result["row"] - 1])["picture"]


def test_a_worker_that_is_killed_costs_nothing(tmp_path):
    results = list(engine(2)(Mortal(folder=str(tmp_path)), rows("a", "kill once", "b", "c", "d")))
    assert sorted(result["row"] for result in results) == [1, 2, 3, 4, 5]
    assert not [result for result in results if result["error"]]


def test_a_row_that_kills_its_workers_is_given_up(tmp_path):
    painter = Mortal(folder=str(tmp_path))
    results = {result["row"]: result for result in engine(2)(painter, rows("a", "kill", "b", "exit", "c"))}
    assert results.keys() == {1, 2, 3, 4, 5}
    assert {row for row in results if results[row]["error"]} == {2, 4}
    assert "was killed (most likely because memory ran out)" in results[2]["error"]
    assert results[4]["error"] == "the worker that drew it ended with code 3, and so did the next one"


def test_an_engine_that_is_closed_ends_its_processes(tmp_path):
    running = engine(2)(Mortal(folder=str(tmp_path)), rows(*map(str, range(100))))
    pids = {int(next(running)["worker"].split()[0]) for _ in range(10)}
    running.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_numbers_of_workers(tmp_path):
    for workers in (0, -1, 5000):
        with pytest.raises(UsageError, match=f"^workers is {workers}"):
            engine(workers)
    assert share_of_cores(10_000) == 1
