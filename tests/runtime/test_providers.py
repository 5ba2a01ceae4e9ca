"""Execution providers: their names, and that those which are missing or do not start are refused.

Other providers than the CPU are tested where the installed onnxruntime has them. Providers that compute wrong, and
plugins, are played by stand-ins.
"""

from __future__ import annotations

import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import fluxonnx
from fluxonnx.cli import main
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.runtime import providers
from fluxonnx.runtime.providers import probe
from fluxonnx.runtime.providers.assignment import RECORD
from tests.support import Case, optional

CASE = Case("odd-heads")
# The source of a plugin's package.
WHOLE = """
def get_library_path(): return {path!r}
def get_ep_name(): return "MLXExecutionProvider"
"""
PICTURE = ["-p", "x", "-W", "64", "-H", "64", "-s", "1", "-S", "1"]
OTHERS = [name for name in providers.available() if name != providers.CPU]


def test_names_are_onnxruntimes_without_the_suffix(monkeypatch):
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "AzureExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    assert providers.available() == ["tensorrt", "cuda", "cpu"]
    name, settings = providers.session_providers("cuda", None)[0]
    assert name == "CUDAExecutionProvider"
    assert settings == providers.KNOWN["cuda"].settings


@pytest.mark.parametrize(
    ("provider", "cure"), [("rocm", "choose one of these"), ("cuda", "install onnxruntime-gpu in its place")]
)
def test_unknown_provider_is_refused(copy_of, monkeypatch, capsys, provider, cure):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    root = copy_of(CASE)
    with pytest.raises(UsageError, match=f"{provider}.*which has cpu.*{cure}"):
        fluxonnx.load(root, provider=provider)
    assert main(["generate", "-d", str(root), "--provider", provider, *PICTURE]) == 2
    assert main(["bench", "-d", str(root), "--provider", provider]) == 2
    assert cure in capsys.readouterr().err


