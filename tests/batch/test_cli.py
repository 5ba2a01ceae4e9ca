"""`fluxonnx batch`: its flags, what it prints, how it goes on after it was killed or the disk was full, wrong usage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import batch as benchmark
from fluxonnx.batch.painter import close
from fluxonnx.cli import main
from fluxonnx.runtime.metadata import read_parameters
from tests.batch.support import table
from tests.support import Case

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
SMALL = ["-W", "64", "-H", "64", "-s", "1", "--threads", "1"]
ROWS = [{"prompt": "a"}, {"prompt": "b", "id": "second"}, {"prompt": "c", "seed": 7, "output": "deep/c.jpg"}]


@pytest.fixture
def batch(checkpoints, tmp_path, monkeypatch):
    """batch(*arguments): the exit code of the command with a small model."""
    monkeypatch.chdir(tmp_path)
    model = str(checkpoints.exported(CASE))
    yield lambda *arguments: main(["batch", "-d", model, *map(str, arguments)])
    close()


def picture(name: str) -> None:
    Image.new("RGB", (64, 64), "red").save(name)


def records(folder: str = "out") -> list[dict]:
    return [json.loads(line) for line in Path(folder, "pictures.jsonl").read_text().splitlines()]


def test_a_table_to_a_folder(batch, tmp_path, capsys, checkpoints):
    prompts = table(tmp_path, *ROWS)
    assert batch(prompts, "-o", "out", *SMALL) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        str(Path("out", name)) for name in ("000001.png", "second.png", "deep/c.jpg")
    ] + ["3 made, 0 were there, 0 failed"]
    assert [record["parameters"]["seed"] for record in records()][2] == 7
    for record in records():
        assert read_parameters(Path("out", record["file"]))["width"] == 64
    # the same by generate, and by two processes
    seed = str(records()[0]["seed"])
    model = str(checkpoints.exported(CASE))
    assert main(["generate", "-q", "-d", model, "-p", "a", *SMALL, "-S", seed, "-o", "one.png"]) == 0
    assert Path("one.png").read_bytes() == Path("out/000001.png").read_bytes()
    assert batch(prompts, "-o", "two", *SMALL, "--workers", "2", "-q") == 0
    assert {record["file"]: record["sha256"] for record in records("two")} == {
        record["file"]: record["sha256"] for record in records()
    }
    capsys.readouterr()
    assert batch(prompts, "-o", "out", *SMALL) == 0
    assert capsys.readouterr().err.splitlines()[0] == "3 of 3 pictures are there"


def test_flags_replace_the_values_of_each_row(batch, tmp_path):
    """Those, too, that a row can't have."""
    table(tmp_path, {"prompt": "a", "steps": 3, "width": 96, "sampler": "heun"}, "b")
    flags = ["--sigmas", "1", "0.5", "0", "-W", "64", "-H", "64", "--max-sequence-length", "32", "--threads", "1"]
    for workers in (1, 2):
        assert batch("prompts.jsonl", "-o", f"out{workers}", "-q", *flags, "--workers", workers) == 0
    first, second = (record["parameters"] for record in records("out1"))
    assert (first["sampler"], second["sampler"]) == ("heun", "euler")
    for found in (first, second):
        assert (found["width"], found["steps"], found["schedule"]) == (64, 2, "custom")
        assert found["max_sequence_length"] == 32
    assert [record["sha256"] for record in records("out1")] == [record["sha256"] for record in records("out2")]


def test_tables_of_all_kinds_make_the_same(batch, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table(tmp_path, {"prompt": "a"}, {"prompt": "b", "seed": 2**64 - 1, "strength": 0.5, "input": "in.png"})
    Path("prompts.csv").write_text(f"prompt,seed,strength,input\na,,,\nb,{2**64 - 1},0.5,in.png\n")
    columns = {
        "prompt": ["a", "b"],
        "seed": pyarrow.array([None, 2**64 - 1], pyarrow.uint64()),
        "strength": [None, 0.5],
        "input": [None, ["in.png"]],
    }
    parquet.write_table(pyarrow.table(columns), "prompts.parquet")
    picture("in.png")
    made = []
    for name in ("prompts.jsonl", "prompts.csv", "prompts.parquet"):
        assert batch(name, "-o", name.replace(".", "-"), *SMALL, "-q", "--parquet") == 0
        made.append([record["sha256"] for record in records(name.replace(".", "-"))])
    assert made[0] == made[1] == made[2]


def test_wrong_rows_are_counted(batch, tmp_path, fails, capsys):
    table(tmp_path, {"prompt": "a"}, {"prompt": "b", "nonsense": 1}, {"prompt": "c", "input": "absent.png"})
    assert batch("prompts.jsonl", "-o", "out", *SMALL) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "fluxonnx: 2 of 3 rows failed, out/pictures.jsonl says why; the first: prompts.jsonl, line 2 has an unknown key"
    )
    assert [record["error"] for record in records()][2] == "absent.png does not exist"
    picture("absent.png")
    assert batch("prompts.jsonl", "-o", "out", *SMALL) == 1
    assert "1 of 3 pictures are there" in capsys.readouterr().err
    assert [record["file"] for record in records()] == ["000001.png", None, "000003.png"]


