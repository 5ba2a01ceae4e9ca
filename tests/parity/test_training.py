"""Training can go on from a model: taken apart and assembled again it is the same."""

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


def test_a_model_taken_apart_and_assembled_is_the_same(tmp_path):
    from safetensors.torch import load_file

    model, work, again = MODELS / "tiny-klein-base", tmp_path / "work", tmp_path / "again"
    for script, arguments in (("take_apart.py", (work, model)), ("assemble.py", (work, again, "--base"))):
        subprocess.run([sys.executable, TRAINING / script, *arguments], check=True, capture_output=True)
    files = [path.relative_to(model) for path in model.rglob("*.safetensors")]
    assert len(files) == 3
    for file in files:
        before, after = load_file(model / file), load_file(again / file)
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(value.float(), after[name].float(), err_msg=name)
