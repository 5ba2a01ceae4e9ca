"""The other benchmark scripts run and print their tables; never the values of the figures."""

from __future__ import annotations

import pytest

from benchmarks import limits, session_options
from tests.support import Case

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")


def test_limits(checkpoints, capsys):
    sizes = ["--rows", "8", "--inner", "64", "--columns", "64", "--repeat", "1"]
    assert limits.main([*sizes, "-d", str(checkpoints.get(CASE)), "--size", "64"]) == 0
    printed = capsys.readouterr().out
    for product in ("float32", "uint8 x int8, in panels", "uint8 x int8, packed", "MatMulNBits, 4 bits"):
        assert printed.count(f"| {product} ") == 2
    assert "GB/s" in printed


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_session_options(copy_of, capsys, precision):
    arguments = ["-d", str(copy_of(CASE)), "--precision", precision, "--size", "64", "--repeat", "1"]
    assert session_options.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in session_options.VARIANTS)


@pytest.mark.parametrize(
    ("script", "sizes"), [(limits, ["--rows", "1", "--inner", "64", "--columns", "8"]), (session_options, [])]
)
def test_missing_model(capsys, script, sizes):
    assert script.main(["-d", "no/such/model", "--repeat", "1", *sizes]) == 1
    assert "no/such/model" in capsys.readouterr().err


@pytest.mark.parametrize("script", [limits, session_options])
def test_no_rounds(capsys, script):
    with pytest.raises(SystemExit, match="2"):
        script.main(["-d", "no/such/model", "--repeat", "0"])
    assert "--repeat: must be at least 1" in capsys.readouterr().err
