"""Training can resume from a model directory: its conversion to checkpoints and back is lossless."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

MODELS = Path(__file__).parents[2] / "models"
TRAINING = MODELS / "tiny-klein/training"


def test_conversion_to_checkpoints_and_back_is_lossless(tmp_path):
    from safetensors.torch import load_file

    model, work, assembled = MODELS / "tiny-klein-base", tmp_path / "work", tmp_path / "assembled"
    for script, arguments in (("to_checkpoints.py", (work, model)), ("assemble.py", (work, assembled, "--base"))):
        subprocess.run([sys.executable, TRAINING / script, *arguments], check=True, capture_output=True)
    files = [path.relative_to(model) for path in model.rglob("*.safetensors")]
    assert len(files) == 3
    for file in files:
        before, after = load_file(model / file), load_file(assembled / file)
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(value.float(), after[name].float(), err_msg=name)
