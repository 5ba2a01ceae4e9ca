"""Random checkpoints, made once per test run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.make_checkpoint import ARCHITECTURES, make_checkpoint
from fluxonnx.cli import main
from fluxonnx.export import export


@dataclass(frozen=True)
class Case:
    """One random checkpoint: an architecture of `benchmarks/make_checkpoint.py` and how it is stored."""

    architecture: str
    dtype: str = "bf16"
    shards: int = 1
    is_distilled: bool = True

    @property
    def id(self) -> str:
        return f"{self.architecture}-{self.dtype}-{self.shards}"


class Checkpoints:
    """Makes checkpoints on demand and remembers them; tests must not change the ones they get from `get`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, case: Case) -> Path:
        """A checkpoint without graphs."""
        path = self._root / f"{case.id}-{case.is_distilled}"
        if not path.exists():
            make_checkpoint(
                path,
                ARCHITECTURES[case.architecture],
                dtype=case.dtype,
                shards=case.shards,
                is_distilled=case.is_distilled,
            )
        return path

    def exported(self, case: Case, precision: str = "bf16", flavour: str = "ort") -> Path:
        """A checkpoint with the graphs of one build beside its files."""
        path = self._root / f"{case.id}-{case.is_distilled}-exported"
        if not path.exists():
            shutil.copytree(self.get(case), path)
        export(path, precision=precision, flavour=flavour)
        return path


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
