"""Random checkpoints, made once per test run, and a core of its own for each worker of a parallel run."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import pytest


def _pin(worker: str) -> None:
    """Keep a worker of `pytest -n N`, and the processes that it starts, on one core.

    Otherwise the libraries of each worker start a thread for every core, and the threads of all of them wait for each
    other.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Before the other imports: libraries count the cores when they are imported.
    _pin(os.environ["PYTEST_XDIST_WORKER"])

# No test asks a hub of others; those of downloads have a server of their own. Set before the client is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

from fluxonnx.cli import main  # noqa: E402
from tests.support import Case, Checkpoints  # noqa: E402

# Set in CI, where everything is installed: there a test of parity that is skipped has proven nothing, and so fails.
NO_SKIPPED_PARITY = bool(os.environ.get("FLUXONNX_NO_SKIPPED_PARITY"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and NO_SKIPPED_PARITY and item.get_closest_marker("parity"):
        report.outcome, report.longrepr = "failed", f"a parity test was skipped: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and NO_SKIPPED_PARITY:
        report.outcome, report.longrepr = "failed", f"a test file was skipped: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def copy_of(checkpoints: Checkpoints, tmp_path: Path) -> Callable[[Case], Path]:
    """A checkpoint that the test may damage."""

    def copy(case: Case) -> Path:
        return Path(shutil.copytree(checkpoints.get(case), tmp_path / "model"))

    return copy


@pytest.fixture
def fails(capsys):
    """fails(code, pattern, *arguments): the command ends with `code` and one line on standard error."""

    def fails(code: int, pattern: str, *arguments: object) -> None:
        assert main([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        line = captured.err.splitlines()[-1]
        assert re.fullmatch(rf"fluxonnx: .*{pattern}.*", line), line
        assert "Traceback" not in captured.err
        errors = [line for line in captured.err.splitlines() if line.startswith("fluxonnx:")]
        assert len(errors) == 1

    return fails
