"""What the fuzz tests share: how long they run, and ways to damage JSON and bytes.

They are the same in each run. FLUXONNX_FUZZ_EXAMPLES=20000 makes that many new examples per test.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fluxonnx.errors import FluxonnxError

EXAMPLES = int(os.environ.get("FLUXONNX_FUZZ_EXAMPLES", 0))

# What a stranger may write where something else is expected.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**39, -(10**39), 10**4000, 1.5, -0.0, 1e308, 1e-320]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(["", "\0", "\ud800", "\udcff", "..", "/", "../../x", "/dev/zero", "\n\x1b[31m", "a" * 300, "BF16"]),
    st.sampled_from([[], {}, [[]], [{}], {"": {}}, [None], [0], [-1], [1.5], ["x"], [True], {"x": 5}, {"format": []}]),
    st.integers(),
    st.text(max_size=8),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=5
    ),
)
# Texts that a parser may choke on, in the place of a whole file.
ODD_TEXTS = st.sampled_from(
    [b"", b"null", b"[]", b"5", b'"x"', b"{", b"\xff\xfe{\0}\0", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\0"]
)


def fuzzed(examples: int) -> Callable[[Any], Any]:
    """Run a test over a number of examples."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def only_our_errors() -> Iterator[None]:
    """Pass over errors that are one short line of ours; all others fail the test."""
    message = "nothing"
    try:
        yield
    except FluxonnxError as error:
        message = str(error)
    assert 0 < len(message) < 2000


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of each value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


@st.composite
def damaged_json(draw: st.DrawFn, document: Any) -> bytes:
    """Draw a document with up to three values replaced, removed or renamed; sometimes something else altogether."""
    if draw(st.integers(0, 19)) == 0:
        return draw(ODD_TEXTS)
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([*places(document)] or [()]))
        if not path:
            break
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
        if action == "replace" or isinstance(parent, list):
            parent[path[-1]] = copy.deepcopy(draw(ODD))
        else:
            value = parent.pop(path[-1])
            if action == "rename":
                parent[draw(st.text(max_size=5))] = value
    return json.dumps(document).encode()


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw bytes with some changed, removed, inserted, repeated, or with the end cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        # most of what is parsed is at the start
        most = draw(st.sampled_from([8, 64, 512, len(data)]))
        at = draw(st.integers(0, max(0, min(most, len(data)) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 8, 100]))
        action = draw(st.sampled_from(["change", "change", "remove", "insert", "repeat", "zero", "ones", "cut"]))
        if action == "change":
            data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif action == "remove":
            del data[at : at + length]
        elif action == "insert":
            data[at:at] = draw(st.binary(max_size=length))
        elif action == "repeat":
            data[at:at] = data[at : at + length]
        elif action in ("zero", "ones"):
            data[at : at + length] = (b"\0" if action == "zero" else b"\xff") * length
        else:
            del data[at:]
    return bytes(data)
