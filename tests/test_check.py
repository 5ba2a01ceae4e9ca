"""`fluxonnx check`: whatever state a directory is in, each check says what is wrong and what to do, in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fluxonnx.check import report as reports
from fluxonnx.check import tokenizer
from fluxonnx.check.findings import FAILED, OK, SKIPPED, WARNING, Finding, examined
from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.safetensors import read_header
from fluxonnx.cli import main
from fluxonnx.contract import GRAPH_FORMAT
from fluxonnx.errors import CheckpointError
from fluxonnx.export import export
from tests.support import Case, aged
from tools.make_checkpoint import write_json

TINY = Path(__file__).parent.parent / "models/tiny-klein"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SHARDED = Case("odd-heads", shards=2)
SMALLEST = Case("tiny-random")
EXAMPLES = int(os.environ.get("FLUXONNX_FUZZ_EXAMPLES", "8"))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """The bundled model, without graphs."""
    root = tmp_path_factory.mktemp("check") / "model"
    shutil.copytree(TINY, root, ignore=shutil.ignore_patterns("training", "*.png", "*.onnx"))
    return root


@pytest.fixture(scope="module")
def built(pristine, tmp_path_factory) -> Path:
    """The same with two builds, of which one has weights of its own."""
    root = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("built") / "model"))
    for precision in ("bf16", "int4"):
        export(root, precision=precision)
    return root


@pytest.fixture
def copy(tmp_path) -> Callable[[Path], Path]:
    return lambda root: Path(shutil.copytree(root, tmp_path / "model"))


def check(root: Path, **plan: bool) -> list[Finding]:
    return reports.run(reports.Plan(root, **plan)).findings


def rewrite(path: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def write_values(root: Path, part: str, name: str, value: float, count: int = 1) -> None:
    """Overwrite values in the middle of a tensor of bf16."""
    tensor = Checkpoint(root).tensors(part)[name]
    start = tensor.offset + tensor.nbytes // 4 * 2
    raw = np.full(count, value, np.float32).view(np.uint32) >> 16

    def change(content: bytearray) -> None:
        content[start : start + 2 * count] = raw.astype("<u2").tobytes()

    rewrite(tensor.file, change)


def found(findings: list[Finding], state: str, subject: str) -> Iterator[str]:
    return (finding.text for finding in findings if (finding.state, finding.subject) == (state, subject))


def test_bundled_model_is_good(pristine):
    """It is trained, of no known model, with a vocabulary of its own; nothing is written."""
    before = sorted(pristine.rglob("*"))
    report = reports.run(reports.Plan(pristine))
    assert not report.failed
    assert {finding.state for finding in report.findings} == {OK, SKIPPED}
    weights = [finding for finding in report.findings if finding.subject == "weights"]
    assert [finding.state for finding in weights] == [OK] * 3
    assert all(finding.figures["values"] == finding.figures["values_read"] for finding in weights)
    for subject, words in (("configs", "no model that is known"), ("tokenizer", "of its own"), ("picture", "no pict")):
        assert any(words in text for text in found(report.findings, SKIPPED, subject)), subject
    assert sorted(pristine.rglob("*")) == before


def test_random_weights_are_a_warning(checkpoints):
    """A directory of shards is whole, but its values were drawn independently."""
    findings = check(checkpoints.get(SHARDED), whole=True)
    assert not any(finding.state == FAILED for finding in findings)
    texts = list(found(findings, WARNING, "weights"))
    assert len(texts) == 3
    assert all("these look like random weights" in text for text in texts)
    assert any("2 files" in text for text in found(findings, OK, "files"))


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated": (lambda root: os.truncate(root / WEIGHTS, 5_000_000), "files", "is truncated"),
    "bytes too many": (
        lambda root: rewrite(root / WEIGHTS, lambda content: content.extend(b"12345678")),
        "files",
        "its tensors end at",
    ),
    "missing weights": (lambda root: (root / WEIGHTS).unlink(), "files", "holds no weights"),
    "git-lfs pointer": (
        lambda root: (root / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "files",
        "git lfs pull",
    ),
    "folder in place of a file": (
        lambda root: ((root / WEIGHTS).unlink(), (root / WEIGHTS).mkdir()),
        "files",
        "can't be read",
    ),
    "parts of another model": (
        lambda root: shutil.copy(TINY / "vae/diffusion_pytorch_model.safetensors", root / WEIGHTS),
        "files",
        "holds an autoencoder",
    ),
    "no index": (lambda root: (root / "model_index.json").unlink(), "files", "model_index.json is missing"),
    "another pipeline": (
        lambda root: write_json(root / "model_index.json", {"_class_name": "StableDiffusionPipeline"}),
        "files",
        "but fluxonnx runs",
    ),
    "config is no JSON": (lambda root: (root / "vae/config.json").write_text("{"), "configs", "not valid JSON"),
    "NaN": (
        lambda root: write_values(root, "transformer", "transformer_blocks.0.attn.to_q.weight", np.nan),
        "weights",
        "1 values that are NaN",
    ),
    "flipped exponent": (
        lambda root: write_values(root, "vae", "decoder.conv_in.weight", 1e30),
        "weights",
        "holds a value of 1e\\+30",
    ),
    "zeros": (
        lambda root: write_values(root, "text_encoder", "model.layers.0.mlp.up_proj.weight", 0, 256 * 64),
        "weights",
        "128 rows that are all zero",
    ),
    "tokenizer cut short": (
        lambda root: os.truncate(root / "tokenizer/tokenizer.json", 900),
        "tokenizer",
        "is not a tokenizer",
    ),
    "manifest": (lambda root: (root / "fluxonnx.json").write_text("{"), "builds", "export again with --force"),
    "manifest of nothing": (
        lambda root: (root / "fluxonnx.json").write_text('{"format_version": 1, "builds": {"a": 3}}'),
        "builds",
        "is corrupt",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(pristine, copy, damage):
    """Exactly one check tells of it, and says what to do; the others go on."""
    harm, subject, words = DAMAGES[damage]
    root = copy(pristine)
    harm(root)
    findings = check(root)
    wrong = [finding for finding in findings if finding.state in (FAILED, WARNING)]
    assert {finding.subject for finding in wrong} == {subject}
    assert len(wrong) == 1
    assert words.replace("\\", "") in wrong[0].text
    assert ": " in wrong[0].text
    assert wrong[0].state == (WARNING if damage == "zeros" else FAILED)
    assert {finding.subject for finding in findings} >= {"files", "configs", "tokenizer", "weights", "builds"}


def test_missing_shard(copy_of):
    root = copy_of(SHARDED)
    (root / "text_encoder/model-00002-of-00002.safetensors").unlink()
    (text,) = found(check(root), FAILED, "files")
    assert "model-00002-of-00002.safetensors is missing" in text


def test_empty_folder(tmp_path):
    """Every check says that its files are missing."""
    report = reports.run(reports.Plan(tmp_path))
    assert report.failed
    texts = [finding.text for finding in report.findings if finding.state == FAILED]
    assert len(texts) == 6
    assert all("missing" in text or "no weights" in text for text in texts)


def test_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        reports.run(reports.Plan(tmp_path / "none"))


def test_a_check_that_fails_itself_is_a_finding():
    def check() -> Iterator[Finding]:
        yield Finding(OK, "files", "first")
        raise ZeroDivisionError("of\nthis")

    first, second = examined("files", check)
    assert first.state == OK
    assert second == Finding(FAILED, "files", "this check failed itself, please report it: ZeroDivisionError: of this")
    (third,) = examined("files", lambda: Path("/no/such/file").read_text())  # type: ignore[arg-type]
    assert third.text == "/no/such/file can't be read: No such file or directory"


def own_ids(root: Path) -> dict:
    """Golden ids that the tokenizer of `root` itself gives."""
    golden = tokenizer.known()
    loaded = tokenizer.Tokenizer(root / "tokenizer")
    for item in golden["prompts"]:
        tokens = loaded.encode(item["prompt"])
        item["ids"] = [int(i) for i in tokens.input_ids[0][: tokens.attention_mask.sum()]]
    pad = loaded.encode("").input_ids[0][-1]
    return {**golden, "special": {**golden["special"], "<|endoftext|>": int(pad)}}


def test_tokenizer(pristine):
    """A known vocabulary, one that belongs to another text encoder, and one of a small model."""
    checkpoint, golden = Checkpoint(pristine), own_ids(pristine)
    vocab = 616

    def state(vocab: int, golden: dict | None = None) -> tuple[str, str]:
        (finding,) = tokenizer.check(checkpoint, vocab, golden)
        return finding.state, finding.text

    assert state(vocab, golden)[0] == OK
    assert state(vocab)[0] == SKIPPED
    assert state(600)[0] == FAILED
    assert "has only 600 tokens" in state(600)[1]
    assert state(tokenizer.QWEN3_VOCAB)[0] == FAILED
    assert "expected 151644" in state(tokenizer.QWEN3_VOCAB)[1]
    golden["prompts"][3]["ids"].append(golden["special"]["<|endoftext|>"])  # as if the prompt were longer
    assert state(tokenizer.QWEN3_VOCAB, golden)[0] == OK  # padding is the same token
    golden["prompts"][3]["ids"][-1] = 5
    assert "1 of 7 prompts" in state(tokenizer.QWEN3_VOCAB, golden)[1]


@pytest.mark.slow
def test_builds(built, copy):
    """Current builds open; older ones, damaged ones, and those of other weights or configs are told apart."""
    assert [f.text for f in check(built) if f.subject == "builds"] == [
        "bf16: current, whole, and all 5 graphs open",
        "int4: current, whole, and all 5 graphs open",
    ]
    root = copy(built)
    rewrite(root / "transformer/int4.safetensors", lambda content: content.__setitem__(-1, content[-1] ^ 1))
    (root / "vae_encoder.onnx").unlink()
    first, second = found(check(root), FAILED, "builds")
    assert "bf16: vae_encoder.onnx is missing" in first
    assert "int4: transformer/int4.safetensors is not the file that was exported" in second
    assert f"fluxonnx export -d {root} --precision int4 --force" in second


@pytest.mark.slow
def test_stale_builds(built, copy):
    root = copy(built)
    aged(root)
    texts = list(found(check(root), WARNING, "builds"))
    assert len(texts) == 2
    assert all(f"is of format 0, this fluxonnx writes {GRAPH_FORMAT}" in text for text in texts)


@pytest.mark.slow
def test_one_flipped_byte_of_the_source(built, copy):
    """The manifest knows the files that builds were made from, whatever their values look like."""
    root = copy(built)
    tensor = next(iter(read_header(root / WEIGHTS).values()))
    rewrite(root / WEIGHTS, lambda content: content.__setitem__(tensor.offset, content[tensor.offset] ^ 1))
    findings = check(root)
    (text,) = found(findings, FAILED, "files")
    assert f"{WEIGHTS} is not the file that the builds bf16, int4 were made from" in text
    assert any("bf16" in text for text in found(findings, FAILED, "builds"))
    assert any("int4" in text for text in found(findings, WARNING, "builds"))


@pytest.mark.slow
def test_self_contained_copy(pristine, tmp_path):
    """A copy that has no weights but those of its build is good."""
    export(pristine, tmp_path / "copy", precision="int4")
    findings = check(tmp_path / "copy")
    assert {finding.state for finding in findings} == {OK, SKIPPED}
    assert any("int4" in text for text in found(findings, OK, "builds"))


@pytest.mark.slow
def test_no_damage_is_a_traceback(checkpoints, copy):
    """Bytes changed, cut or exchanged near the start of any file: no check fails itself."""
    root = copy(checkpoints.exported(SMALLEST))
    files = sorted(path for path in root.rglob("*") if path.suffix in (".json", ".safetensors", ".onnx"))
    dice = random.Random(5)
    for i in range(EXAMPLES):
        path = files[i * 7 % len(files)]
        content = path.read_bytes()
        start = dice.randrange(min(len(content), 3000))
        junk = dice.choice([b"\0", b"\xff" * 40, b"9" * 50, b'"', b"[" * 2000, dice.randbytes(30)])
        path.write_bytes(dice.choice([content[:start], content[:start] + junk + content[start + len(junk) :]]))
        findings = check(root)
        assert not [f for f in findings if "failed itself" in f.text], path
        assert all("\n" not in finding.text and len(finding.text) < 2500 for finding in findings)
        path.write_bytes(content)


def test_command_prints_findings_and_a_last_line(pristine, capsys):
    assert main(["check", "-d", str(pristine)]) == 0
    captured = capsys.readouterr()
    *lines, last = captured.out.splitlines()
    assert captured.err == ""
    assert all(line.split()[0] in (OK, SKIPPED) for line in lines)
    assert last.startswith("fluxonnx ")
    for word in ("onnxruntime", "Python", "unknown model transformer:", "tokenizer:", "builds none", "good ("):
        assert word in last


def test_exit_code_and_quiet(tmp_path, capsys):
    """Failures are errors, one line each with -q; without, one line in all, and the last line is still the summary."""
    assert main(["check", "-q", "-d", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("fluxonnx: ") for line in lines)
    assert main(["check", "-d", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("fluxonnx: failed: files, configs, tokenizer (6 failed, ")
    assert captured.out.splitlines()[-1].endswith("failed: files, configs, tokenizer (6 failed, 4 skipped, 1 ok)")


@pytest.mark.slow
def test_json(checkpoints, tmp_path, capsys):
    """In a file beside the report, or in its place; the figures are those of the findings."""
    model = str(checkpoints.get(SMALLEST))
    assert main(["check", "-d", model, "--json", str(tmp_path / "a.json")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["summary"] == last
    assert values["result"] == "ok"
    assert {finding["state"] for finding in values["findings"]} == {OK, SKIPPED, WARNING}
    assert set(values["digests"]) == {"transformer", "vae", "text_encoder", "tokenizer"}
    assert main(["check", "-d", model, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["findings"] == values["findings"]


def test_usage(fails, pristine, tmp_path):
    fails(1, "does not exist", "check", "-d", tmp_path / "none")
    fails(2, "int9", "check", "-d", pristine, "--precision", "int9")
    fails(2, "folder .* does not exist", "check", "-d", pristine, "--json", tmp_path / "none/a.json")
