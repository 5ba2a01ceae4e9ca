"""The pages about what can be relied on name tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = [
    pytest.param(page, file, test, id=f"{page.name}-{test}")
    for page in sorted((ROOT / "docs").glob("reliability*.md"))
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", page.read_text("utf-8"))
]


@pytest.mark.parametrize(("page", "file", "test"), NAMED)
def test_named_test_exists(page, file, test):
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, page
