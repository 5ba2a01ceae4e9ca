"""Whatever a person types: the session says a line, and goes on."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from fluxonnx.errors import UsageError
from fluxonnx.terminal.commands import COMMANDS, MODEL, Ended, known_names, obey
from fluxonnx.terminal.references import Made
from fluxonnx.terminal.session import Session
from fluxonnx.terminal.studio import Choice
from tests.fuzz.support import fuzzed

pytestmark = pytest.mark.slow

ODD = [
    *("", " ", "\0", "\ud800", "\x1b[31m", "'", '"', "\\", "~", "~nobody/x", "/dev/null", "/", ".", ".."),
    *("$1", "$0", "$9" * 30, "a" * 5000, "a/" * 5000, "none", "default", "on", "1 2 3", "512x512", "x", ":", "a:b"),
    *("1", "-1", "1e999", "nan", "9" * 5000, "\u00b2", "\u0663", "--steps", "-h", "%s", "{0}", "1,2,3,4"),
]


class Nothing:
    """A model, a bar and a plan that refuse to do anything."""

    choice = Choice()

    def refuse(self, *values: object, **named: object) -> None:
        raise UsageError("refused")

    change = use_loras = flux = refuse

    def close(self) -> None:
        pass


def session(tmp_path, said: list[str]) -> Session:
    nothing = Nothing()
    made = [Made(tmp_path / "gone.png", "a cat", 1, (64, 64))]
    return Session(
        plan=nothing.refuse, say=said.append, complain=said.append, bar=nothing, studio=nothing, made=made  # type: ignore[arg-type]
    )  # fmt: skip


# Commands that reach outside of the session: they have tests of their own.
OUTSIDE = ("open", "out", "save")
NAMES = [name for name in known_names() if name not in OUTSIDE]


@fuzzed(200)
@given(st.sampled_from(NAMES), st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=8)), max_size=3))
def test_commands(tmp_path_factory, name, words):
    said: list[str] = []
    try:
        obey(session(tmp_path_factory.getbasetemp(), said), f"!{name} {' '.join(words)}")
    except Ended:
        assert name == "quit"
    assert said or name == "quit"


@fuzzed(200)
@given(st.one_of(st.sampled_from(ODD), st.text()))
def test_lines(tmp_path_factory, line):
    said: list[str] = []
    try:
        obey(session(tmp_path_factory.getbasetemp(), said), line)
    except Ended:
        assert line.startswith("!q")
    assert said or not line.strip() or line.startswith("!q")


def test_all_commands_are_met():
    assert {*COMMANDS, *MODEL} - {*OUTSIDE} <= set(NAMES)