@pytest.mark.skipif(os.name != "posix", reason="processes are killed otherwise there")
def test_killed_and_run_again(checkpoints, tmp_path):
    """Nothing is made twice, and no picture is half there."""
    prompts = table(tmp_path, *({"prompt": str(number)} for number in range(40)))
    model = str(checkpoints.exported(CASE))
    place = ["-d", model, "-o", str(tmp_path / "out")]
    command = [sys.executable, "-m", "fluxonnx", "batch", str(prompts), *place, *SMALL]
    with subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for _ in range(5):
            process.stderr.readline()
        process.send_signal(signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    assert 5 <= len(before) < 40
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    assert len(after) == 40
    # of the killed process, the one that was written and not yet in the table may be made again
    assert sum(after[path] != stamp for path, stamp in before.items()) <= 1
    found = records(str(tmp_path / "out"))
    assert [record["row"] for record in found] == list(range(1, 41))
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("code", "pattern", "arguments"),
    [
        (2, "prompt file absent.jsonl can't be read: No such file", ["absent.jsonl", "-o", "out"]),
        (2, "prompt file empty.jsonl holds no prompt", ["empty.jsonl", "-o", "out"]),
        (2, 'columns.csv, line 1 has no column "prompt"', ["columns.csv", "-o", "out"]),
        (2, 'unknown.csv, line 1 has an unknown column "colour"', ["unknown.csv", "-o", "out"]),
        (2, r"broken.parquet is not a whole Parquet file", ["broken.parquet", "-o", "out"]),
        (2, 'text.parquet has no column "prompt"', ["text.parquet", "-o", "out"]),
        (2, 'other.parquet has an unknown column "text"', ["other.parquet", "-o", "out"]),
        (2, "a.jsonl is a file: choose a folder", ["a.jsonl", "-o", "a.jsonl"]),
        (2, "is inside of .*a.jsonl, which is a file", ["a.jsonl", "-o", "a.jsonl/b/c"]),
        (2, "engine 'spark' is unknown: choose one of local, ray", ["a.jsonl", "-o", "out", "--engine", "spark"]),
        (2, "--address is where a cluster is", ["a.jsonl", "-o", "out", "--address", "auto"]),
        (2, "it is no address", ["a.jsonl", "-o", "out", "--engine", "ray", "--address", "x"]),
        (2, "workers is 0", ["a.jsonl", "-o", "out", "--workers", "0"]),
        (2, "threads is 0", ["a.jsonl", "-o", "out", "--threads", "0"]),
        (2, "seed is -1", ["a.jsonl", "-o", "out", "-S", "-1"]),
        (2, "format 'gif' is unknown", ["a.jsonl", "-o", "out", "--format", "gif"]),
        (2, "precision 'int3' is unknown", ["a.jsonl", "-o", "out", "--precision", "int3"]),
        (1, "nowhere", ["a.jsonl", "-o", "out", "-d", "nowhere"]),
        (1, "absent.safetensors does not exist", ["a.jsonl", "-o", "out", "--lora", "absent.safetensors"]),
    ],
)
def test_wrong_usage_makes_nothing(checkpoints, tmp_path, monkeypatch, fails, code, pattern, arguments):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("a\n")
    Path("empty.jsonl").write_text("\n\n")
    Path("columns.csv").write_text("seed\n5\n")
    Path("unknown.csv").write_text("prompt,colour\na,red\n")
    Path("broken.parquet").write_bytes(b"PAR1 and no more")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"seed": [1]}), "text.parquet")
    parquet.write_table(pyarrow.table({"prompt": ["a"], "text": [1]}), "other.parquet")
    before = sorted(tmp_path.rglob("*"))
    fails(code, pattern, "batch", "-q", "-d", checkpoints.exported(CASE), *arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_parquet_without_its_package(batch, tmp_path, monkeypatch, fails):
    table(tmp_path, "a")
    Path("a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for arguments in (["a.parquet", "-o", "out"], ["prompts.jsonl", "-o", "out", "--parquet", "-d", "nowhere"]):
        fails(2, r'pip install "fluxonnx\[parquet\]"', "batch", "-q", *arguments)
    assert not Path("out").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not possible here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_may_not_be_written(batch, small_disk, tmp_path, fails):
    prompts = table(tmp_path, "a")
    (small_disk / "out").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for folder in ("out", "new"):
        fails(
            1,
            f"no permission to write {small_disk}/{folder}.*or choose another",
            "batch",
            "-q",
            prompts,
            *("-o", small_disk / folder, *SMALL),
        )


def test_a_full_disk(batch, small_disk, tmp_path, capsys):
    prompts = table(tmp_path, *({"prompt": str(number)} for number in range(20)))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 80_000))
    assert batch(prompts, "-o", small_disk / "out", *SMALL) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fluxonnx")]
    assert len(errors) == 1
    assert "no space left to write" in errors[0]
    assert "run the same command again" in errors[0]
    made = len(list((small_disk / "out").glob("*.png")))
    assert 0 < made < 20
    filler.unlink()
    assert batch(prompts, "-o", small_disk / "out", *SMALL) == 0
    kept = int(capsys.readouterr().err.split(" ")[0])
    assert made - 1 <= kept <= made  # the last one may have no record
    assert len(records(str(small_disk / "out"))) == 20


def test_the_benchmark(checkpoints, capsys):
    arguments = ["-d", str(checkpoints.exported(CASE)), "--pictures", "2", "--steps", "1", "--repeat", "1"]
    assert benchmark.main([*arguments, "--workers", "1", "--commands", "0"]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in ("Flux.generate in a loop", "fluxonnx batch, 1 worker"))
    assert benchmark.main(["-d", "no/such/model"]) == 1
    assert "no/such/model" in capsys.readouterr().err
