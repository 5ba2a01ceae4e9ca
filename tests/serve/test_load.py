"""Many clients at once: nothing is lost, and memory stays flat; `benchmarks/server.py` does more of it."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette")

from benchmarks.server import load

pytestmark = pytest.mark.slow

CLIENTS, PICTURES = 10, 30
# Megabytes that caches take until they are full.
CACHES = 30


def test_many_clients_at_once(model):
    found = load(CLIENTS, PICTURES, 64, 1, model)
    assert found["failures"] == []
    assert [found[name] for name in ("whole", "jobs", "files", "listed")] == [PICTURES] * 4
    assert found["exit"] == 0
    assert found["memory at end"] < found["memory at start"] + CACHES
