"""The benchmark scripts run to the end and print their tables; never how fast."""

from __future__ import annotations

import sys

import pytest

from benchmarks import limits, session_options
from tests.conftest import Case

CASE = Case("odd-heads")


def test_limits(checkpoints, monkeypatch, capsys):
    sizes = ["--rows", "8", "--inner", "64", "--columns", "64", "--repeat", "1"]
    monkeypatch.setattr(sys, "argv", ["limits.py", *sizes, "-d", str(checkpoints.get(CASE)), "--size", "64"])
    assert limits.main() == 0
    printed = capsys.readouterr().out
    for product in ("float32", "uint8 x int8, packed", "MatMulNBits, 4 bits"):
        assert printed.count(f"| {product} ") == 2
    assert "GB/s" in printed


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_session_options(copy_of, monkeypatch, capsys, precision):
    arguments = ["-d", str(copy_of(CASE)), "--precision", precision, "--size", "64", "--repeat", "1"]
    monkeypatch.setattr(sys, "argv", ["session_options.py", *arguments])
    assert session_options.main() == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in session_options.VARIANTS)


def test_missing_model(monkeypatch, capsys):
    for script in (limits, session_options):
        monkeypatch.setattr(sys, "argv", ["script", "-d", "no/such/model", "--repeat", "1"])
        if script is limits:
            sys.argv += ["--rows", "1", "--inner", "64", "--columns", "8"]
        assert script.main() == 1
        assert "no/such/model" in capsys.readouterr().err
