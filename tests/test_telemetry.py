"""Nothing leaves the machine, and nothing is written but the picture and the model's own files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

VARIABLE = "ORT_DISABLE_TELEMETRY"


def run(home: Path, *arguments: object, **changed: str) -> str:
    """Run Python with a fresh home; returns its output."""
    home.mkdir()
    names = ("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "TMPDIR", VARIABLE)
    kept = {name: value for name, value in os.environ.items() if name not in names}
    environment = {**kept, "HOME": str(home), "USERPROFILE": str(home), **changed}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "caches"])
def test_generate_writes_the_picture_and_the_models_copy(tmp_path, cache):
    home = tmp_path / "home"
    caches = home / (cache or ".cache")
    changed = {"XDG_CACHE_HOME": str(caches)} if cache else {}
    run(home, "-m", "fluxonnx", "generate", "-q", "-p", "a red circle", "-s", "1", "-o", "x.png", **changed)
    files = {path for path in home.rglob("*") if not path.is_dir()}
    model = next((caches / "fluxonnx").glob("*/tiny-klein"))
    graphs = {f"{name}.onnx" for name in ("text_encoder", "conditioning", "transformer", "vae_encoder", "vae_decoder")}
    assert {path.name for path in model.glob("*.onnx")} == graphs
    others = sorted(str(path) for path in files if not path.is_relative_to(model))
    # another process that copies or exports the model may be waited for at a lock, an empty file
    assert [path for path in others if Path(path).stat().st_size] == [str(home / "x.png")]
    assert all("fluxonnx" in path or path.endswith("x.png") for path in others)


@pytest.mark.parametrize("module", ["fluxonnx", "fluxonnx.runtime.session", "fluxonnx.runtime.providers"])
@pytest.mark.parametrize(("value", "expected"), [(None, "1"), ("0", "0"), ("", "")])
def test_switched_off_before_any_import_unless_the_user_says_otherwise(tmp_path, module, value, expected):
    script = f"import os, sys, {module}; print('onnxruntime' in sys.modules, os.environ['{VARIABLE}'])"
    changed = {} if value is None else {VARIABLE: value}
    assert run(tmp_path / "home", "-c", script, **changed) == f"False {expected}\n"
