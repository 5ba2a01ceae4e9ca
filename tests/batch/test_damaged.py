"""Damaged tables, in and out: the only outcomes are success and an error of ours."""

from __future__ import annotations

import io
import json

import pytest

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluxonnx.batch.making import make_pictures
from fluxonnx.batch.painter import Painter
from fluxonnx.batch.rows import read_rows
from fluxonnx.runtime.prompt_file import read_prompt_file
from tests.batch.support import Engine, plan
from tests.fuzz.support import damaged_bytes, damaged_json, fuzzed, only_our_errors

pytestmark = pytest.mark.slow

LINE = {"prompt": "a cat", "seed": 5, "id": "x", "output": "a.png", "input": ["b.png"], "strength": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


def parquet_file() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "seed": [1, 2], "input": [["x.png"], None]}), buffer)
    return buffer.getvalue()


def test_parquet(folder):
    path = folder / "prompts.parquet"

    @fuzzed(40)
    @given(content=damaged_bytes(parquet_file()))
    def run(content):
        path.write_bytes(content)
        with only_our_errors():
            assert all(isinstance(values["prompt"], str) for values in read_prompt_file(path))

    run()


@fuzzed(40)
@given(lines=st.lists(damaged_json(LINE) | st.text(max_size=30).map(str.encode), max_size=3))
def test_rows(folder, lines):
    path = folder / "prompts.jsonl"
    path.write_bytes(b"\n".join(lines))
    with only_our_errors():
        for row in read_rows(path, Painter()):
            assert (row.file is None) == (row.error is not None)
            json.dumps(dict(row.values), default=str)


RECORD = {"row": 1, "file": "000001.png", "sha256": "0" * 64, "digest": "1" * 64, "parameters": {}}


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(lines=st.lists(damaged_json(RECORD) | st.binary(max_size=30), max_size=3))
def test_tables_of_a_folder(folder, lines):
    """Whatever is in it, the pictures are made, and the table is whole."""
    out = folder / "out"
    out.mkdir(exist_ok=True)
    (out / "pictures.jsonl").write_bytes(b"\n".join(lines))
    summary = make_pictures(plan(folder, "one", "two"), out, Painter(), Engine())
    assert (summary.made + summary.kept, summary.failed) == (2, 0)
    assert [json.loads(line)["row"] for line in (out / "pictures.jsonl").read_text().splitlines()] == [1, 2]
