"""Graphs and weight files are what they were: see `tests/digests.py` for what is compared, and how to update it."""

from __future__ import annotations

import json

import pytest

from fluxonnx.export.precisions import PRECISIONS
from tests.digests import ARCHITECTURES, GOLDEN, VARIANTS, digests

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("variant", "flavour"),
    [(variant, flavour) for variant in VARIANTS for flavour in PRECISIONS[variant.precision].flavours],
    ids=lambda value: getattr(value, "id", value),
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_builds_are_what_they_were(tmp_path, architecture, variant, flavour):
    found = digests(tmp_path, architecture, variant, flavour)
    expected = json.loads(GOLDEN.read_text("utf-8"))
    prefix = f"{architecture}/{variant.id}/{flavour}/"
    changed = {key for key in found if found[key] != expected.get(key)}
    missing = {key for key in expected if key.startswith(prefix) and key not in found}
    assert not changed | missing, "if this is meant, see it with tools/graph_diff.py and update the digests"
