"""The command line as a person meets it: exit codes, one-line errors, files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import fluxonnx
from fluxonnx.cli import build_parser, main
from tests.support import Case

CASE = Case("odd-heads")


@pytest.fixture
def model(checkpoints) -> str:
    return str(checkpoints.exported(CASE))


def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fluxonnx", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "ppm"])
def test_generate_writes_what_the_suffix_says(model, tmp_path, capsys, suffix):
    path = tmp_path / f"cat.{suffix}"
    assert main(["generate", "-d", model, "-p", "a cat", "-o", str(path), "-W", "64", "-H", "96", "-S", "42"]) == 0
    with Image.open(path) as image:
        assert image.size == (64, 96)
        assert image.format == {"jpg": "JPEG"}.get(suffix, suffix.upper())
    assert "Seed: 42" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_same_seed_same_bytes(model, tmp_path):
    for name in ("a.png", "b.png"):
        assert main(["generate", "-d", model, "-p", "a cat", "-o", str(tmp_path / name), "-S", "5", "-q"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_random_seed_is_printed_and_reproduces(model, tmp_path, capsys):
    arguments = ["generate", "-d", model, "-p", "a cat", "-W", "64", "-H", "64", "-o"]
    assert main([*arguments, str(tmp_path / "a.png")]) == 0
    seed = re.search(r"Seed: (\d+)", capsys.readouterr().err)[1]
    assert main([*arguments, str(tmp_path / "b.png"), "-S", seed]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_parameters_are_in_the_picture(model, tmp_path):
    path = tmp_path / "cat.png"
    main(["generate", "-d", model, "-p", 'a "cat" ☂', "-o", str(path), "-W", "64", "-H", "64", "-S", "42", "-s", "2"])
    with Image.open(path) as image:
        found = json.loads(image.text["fluxonnx"])
        assert 'a "cat" ☂\nSteps: 2, Sampler: Euler, ' in image.text["parameters"]
        assert "Seed: 42, Size: 64x64" in image.text["parameters"]
    expected = {"prompt": 'a "cat" ☂', "seed": 42, "steps": 2, "width": 64, "height": 64}
    assert expected.items() <= found.items()
    assert found["version"] == fluxonnx.__version__
    assert found["model"] == Path(model).name


def test_quiet_prints_nothing_and_verbose_the_phases(model, tmp_path, capsys):
    arguments = ["generate", "-d", model, "-p", "x", "-W", "64", "-H", "64", "-o", str(tmp_path / "a.png")]
    assert main([*arguments, "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main([*arguments, "-v"]) == 0
    err = capsys.readouterr().err
    for phase in ("encode prompt", "denoise", "decode", "save"):
        assert re.search(rf"^{phase} +\d+\.\d\d s$", err, re.MULTILINE)


def test_generate_exports_on_the_spot(copy_of, tmp_path):
    root = copy_of(CASE)
    assert main(["generate", "-d", str(root), "-p", "x", "-W", "64", "-H", "64", "-o", str(tmp_path / "a.png")]) == 0
    assert (root / "transformer.onnx").exists()


def test_model_is_found_without_d(copy_of, tmp_path, model):
    """$FLUXONNX_MODEL, else ./model, else the bundled demo model, which says what it is."""
    arguments = ["generate", "-p", "x", "-W", "64", "-H", "64", "-s", "1", "-o", "a.png"]
    copy_of(CASE)  # to tmp_path/model
    for environment, name in (({"FLUXONNX_MODEL": model}, Path(model).name), ({}, "model")):
        assert run(*arguments, cwd=tmp_path, **environment).returncode == 0
        with Image.open(tmp_path / "a.png") as image:
            assert json.loads(image.text["fluxonnx"])["model"] == name
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = run(*arguments, cwd=elsewhere, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    assert "Using tiny-klein" in result.stderr
    assert "FLUX.2-klein-4B" in result.stderr


def test_cache_home_that_can_not_be_written(tmp_path, fails, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLUXONNX_MODEL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fails(1, "can't write .*tiny-klein", "generate", "-q", "-p", "x")


def test_long_prompt_is_cut_with_a_warning(model, tmp_path, capsys):
    arguments = ["-W", "64", "-H", "64", "-s", "1", "--max-sequence-length", "24", "-o", str(tmp_path / "a.png")]
    assert main(["generate", "-d", model, "-p", "a cat " * 20 + "END", *arguments]) == 0
    assert re.search(r"^fluxonnx: warning: .*longer than 24 tokens.*END'$", capsys.readouterr().err, re.MULTILINE)


def test_export_prints_a_table(copy_of, capsys):
    root = copy_of(CASE)
    assert main(["export", "-d", str(root)]) == 0
    assert re.search(r"^transformer\.onnx +\d+ +[\d,]+ +[\d,]+ +\d+\.\d\d$", capsys.readouterr().err, re.MULTILINE)
    assert main(["export", "-d", str(root)]) == 0
    assert capsys.readouterr().err.count("up to date") == 5
    assert main(["export", "-d", str(root), "--component", "transformer", "--force", "-q"]) == 0
    assert capsys.readouterr().err == ""


# Bad input


def test_missing_model(fails, tmp_path):
    fails(
        1, "does not exist: pass the folder that holds model_index.json", "generate", "-d", tmp_path / "no", "-p", "x"
    )


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["-p", "   "], "the prompt is empty"),
        (["-p", "\udc80"], "not valid text"),
        (["-p", "x", "-W", "100"], "width 100 can't be drawn.*the nearest is 96"),
        (["-p", "x", "-H", "5000"], "height 5000 can't be drawn.*the nearest is 4096"),
        (["-p", "x", "-W", "8"], "the nearest is 64"),
        (["-p", "x", "-s", "0"], "steps is 0"),
        (["-p", "x", "-S", "-1"], "seed is -1, but must be from 0"),
        (["-p", "x", "--max-sequence-length", "100"], "multiple of 8"),
        (["-p", "x", "--threads", "0"], "threads is 0"),
        (["-p", "x", "-o", "a.gif"], r"must end in one of \.png"),
        (["-p", "x", "-o", "no/such/folder/a.png"], "folder no/such/folder does not exist: create it"),
        (["-p", "x", "-o", "folder.png"], "is a folder"),
    ],
)
def test_usage_errors_exit_with_2(model, fails, tmp_path, monkeypatch, arguments, pattern):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    fails(2, pattern, "generate", "-d", model, *arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize(
    "arguments",
    [[], ["generate", "-p", "x", "-W", "wide"], ["paint"], ["export"], ["generate", "-q", "-v"]],
)
def test_parser_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: fluxonnx" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "pattern"),
    [
        ("transformer/config.json", None, "config.json is missing"),
        ("transformer/config.json", b"{", "not valid JSON"),
        ("transformer/diffusion_pytorch_model.safetensors", b"\0" * 5, "not a whole safetensors file"),
        ("transformer/diffusion_pytorch_model.safetensors", None, "holds no weights"),
        ("tokenizer/tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer/tokenizer.json", b"{}", "is not a tokenizer"),
        ("model_index.json", b'{"_class_name": "FluxPipeline"}', "FluxPipeline"),
    ],
)
def test_broken_checkpoints_exit_with_1(copy_of, fails, file, content, pattern):
    root = copy_of(CASE)
    if content is None:
        (root / file).unlink()
    else:
        (root / file).write_bytes(content)
    fails(1, pattern, "generate", "-q", "-d", root, "-p", "x")


def test_truncated_weights(copy_of, fails):
    root = copy_of(CASE)
    path = root / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    fails(1, "is truncated", "export", "-d", root)
    assert not (root / "vae_decoder.onnx").exists()


def test_graph_deleted_or_damaged_after_export(copy_of, fails, tmp_path):
    root = copy_of(CASE)
    arguments = ["generate", "-q", "-d", root, "-p", "x", "-W", "64", "-H", "64", "-o", tmp_path / "a.png"]
    assert main(["export", "-q", "-d", str(root)]) == 0
    (root / "transformer.onnx").unlink()
    assert main([str(argument) for argument in arguments]) == 0
    (root / "transformer.onnx").write_bytes(b"not a graph")
    assert main([str(argument) for argument in arguments]) == 0  # exported again
    (root / "fluxonnx.json").write_text("[")
    fails(1, r"fluxonnx\.json is not valid JSON", *arguments)


def test_help_fits_a_screen_and_shows_an_example(capsys):
    for command in ("generate", "export", "info", "check", "bench", "compare"):
        with pytest.raises(SystemExit):
            build_parser().parse_args([command, "--help"])
        text = capsys.readouterr().out
        assert f":\n  fluxonnx {command} " in text
        assert max(map(len, text.splitlines())) <= 120


def test_nothing_heavy_is_imported_for_help():
    code = "import sys, fluxonnx.cli; fluxonnx.cli.build_parser(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "onnx", "onnxruntime", "PIL", "tokenizers", "tqdm"} & set(modules)


@pytest.mark.parametrize(
    "modules",
    [
        # not even if they are there
        {"torch", "diffusers", "transformers"},
        # of the exporter, once a model is exported: onnx alone takes longer to import than a small picture to draw
        {"onnx", "fluxonnx.export", "fluxonnx.measure.quality"},
    ],
)
def test_drawing_never_imports(model, tmp_path, modules):
    code = (
        "import sys; from fluxonnx.cli import main; "
        f"assert main(['generate', '-q', '-d', {model!r}, '-p', 'x', '-o', {str(tmp_path / 'a.png')!r}]) == 0; "
        f"assert not {modules!r} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
