"""`fluxonnx providers`: what is installed, whether it is right, and what adds the rest."""

from __future__ import annotations

import json
from importlib.util import find_spec

import onnxruntime
import pytest

from fluxonnx.check import providers as doctor
from fluxonnx.check.providers import FAILS, MISSING, UNUSABLE, WORKS, WRONG, Found
from fluxonnx.cli import main
from fluxonnx.runtime import providers


def printed(capsys, code: int) -> dict:
    """The result of `fluxonnx providers --json`, by provider, and the description of the machine as "machine"."""
    assert main(["providers", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    return {"machine": found["machine"], **{item["provider"]: item for item in found["providers"]}}


def test_every_known_provider_is_listed(capsys):
    found = printed(capsys, 0)
    assert set(providers.KNOWN) <= set(found)
    assert (found["openblas"]["state"] == WORKS) == (find_spec("threadpoolctl") is not None)
    for name in ("cpu", "openblas"):
        if found[name]["state"] == MISSING and name != "cpu":
            continue
        assert found[name]["state"] == WORKS
        assert max(found[name]["errors"].values()) < 1e-5
    for name in set(providers.KNOWN) - set(providers.available()) - {"openblas"}:
        assert found[name]["state"] in (MISSING, UNUSABLE)
        assert "pip install" in found[name]["install"] or found[name]["state"] == UNUSABLE


def test_the_machine_is_described(capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    here = printed(capsys, 0)["machine"]
    assert here["onnxruntime"] == onnxruntime.__version__
    assert 1 <= here["threads"] <= here["usable_cores"] <= here["cores"]
    assert here["free_memory"] > 0
    assert here["blas"] != "unknown"
    assert here["environment"]["OMP_NUM_THREADS"] == "3"


def test_the_report_of_a_person(capsys):
    assert main(["providers"]) == 0
    text = capsys.readouterr().out
    for word in ("onnxruntime", "BLAS: ", "threads per operator", "limit of the control group", "cpu       works"):
        assert word in text
    assert "--precision auto takes cuda where it works" in text
    assert len(text.splitlines()) < 40


def test_a_wrong_provider_is_a_failure(stand_in, capsys):
    stand_in("WebGpuExecutionProvider", 0.2)
    assert main(["providers"]) == 1
    captured = capsys.readouterr()
    assert "webgpu    wrong         attention by 0." in captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("fluxonnx: provider webgpu wrong: attention by 0.")
    assert "Please send what these print: fluxonnx providers --json" in captured.out


def test_an_infinite_error_is_json(stand_in, capsys):
    stand_in("WebGpuExecutionProvider", float("inf"))
    assert printed(capsys, 1)["webgpu"]["errors"]["attention"] is None


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_a_provider_that_does_not_start(monkeypatch, capsys):
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    if "cuda" in providers.available():
        pytest.skip("CUDA may work here")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    found = printed(capsys, 0)["cuda"]
    assert found["state"] == FAILS
    assert "can't start its cuda provider" in found["text"]


def test_plugins(plugin, capsys):
    plugin("raise ImportError('for another Python')")
    found = printed(capsys, 0)["mlx"]
    assert found["state"] == UNUSABLE
    assert "for another Python" in found["text"]
    assert found["package"].startswith("onnxruntime-ep-mlx")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            Found("dml", MISSING, "", install="pip install x", needs="a GPU"),
            "dml       not installed needs a GPU; pip install x",
        ),
        (Found("cpu", WORKS, "right", package="a 1", tested="CI"), "cpu       works         right; [a 1]"),
        (Found("mlx", WORKS, "right"), "mlx       works         right; untested by us"),
        (
            Found("openvino", UNUSABLE, "no device", install="pip install y", needs="Intel"),
            "openvino  unusable      no device; needs Intel; or pip install y",
        ),
        (Found("cuda", WRONG, "norm by 1", tested="CI"), "cuda      wrong         norm by 1"),
    ],
)
def test_lines(found, expected):
    assert doctor.line(found) == expected


def test_what_to_send_back():
    assert "mlx" in doctor.closing([Found("mlx", WORKS, "right")])
    assert "send" not in doctor.closing([Found("mlx", MISSING, ""), Found("cpu", WORKS, "right", tested="CI")])


def test_a_mac_user_is_asked_for_a_static_build():
    told = doctor.closing([Found("coreml", WORKS, "right")])
    assert "fluxonnx export -d DIR --precision fp16 --flavour portable --shape 256x256; fluxonnx bench" in told
