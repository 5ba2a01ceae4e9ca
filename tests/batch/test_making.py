"""A folder of pictures and its table: what is made, what is kept, and what a killed or a second process leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fluxonnx.batch.making import make_pictures
from fluxonnx.batch.painter import Painter
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.files import exclusive
from tests.batch.support import Engine, drawn, plan

ROWS = [{"prompt": "one"}, {"prompt": "two", "id": "b"}, {"prompt": "three", "output": "sub/c.png", "seed": 5}]


def make(folder: Path, rows, engine=None, **options):
    return make_pictures(rows, folder / "out", Painter(), engine or Engine(), **options)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out/pictures.jsonl").read_text().splitlines()]


def test_pictures_and_their_table(tmp_path):
    rows = plan(tmp_path, *ROWS)
    summary = make(tmp_path, rows)
    assert (summary.rows, summary.made, summary.kept, summary.failed) == (3, 3, 0, 0)
    found = records(tmp_path)
    assert [record["file"] for record in found] == ["000001.png", "b.png", "sub/c.png"]
    assert [record["id"] for record in found] == [None, "b", None]
    assert found[2]["seed"] == 5
    for record, row in zip(found, rows, strict=True):
        expected = drawn(row.values)
        assert (tmp_path / "out" / record["file"]).read_bytes() == expected["picture"]
        assert record["sha256"] == expected["sha256"]
        assert record["parameters"] == json.loads(expected["parameters"])
        assert (record["prompt"], record["seconds"], record["worker"]) == (row.values["prompt"], 0.5, "host:1")
        assert record["error"] is None
    assert not list((tmp_path / "out").rglob(".*"))


def test_what_is_there_and_whole_is_not_made_again(tmp_path):
    make(tmp_path, plan(tmp_path, *ROWS))
    engine = Engine()
    summary = make(tmp_path, plan(tmp_path, *ROWS), engine)
    assert (summary.made, summary.kept, engine.asked) == (0, 3, [])
    before = records(tmp_path)
    (tmp_path / "out/b.png").write_bytes(b"half a pic")
    (tmp_path / "out/000001.png").unlink()
    summary = make(tmp_path, plan(tmp_path, *ROWS), engine)
    assert (summary.made, summary.kept, engine.asked) == (2, 1, [1, 2])
    assert records(tmp_path) == before
    make(tmp_path, plan(tmp_path, *ROWS), engine, again=True)
    assert engine.asked == [1, 2, 1, 2, 3]


@pytest.mark.parametrize("change", [{"prompt": "another"}, {"seed": 9}, {"steps": 2}, {"width": 64}, {"strength": 0.5}])
def test_changed_rows_are_made_again(tmp_path, change):
    make(tmp_path, plan(tmp_path, *ROWS))
    engine = Engine()
    summary = make(tmp_path, plan(tmp_path, ROWS[0], ROWS[1] | change, ROWS[2]), engine)
    assert (summary.made, summary.kept, summary.changed, engine.asked) == (1, 2, 1, [2])


def test_changed_settings_and_inputs_are_noticed(tmp_path):
    def asked(**options) -> list[int]:
        engine = Engine()
        make(tmp_path, plan(tmp_path, *rows, **options), engine)
        return engine.asked

    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 64), "red").save(photo)
    rows = [{"prompt": "one", "seed": 1}, {"prompt": "two", "input": str(photo)}]
    assert asked() == [1, 2]
    assert asked() == []
    assert asked(seed=1) == [2]  # the first has a seed of its own
    assert asked(seed=1, painter=Painter(precision="int8")) == [1, 2]
    assert asked(seed=1, painter=Painter(precision="int8", threads=7, keep_loaded=True)) == []
    assert asked(seed=1, painter=Painter(precision="int8"), flags={"steps": 3}) == [1, 2]
    Image.new("RGB", (64, 64), "blue").save(photo)
    assert asked(seed=1, painter=Painter(precision="int8"), flags={"steps": 3}) == [2]


def test_weights_of_another_model_are_noticed(tmp_path):
    weights = tmp_path / "model/transformer/a.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"one")
    digest = plan(tmp_path, "a", painter=Painter(str(tmp_path / "model")))[0].digest
    (tmp_path / "model").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "model")
    assert plan(tmp_path, "a", painter=Painter(str(tmp_path / "model")))[0].digest == digest
    weights.write_bytes(b"two")
    assert plan(tmp_path, "a", painter=Painter(str(tmp_path / "model")))[0].digest != digest


def test_wrong_rows_stop_no_others(tmp_path):
    rows = plan(
        tmp_path,
        "one",
        '{"prompt": "x", "nonsense": 1}',
        "a bad one",
        {"prompt": "y", "id": "../z"},
        {"prompt": "y", "output": "/etc/z.png"},
        {"prompt": "y", "output": "z.txt"},
        {"prompt": "y", "id": "000001"},
        {"prompt": "y", "seed": -1},
        '{"prompt": ',
        "last",
    )
    summary = make(tmp_path, rows)
    assert (summary.made, summary.failed) == (2, 8)
    assert summary.first_error.startswith("prompts.jsonl, line 2 has an unknown key") or "line 2" in summary.first_error
    found = records(tmp_path)
    assert [bool(record["error"]) for record in found] == [False, *[True] * 8, False]
    assert found[2]["error"] == "it is bad"
    for record, words in zip(
        found[3:8], ["can't be the name", "inside the folder", "end in", "line 1", "seed"], strict=True
    ):
        assert words in record["error"]
    assert {record["file"] for record in found} == {"000001.png", "000010.png", None}
    engine = Engine()
    assert make(tmp_path, rows, engine).failed == 8
    assert engine.asked == [3]  # what failed is tried again


def test_a_row_that_comes_twice_or_never(tmp_path):
    def engine(painter, values):
        yield drawn(values[0])
        yield {**drawn(values[0]), "worker": "another"}
        yield {**drawn(values[1]), "sha256": "of other bytes"}

    seen = []
    summary = make(tmp_path, plan(tmp_path, *ROWS), engine, watch=lambda row, result: seen.append(row.number))
    assert seen == [1, 2, 3]
    assert (summary.made, summary.failed) == (1, 2)
    assert [record["error"] for record in records(tmp_path)][1:] == [
        "its bytes were damaged on their way: run the same command again",
        "the engine returned nothing for it: run the same command again",
    ]


def test_an_engine_that_fails_keeps_what_was_made(tmp_path):
    def engine(painter, values):
        yield drawn(values[0])
        raise FluxonnxError("the cluster is gone")

    with pytest.raises(FluxonnxError, match="gone"):
        make(tmp_path, plan(tmp_path, *ROWS), engine)
    other = Engine()
    assert make(tmp_path, plan(tmp_path, *ROWS), other).kept == 1
    assert other.asked == [2, 3]


def test_a_name_that_no_file_can_have(tmp_path):
    rows = plan(tmp_path, "one", {"prompt": "x", "id": "x" * 300}, {"prompt": "y", "output": "000001.png/y.png"})
    assert make(tmp_path, rows).failed == 2
    assert [bool(record["error"]) for record in records(tmp_path)] == [False, True, True]


# Folders


def test_pictures_of_others_are_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/000001.png").write_bytes(b"a photo")
    with pytest.raises(UsageError, match=r"holds 000001\.png, and no pictures\.jsonl"):
        make(tmp_path, plan(tmp_path, *ROWS))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["000001.png"]


def test_folders_that_are_none(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UsageError, match="is a file"):
        make(tmp_path, plan(tmp_path, *ROWS))
    with pytest.raises(UsageError, match=r"is inside of .*out, which is a file"):
        make_pictures(plan(tmp_path, *ROWS), tmp_path / "out/deep", Painter(), Engine())
    with pytest.raises(UsageError, match="can't be the name"):
        make_pictures(plan(tmp_path, *ROWS), tmp_path / "a\0b", Painter(), Engine())


LOCKED = """
import sys
from pathlib import Path
from fluxonnx.files import exclusive
with exclusive(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="locks differ")
def test_two_processes_on_one_folder(tmp_path):
    make(tmp_path, plan(tmp_path, *ROWS[:1]))
    command = [sys.executable, "-c", LOCKED, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(FluxonnxError, match="another process is making pictures"):
            make(tmp_path, plan(tmp_path, *ROWS))
        other.communicate()
    assert make(tmp_path, plan(tmp_path, *ROWS)).made == 2


def test_a_folder_may_be_locked_by_its_own_process(tmp_path):
    (tmp_path / "out").mkdir()
    with exclusive(tmp_path / "out"):
        assert make(tmp_path, plan(tmp_path, *ROWS)).made == 3


# Tables


@pytest.mark.parametrize("end", [b'{"row": 9, "file": "b', b"\xff\xfe", b'{"row": 1, "file": "000001.png"'])
def test_half_a_line_is_cut_off(tmp_path, end):
    make(tmp_path, plan(tmp_path, *ROWS[:2]))
    table = tmp_path / "out/pictures.jsonl"
    table.write_bytes(table.read_bytes() + end)
    engine = Engine()
    make(tmp_path, plan(tmp_path, *ROWS), engine)
    assert engine.asked == [3]
    assert len(records(tmp_path)) == 3


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"null",
        b"no JSON",
        b"{}",
        b'{"file": 5, "sha256": [], "digest": {}}',
        b"[" * 1000,
        b'{"file": "000001.png"}',
    ],
)
def test_lines_of_others_are_ignored(tmp_path, line):
    make(tmp_path, plan(tmp_path, *ROWS[:2]))
    table = tmp_path / "out/pictures.jsonl"
    table.write_bytes(line + b"\n" + table.read_bytes())
    engine = Engine()
    make(tmp_path, plan(tmp_path, *ROWS[:2]), engine)
    assert engine.asked == []
    assert len(records(tmp_path)) == 2


def test_something_else_of_the_tables_name(tmp_path):
    (tmp_path / "out/pictures.jsonl").mkdir(parents=True)
    with pytest.raises(FluxonnxError, match=r"can't write .*pictures\.jsonl"):
        make(tmp_path, plan(tmp_path, *ROWS))


def test_a_table_in_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    high = {"prompt": "x", "seed": 2**64 - 1}
    summary = make(tmp_path, plan(tmp_path, "a bad one", high, '{"prompt": 5}'), parquet=True)
    assert summary.files[1] == tmp_path / "out/pictures.parquet"
    found = parquet.read_table(summary.files[1]).to_pylist()
    lines = records(tmp_path)
    for record in lines:
        record["parameters"] = json.dumps(record["parameters"]) if record["parameters"] else None
    assert found == lines
    assert found[1]["seed"] == 2**64 - 1
