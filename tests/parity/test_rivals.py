"""`benchmarks/rivals.py` runs the real diffusers and OpenVINO on a tiny model; never the values of the figures."""

from __future__ import annotations

import json

import pytest

from benchmarks import rivals
from tests.support import Case, optional

pytestmark = [pytest.mark.parity, optional("torch", "diffusers", "transformers", "openvino")]


def test_libraries(checkpoints, tmp_path, capsys):
    path = tmp_path / "rivals.json"
    model = str(checkpoints.exported(Case("odd-heads")))
    arguments = ["-d", model, "--size", "64", "-s", "2", "--repeat", "1", "--json", str(path)]
    assert rivals.main([*arguments, "--rivals", "diffusers-bf16", "diffusers-fp32", "openvino"]) == 0
    programs = json.loads(path.read_text())["programs"]
    assert list(programs) == ["fluxonnx bf16", "diffusers bf16", "diffusers fp32", "OpenVINO, bf16 graphs"]
    assert programs["OpenVINO, bf16 graphs"]["remark"].startswith("computes in ")
    for found in programs.values():
        assert found["error"] is None
        (run,) = found["runs"]
        assert run["step"] > 0
        assert run["total"] > run["step"]
    assert "times fluxonnx bf16" in capsys.readouterr().out
