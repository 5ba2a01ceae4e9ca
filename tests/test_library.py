"""What onnxruntime prints by itself: nothing, unless someone wants it."""

from __future__ import annotations

import os
import subprocess
import sys

import onnxruntime
import pytest
from onnx import TensorProto, helper

from fluxonnx.errors import UsageError
from fluxonnx.runtime.library import VARIABLE, log_severity
from fluxonnx.runtime.providers import session_providers

# A session without settings of its own, as what belongs to no session, asks the default logger.
FAIL = """
import numpy
import sys
from fluxonnx.runtime.library import library
try:
    library().InferenceSession(sys.argv[1]).run(None, {"x": numpy.zeros(2, numpy.float32)})
except Exception as error:
    print(error)
"""


@pytest.fixture(scope="module")
def failing(tmp_path_factory) -> str:
    """A graph whose only node fails when it is run."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", 7])
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [1, 7])
    graph = helper.make_graph([helper.make_node("Reshape", ["x", "shape"], ["y"])], "fails", [x], [y], [shape])
    path = tmp_path_factory.mktemp("graph") / "fails.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("severity", "before", "heard"),
    [(None, "", False), ("", "", False), ("3", "", True), (None, "import onnxruntime", True)],
)
def test_errors_are_raised_and_not_printed(failing, severity, before, heard):
    """A program that imports onnxruntime itself may have chosen what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if severity is not None:
        environment[VARIABLE] = severity
    result = subprocess.run(
        [sys.executable, "-c", f"{before}\n{FAIL}", failing],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Reshape" in result.stdout
    assert ("[E:onnxruntime" in result.stderr) == heard


@pytest.mark.parametrize("value", ["5", "-1", "x", "0x"])
def test_impossible_severities(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UsageError, match=f"{VARIABLE} is '{value}': set it to 0"):
        log_severity()


@pytest.mark.parametrize(("severity", "stream"), [("4", None), ("3", "err")])
def test_what_is_missing_for_cuda_is_not_a_result(monkeypatch, capsys, severity, stream):
    """onnxruntime prints it on standard output, where the result of a command belongs."""
    monkeypatch.setenv(VARIABLE, severity)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcublas"), raising=False)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert session_providers("cuda", None)[0][0] == "CUDAExecutionProvider"
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ("Failed to load libcublas\n" if stream else "")
