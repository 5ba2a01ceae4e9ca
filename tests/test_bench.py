"""`fluxonnx bench`: the figures that it prints and writes, and its errors; never the values of the figures."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest

from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.cli import main
from fluxonnx.errors import FluxonnxError
from fluxonnx.measure import picture, process, speed
from tests.support import Case

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
PHASES = ["encode prompt", "load transformer", "denoise", "decode"]
HAS_PROC = process.resident() is not None


@pytest.fixture
def model(checkpoints) -> str:
    return str(checkpoints.exported(CASE))


def cells(text: str) -> list[list[str]]:
    """The cells of every row of every Markdown table in a text."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_all_combinations_are_measured(model, tmp_path, capsys):
    path = tmp_path / "bench.json"
    varied = ["--size", "64", "96x64", "--precision", "bf16", "fp32", "--threads", "1"]
    assert main(["bench", "-d", model, *varied, "--steps", "3", "--repeat", "2", "--json", str(path), "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    found = json.loads(path.read_text())
    assert found["steps"] == 3
    assert found["repeat"] == 2
    assert found["prompt"] == speed.PROMPT
    assert {"processor", "cores", "onnxruntime", "fluxonnx"} <= found["machine"].keys()
    assert [result["configuration"] for result in found["results"]] == [
        {"width": width, "height": 64, "precision": precision, "threads": 1, "provider": "cpu"}
        for width in (64, 96)
        for precision in ("bf16", "fp32")
    ]
    for result in found["results"]:
        assert result["error"] is None
        assert result["profile"] is None
        assert list(result["phases"]) == PHASES
        assert [len(run["steps"]) for run in result["runs"]] == [2, 2]
        assert result["step_seconds"] > 0
        assert result["seconds"] > 0
        for values in result["phases"].values():
            assert values["seconds"] >= 0
            assert (values["anonymous_gb"] is not None) == (values["mapped_gb"] is not None) == HAS_PROC
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_table(model, capsys):
    assert main(["bench", "-d", model, "--size", "64"]) == 0
    captured = capsys.readouterr()
    header, _, *rows = cells(captured.out)
    assert header == ["size", "precision", "threads", "provider", "phase", "seconds", "anonymous GB", "mapped GB"]
    assert [row[:5] for row in rows] == [
        ["64x64", "bf16", "all", "cpu", phase] for phase in [*PHASES, "one step (median after the first)", "total"]
    ]
    for row in rows[: len(PHASES)]:
        assert re.fullmatch(r"[\d.]+", row[5])
        assert all(re.fullmatch(r"\d+\.\d\d" if HAS_PROC else "", cell) for cell in row[6:])
    assert "64x64, bf16: run 1 of 1" in captured.err


def test_one_step_has_no_median_after_the_first(model, capsys):
    assert main(["bench", "-d", model, "--size", "64", "--steps", "1", "-p", "a cat"]) == 0
    assert [row[4] for row in cells(capsys.readouterr().out)[2:]] == [*PHASES, "total"]


def test_low_memory(model, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert main(["bench", "-d", model, "--size", "64", "--steps", "1", "--low-memory", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["low_memory"] is True
    assert capsys.readouterr().out.splitlines()[0].endswith(", with --low-memory")


def test_profile(model, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert main(["bench", "-d", model, "--size", "64", "--steps", "2", "--profile", "--json", str(path)]) == 0
    rows = cells(capsys.readouterr().out)
    rows = rows[rows.index(["graph", "operator", "calls", "ms", "share"]) + 2 :]
    graphs = {"text_encoder", "conditioning", "transformer", "vae_decoder"}
    assert {row[0] for row in rows} == graphs
    for graph in graphs:
        # each share is rounded to 0.1 %
        assert sum(float(row[4].rstrip("%")) for row in rows if row[0] == graph) == pytest.approx(100, abs=1)

    found = json.loads(path.read_text())["results"][0]["profile"]
    assert found.keys() == graphs
    attention = {row["type"]: row["calls"] for row in found["transformer"]}["MultiHeadAttention"]
    blocks = 2 + 2  # odd-heads: two of each kind
    assert attention == 2 * blocks
    for operators in found.values():
        assert sum(row["share"] for row in operators) == pytest.approx(1)
        seconds = [row["seconds"] for row in operators]
        assert seconds == sorted(seconds, reverse=True)


def test_export_is_measured(copy_of, capsys):
    root = copy_of(CASE)
    assert main(["bench", "-d", str(root), "--size", "64", "--steps", "1", "--export"]) == 0
    assert capsys.readouterr().out.count("| bf16") == 1 + len(PHASES) + 1  # with the export and the total
    assert (root / "transformer.onnx").exists()


def test_base_models_have_their_own_steps(checkpoints, tmp_path):
    path = tmp_path / "bench.json"
    model = checkpoints.exported(Case("odd-heads", is_distilled=False))
    assert main(["bench", "-q", "-d", str(model), "--size", "64", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["steps"] == 50


def test_a_configuration_that_fails_does_not_end_the_others(copy_of, tmp_path, capsys):
    root = copy_of(CASE)
    for precision in ("bf16", "fp32"):
        assert main(["export", "-q", "-d", str(root), "--precision", precision]) == 0
    (root / "transformer.onnx").write_bytes(b"not a graph")
    manifest = read_manifest(root)
    manifest.builds["bf16"].components["transformer"].files = {}  # so that the damage is noticed only when it is opened
    manifest.save(root)
    path = tmp_path / "bench.json"
    varied = ["--size", "64", "--precision", "bf16", "fp32", "--repeat", "2", "--json", str(path)]
    assert main(["bench", "-d", str(root), "--steps", "2", *varied]) == 1
    captured = capsys.readouterr()
    assert re.search(
        r"^fluxonnx: 1 of 2 configurations failed: 64x64, bf16: .*transformer\.onnx can't be loaded.*$",
        captured.err,
        re.MULTILINE,
    )
    assert "Traceback" not in captured.err
    rows = cells(captured.out)[2:]
    assert [row[4] for row in rows if row[1] == "bf16"] == ["failed"]
    assert [row[4] for row in rows if row[1] == "fp32"][:4] == PHASES
    broken, good = json.loads(path.read_text())["results"]
    assert "can't be loaded" in broken["error"]
    assert broken["runs"] == []
    assert len(good["runs"]) == 2


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--size", "big"], "size 'big' is not a size: write 256, or 256x512"),
        (["--size", "64x64x64"], "is not a size"),
        (["--size=-64x64"], "is not a size"),
        (["--size", "100"], "100x100 can't be drawn.*the nearest with this ratio is width 96"),
        (["--size", "64x5008"], "64x5008 can't be drawn"),
        (["--threads", "0"], "threads is 0"),
        (["--threads", "1", "-2"], "threads is -2"),
        (["--precision", "bf16", "fp7"], "precision 'fp7' is unknown: choose one of bf16"),
        (["--repeat", "0"], "repeat is 0"),
        (["--steps", "0"], "steps is 0"),
        (["--prompt", " "], "the prompt is empty"),
        (["--json", "no/such/folder/a.json"], "does not exist: create it, or choose another with --json"),
        (["--json", "."], "is a folder: choose a file name for --json"),
    ],
)
def test_usage_errors_exit_with_2(model, fails, arguments, pattern):
    fails(2, pattern, "bench", "-d", model, *arguments)


def test_missing_model(fails, tmp_path):
    fails(1, "does not exist", "bench", "-d", tmp_path / "no")


def test_memory_columns_are_empty_where_the_system_does_not_report_it(model):
    run = picture.measure_picture(model, 64, 64, 1, "a cat", precision="bf16", read=lambda process: None)
    result = speed.Result(speed.Configuration(64, 64, "bf16", None), [run])
    assert {row[4]: row[6:] for row in speed.result_rows(result)} == {phase: ["", ""] for phase in [*PHASES, "total"]}


def test_memory_belongs_to_the_phase_in_which_it_was_read():
    readings = iter([(1.0, 1.0), (1.0, 1.0), (3.0, 2.0), (3.0, 2.0), (2.0, 5.0), (2.0, 5.0)])
    memory = process.PeakMemory(lambda process: next(readings))
    for phase in ("encode", "decode", ""):
        memory.begin(phase)
    assert memory.of("encode") == (3.0, 2.0)
    assert memory.of("decode") == (3.0, 5.0)
    assert memory.of("nothing") is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "it was killed, most likely because memory ran out"),
        ("import os; os.kill(os.getpid(), 6)", "it ended with code -6"),
        ("import sys; print('a'); print('b', file=sys.stderr); sys.exit(3)", "b"),
        ("raise SystemExit(4)", "it ended with code 4"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_programs_that_fail(code, reason):
    with pytest.raises(FluxonnxError, match=f"^{reason}$"):
        process.run_program([sys.executable, "-c", code])


def test_program_that_does_not_exist(tmp_path):
    with pytest.raises(FluxonnxError, match="can't be started: No such file"):
        process.run_program([str(tmp_path / "no")])


def test_program_that_ends_well():
    done = process.run_program([sys.executable, "-c", "print('out' * 100000)"])
    assert done.output == "out" * 100000 + "\n"
    assert done.messages == ""


# Ends when something is written to the pipe that its argument names, so that its memory is read before.
WAITING = "import os, sys; print(os.getpid(), open(sys.argv[1]).read())"


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes")
def test_memory_of_a_program_is_its_peak(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    readings = iter([(1.0, 4.0), (3.0, 1.0), (2.0, 1.0)])
    numbers: set[int | str] = set()

    def read(number: int | str) -> process.Memory:
        numbers.add(number)
        reading = next(readings, None)
        if reading == (2.0, 1.0):
            pipe.write_text("go")
        return reading

    done = process.run_program([sys.executable, "-c", WAITING, str(pipe)], read=read)
    assert done.output.split() == [*map(str, numbers), "go"]
    assert (done.anonymous, done.resident) == (3.0, 5.0)


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes")
def test_memory_of_a_program_is_read(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    readings: list[process.Memory] = []

    def read(number: int | str) -> process.Memory:
        readings.append(process.resident(number))
        if len(readings) == 1:
            pipe.write_text("go")
        return readings[-1]

    done = process.run_program([sys.executable, "-c", WAITING, str(pipe)], read=read)
    assert (done.anonymous is not None) == (done.resident is not None) == HAS_PROC


def test_memory_of_a_program_is_unknown_where_the_system_does_not_report_it():
    done = process.run_program([sys.executable, "-c", ""], read=lambda process: None)
    assert (done.anonymous, done.resident) == (None, None)