@pytest.fixture
def broken_cuda(monkeypatch):
    """An onnxruntime that lists CUDA's provider, but runs sessions on the CPU, as without a driver."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    if "cuda" in OTHERS:
        pytest.skip("CUDA may work here")


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_fallback_to_the_cpu_is_refused(copy_of, broken_cuda):
    with (
        fluxonnx.load(copy_of(CASE), provider="cuda", precision="bf16") as flux,
        pytest.raises(FluxonnxError, match="can't start its cuda provider, most often for lack of a driver"),
    ):
        flux.generate("x", 64, 64, 1, 1)


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_provider_that_does_not_start_does_not_work(broken_cuda):
    assert providers.works("cpu")
    assert not providers.works("cuda")


@pytest.mark.skipif(not OTHERS, reason="onnxruntime has only the CPU provider")
@pytest.mark.parametrize("provider", OTHERS)
def test_pictures_differ_from_the_cpus_only_by_rounding(copy_of, provider):
    root = copy_of(CASE)
    if not providers.works(provider):
        pytest.skip(f"{provider} can't be started here")
    pictures = []
    for name in (providers.CPU, provider):
        with fluxonnx.load(root, provider=name) as flux:
            pictures.append(np.asarray(flux.generate("a cat", 64, 64, 2, seed=1), np.float32))
            pictures.append(np.asarray(flux.edit("a cat", [Image.new("RGB", (64, 64), "red")], seed=1), np.float32))
    assert np.abs(pictures[0] - pictures[2]).mean() < 1
    assert np.abs(pictures[1] - pictures[3]).mean() < 1


def test_all_providers_are_described():
    for name, known in providers.KNOWN.items():
        assert known.flavour in ("ort", "portable")
        assert known.needs or known.tested, f"{name} needs nothing, and was tested nowhere"
        assert all(limit.endswith(".") for limit in known.limits)
        assert "pip install" in providers.installation(name)
        known.thread_settings(2)
    assert providers.installation("rocm") == ""
    assert providers.KNOWN["webgpu"].flavour == "portable", "graphs of the flavour ort were silently wrong there"


@pytest.mark.parametrize("flavour", ["ort", "portable"])
@pytest.mark.parametrize("provider", ["cpu", pytest.param("openblas", marks=optional("threadpoolctl"))])
def test_the_probe_agrees_with_what_is_right(provider, flavour):
    found = providers.trial(provider, flavour)
    assert found.fault is None
    assert set(found.errors) == {"attention", "norm", "convolution"}
    assert max(found.errors.values()) < 1e-5


@pytest.mark.parametrize("error", [0.1, np.nan, np.inf])
@pytest.mark.parametrize("part", ["attention", "norm", "convolution"])
def test_the_probe_finds_a_wrong_part(part, error):
    """The faults that were seen are of 0.11 to 0.24."""
    outputs = {name: value.copy() for name, value in probe.expected().items()}
    outputs[part] += error * np.abs(outputs[part]).mean()
    fault = providers.Trial(probe.compared(lambda inputs: list(outputs.values()))).fault
    assert fault is not None
    assert fault.startswith(f"{part} by ")


def test_the_probe_allows_for_16_bits():
    rounded = [value.astype(np.float16) for value in probe.expected().values()]
    assert providers.Trial(probe.compared(lambda inputs: rounded)).fault is None


def test_a_provider_that_is_wrong_is_refused(stand_in, copy_of, fails):
    made = stand_in("WebGpuExecutionProvider", 0.2)
    assert not providers.works("webgpu")
    with pytest.raises(FluxonnxError, match="--flavour portable"):
        providers.check_right("webgpu", "ort")
    pattern = "provider webgpu computes wrong on this machine: .*attention by 0.* use --provider cpu"
    fails(1, pattern, "generate", "-d", copy_of(CASE), "-q", "--provider", "webgpu", *PICTURE)
    assert made[-1].chosen[0][0] == "WebGpuExecutionProvider"


def test_a_provider_that_is_right_is_tried_once(stand_in):
    made = stand_in("DmlExecutionProvider", 0)
    for _ in range(3):
        providers.check_right("dml", "portable")
        providers.check_right("cpu")
    assert len(made) == 1


def test_where_nodes_ran_is_known():
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(RECORD, "1")
    content = probe.model("portable").SerializeToString()
    found = providers.assigned(onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]))
    if found is None:
        pytest.skip("this onnxruntime does not tell")
    assert set(found) == {"cpu"}
    assert found["cpu"]["Softmax"] == 1
    assert providers.assigned(object()) is None


def ran(**nodes: dict[str, int]) -> SimpleNamespace:
    """A session whose nodes were given to these providers."""
    parts = [
        SimpleNamespace(
            ep_name=f"{name}ExecutionProvider",
            get_nodes=lambda kinds=kinds: [SimpleNamespace(op_type=kind) for kind in Counter(kinds).elements()],
        )
        for name, kinds in nodes.items()
    ]
    return SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)


def test_fallback_is_told_once():
    session = ran(CoreML={"MatMul": 6}, CPU={"Shape": 1, "Cast": 3})
    message = "a graph: 4 of 10 nodes .40 %. run on the CPU, not on coreml: 3 Cast, 1 Shape"
    with pytest.warns(UserWarning, match=message):
        providers.tell_of_fallback(session, "a graph", "coreml")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        providers.tell_of_fallback(session, "a graph", "coreml")
        providers.tell_of_fallback(ran(CoreML={"MatMul": 6}), "another graph", "coreml")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("raise ImportError('for another Python')", "can't be loaded .for another Python."),
        ("", "can't be loaded .*get_ep_name"),
        ("def get_ep_names(): return []", "can't be loaded"),
        (WHOLE.format(path="/nowhere/plugin.so"), "can't be loaded"),
    ],
)
def test_plugins_that_are_broken(plugin, copy_of, fails, source, problem):
    plugin(source)
    assert "mlx" not in providers.available()
    flags = ["generate", "-d", copy_of(CASE), "-q", "--provider", "mlx", *PICTURE]
    fails(
        2, f"provider 'mlx': onnxruntime-ep-mlx .*is installed, but it {problem}.*: choose one of these: .*cpu", *flags
    )


def test_a_plugin_without_a_device(plugin, monkeypatch, copy_of, fails):
    registered = []
    monkeypatch.setattr(
        onnxruntime, "register_execution_provider_library", lambda *words: registered.append(words), raising=False
    )
    plugin(WHOLE.format(path="plugin.so"))
    pattern = "it offers no device on this machine .it needs macOS on Apple Silicon.: choose one of these: .*cpu"
    fails(2, pattern, "generate", "-d", copy_of(CASE), "-q", "--provider", "mlx", *PICTURE)
    assert registered == [("MLXExecutionProvider", "plugin.so")], "once"


def test_a_plugin_with_a_device(plugin, monkeypatch):
    device = SimpleNamespace(ep_name="MLXExecutionProvider")
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda *words: None, raising=False)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [device], raising=False)
    plugin(WHOLE.format(path="plugin.so"))
    assert providers.available()[-1] == "mlx"
    providers.check_provider("mlx")
    told = []
    options = SimpleNamespace(
        add_session_config_entry=lambda *words: None,
        add_provider_for_devices=lambda devices, settings: told.append((devices, settings)),
    )
    assert providers.session_providers("mlx", 2, options) is None
    assert told == [([device], {})]


def test_a_missing_plugin_is_told_how_to_install(copy_of, fails, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    if providers.plugin_of("mlx"):
        pytest.skip("it is installed")
    pattern = (
        "which has cpu.*: choose one of these, or pip install onnxruntime-ep-mlx .mlx needs macOS on Apple Silicon."
    )
    fails(2, pattern, "generate", "-d", copy_of(CASE), "-q", "--provider", "mlx", *PICTURE)
