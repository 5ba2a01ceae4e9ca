"""What onnxruntime is told about each session, and that it is told."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from fluxonnx.checkpoint.manifest import Build, read_manifest
from fluxonnx.contract import COMPONENTS
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.runtime.session import Session, SessionOptions, Settings, native, settings
from tests.support import Case

UNSIGNED = {"session.x64quantprecision": "1"}
UNPACKED = {"session.disable_prepacking": "1"}
STREAMED = ("text_encoder", "transformer")
NO_FOLDING = ("ConstantFolding",)


def build_of(precision: str, flavour: str, saturating: bool = False) -> Build:
    return Build(precision, flavour, 23, {"products": "pairs"} if saturating else {})


@pytest.fixture
def cuda(monkeypatch):
    """An onnxruntime that has CUDA's provider, by its own account."""
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)


# component, precision, flavour, provider, exact int8 dot, low memory -> provider, arena, optimise, disabled, config
TABLE = [
    ("transformer", "bf16", "ort", "cpu", True, False, "cpu", True, False, NO_FOLDING, {}),
    ("transformer", "bf16", "ort", "cpu", True, True, "cpu", True, False, NO_FOLDING, {}),
    ("transformer", "bf16", "ort", "cpu", False, False, "cpu", True, True, NO_FOLDING, UNSIGNED),
    ("transformer", "bf16", "portable", "cpu", True, False, "cpu", True, True, NO_FOLDING, {}),
    ("transformer", "bf16", "portable", "cpu", False, False, "cpu", True, True, NO_FOLDING, UNSIGNED),
    ("transformer", "bf16", "ort", "cuda", True, False, "cuda", True, True, NO_FOLDING, {}),
    ("transformer", "bf16", "ort", "cuda", False, False, "cuda", True, True, NO_FOLDING, UNSIGNED),
    ("transformer", "int8", "ort", "cpu", True, False, "cpu", True, False, NO_FOLDING, UNPACKED),
    ("transformer", "int8", "ort", "cpu", False, False, "cpu", True, True, NO_FOLDING, UNSIGNED | UNPACKED),
    ("transformer", "int8", "portable", "cpu", True, True, "cpu", True, True, NO_FOLDING, UNPACKED),
    ("transformer", "int8", "ort", "cuda", True, False, "cuda", True, True, NO_FOLDING, UNPACKED),
    ("transformer", "int4", "ort", "cpu", True, False, "cpu", True, False, NO_FOLDING, {}),
    ("text_encoder", "bf16", "ort", "cpu", True, True, "cpu", True, False, NO_FOLDING, {}),
    ("text_encoder", "int8", "ort", "cpu", True, False, "cpu", True, False, NO_FOLDING, UNPACKED),
    ("text_encoder", "int8", "ort", "cpu", False, False, "cpu", True, True, NO_FOLDING, UNSIGNED | UNPACKED),
    ("vae_decoder", "bf16", "ort", "cpu", True, False, "cpu", True, True, (), {}),
    ("vae_decoder", "bf16", "ort", "cpu", True, True, "cpu", False, True, (), {}),
    ("vae_decoder", "int8", "ort", "cpu", True, False, "cpu", True, True, (), UNPACKED),
    ("vae_decoder", "int8", "ort", "cpu", False, True, "cpu", False, True, (), UNSIGNED | UNPACKED),
    ("vae_encoder", "int8", "ort", "cpu", True, False, "cpu", True, True, (), {}),
    ("vae_encoder", "int8", "ort", "cpu", False, True, "cpu", False, True, (), UNSIGNED),
    ("conditioning", "int8", "ort", "cpu", True, False, "cpu", True, True, (), {}),
    ("conditioning", "bf16", "ort", "cuda", True, False, "cpu", True, True, (), {}),
    ("conditioning", "fp16", "portable", "cuda", True, True, "cpu", False, True, (), {}),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: "-".join(map(str, row[:6])))
def test_table(cuda, row):
    component, precision, flavour, provider, exact, low_memory, *expected = row
    options = SessionOptions(low_memory=low_memory, provider=provider)
    found = settings(component, build_of(precision, flavour), options, exact)
    assert [found.provider, found.arena, found.optimise, found.disabled_optimizers, found.config] == expected


@pytest.mark.parametrize("component", COMPONENTS)
def test_rules_that_hold_for_all(cuda, component):
    """Exhaustively, over what a row of the table may be."""
    for precision, flavour, provider, exact, saturating, low_memory in product(
        ("bf16", "fp32", "fp16", "int8", "int4"), ("ort", "portable"), ("cpu", "cuda"), *[(True, False)] * 3
    ):
        options = SessionOptions(threads=3, low_memory=low_memory, provider=provider)
        found = settings(component, build_of(precision, flavour, saturating), options, exact)
        assert found.threads == 3
        # Memory is given back at once: a buffer that waited in the 4B transformer would hold 0.5 GB of weights.
        assert not found.memory_pattern
        assert not found.memory_reuse
        # Making weights unsigned halves the speed of int8 on processors that need no such thing.
        assert ("session.x64quantprecision" in found.config) == (not exact and not saturating)
        # Only the CPU's own graphs are left as they are, and never where weights have to be made unsigned.
        assert found.optimise == (
            component not in STREAMED
            or flavour == "portable"
            or provider == "cuda"
            or "session.x64quantprecision" in found.config
        )


def test_graph_of_an_unknown_build():
    """The safe choices: nothing is known about its weights."""
    assert settings("transformer", None, SessionOptions(), True) == Settings(
        "cpu", None, arena=True, disabled_optimizers=NO_FOLDING
    )
    assert settings("transformer", None, SessionOptions(), False).config == UNSIGNED


def test_settings_reach_onnxruntime():
    chosen = Settings("cpu", threads=2, arena=False, optimise=False, config={"session.disable_prepacking": "1"})
    found = native(chosen)
    assert found.intra_op_num_threads == 2
    assert not found.enable_cpu_mem_arena
    assert not found.enable_mem_pattern
    assert not found.enable_mem_reuse
    assert found.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert found.get_session_config_entry("session.disable_prepacking") == "1"
    others = native(replace(chosen, arena=True, memory_pattern=True, memory_reuse=True, optimise=True, config={}))
    assert others.enable_cpu_mem_arena
    assert others.enable_mem_pattern
    assert others.enable_mem_reuse
    assert others.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL


@pytest.mark.parametrize("threads", [0, -1])
def test_impossible_threads(threads):
    with pytest.raises(UsageError, match=f"threads is {threads}"):
        SessionOptions(threads=threads)


@pytest.fixture
def decoder(checkpoints):
    root = checkpoints.exported(Case("odd-heads"))
    manifest = read_manifest(root)
    assert manifest is not None
    build = manifest.builds["bf16"]
    return root / build.components["vae_decoder"].graph, build


def latents(channels: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, channels, 4, 4), np.float32)


def test_outputs_belong_to_the_caller(decoder):
    """They are no views into memory of the session, which would keep all of it."""
    path, build = decoder
    with Session(path, "vae_decoder", SessionOptions(), build) as session:
        (first,) = session.run(latents=latents(32))
        kept = first.copy()
        session.run(latents=-latents(32))
    assert first.flags.owndata
    assert np.array_equal(first, kept)


def test_override(decoder):
    """For measurements: a session with other settings computes the same."""
    path, build = decoder
    results = []
    for chosen in (None, replace(settings("vae_decoder", build, SessionOptions(), True), arena=False)):
        with Session(path, "vae_decoder", SessionOptions(), build, chosen) as session:
            results.append(session.run(latents=latents(32))[0])
    assert np.array_equal(*results)


def test_failures_are_one_line(decoder, tmp_path):
    path, build = decoder
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    with pytest.raises(FluxonnxError, match=r"broken.onnx can't be loaded: .*; export again with --force") as found:
        Session(tmp_path / "broken.onnx", "vae_decoder", SessionOptions(profile=True), build)
    assert "\n" not in str(found.value)
    with (
        Session(path, "vae_decoder", SessionOptions(), build) as session,
        pytest.raises(FluxonnxError, match=r"vae_decoder.onnx failed: .+") as found,
    ):
        session.run(latents=latents(31))
    assert "\n" not in str(found.value)


def test_onnxruntime_prints_nothing_of_its_own(checkpoints, tmp_path, capfd):
    """Neither about a graph that can't be loaded nor about a node that fails: one line is for the command to print."""
    root = Path(shutil.copytree(checkpoints.exported(Case("odd-heads")), tmp_path / "model"))
    weights = root / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])
    with pytest.raises(FluxonnxError, match="out of bounds") as found:
        Session(root / "vae_decoder.onnx", "vae_decoder", SessionOptions())
    assert "onnxruntime_src" not in str(found.value)
    ids = np.full((1, 8), 10**9)
    with (
        Session(root / "text_encoder.onnx", "text_encoder", SessionOptions()) as session,
        pytest.raises(FluxonnxError, match="out of data bounds"),
    ):
        session.run(input_ids=ids, attention_mask=np.ones_like(ids))
    assert capfd.readouterr() == ("", "")


def endless(path: Path) -> Path:
    """Write a graph that counts until it is told to stop."""
    value, flag = (helper.make_tensor_value_info(name, kind, []) for name, kind in (("x", 1), ("go", TensorProto.BOOL)))
    turn = helper.make_tensor_value_info("turn", TensorProto.INT64, [])
    following, again = (
        helper.make_tensor_value_info(f"{i.name}_after", i.type.tensor_type.elem_type, []) for i in (value, flag)
    )
    nodes = [helper.make_node("Add", ["x", "x"], ["x_after"]), helper.make_node("Identity", ["go"], ["go_after"])]
    body = helper.make_graph(nodes, "body", [turn, flag, value], [again, following])
    start = helper.make_tensor_value_info("start", TensorProto.FLOAT, [])
    end = helper.make_tensor_value_info("end", TensorProto.FLOAT, [])
    often = helper.make_tensor("often", TensorProto.INT64, [], [2**62])
    loop = helper.make_node("Loop", ["often", "", "start"], ["end"], body=body)
    graph = helper.make_graph([loop], "endless", [start], [end], [often])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signals")
@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit, type("Ended", (BaseException,), {})])
def test_every_end_of_the_program_stops_a_run(tmp_path, ending):
    """Ctrl-C and other signals: a run that went on would keep the process alive for minutes."""

    def end(number, frame):
        raise ending

    def send():
        # Threads that earlier tests left may end meanwhile.
        while not set(threading.enumerate()) - known:
            os.sched_yield()
        os.kill(os.getpid(), signal.SIGUSR1)  # the thread that runs the graph is there

    before = signal.signal(signal.SIGUSR1, end)
    try:
        with Session(endless(tmp_path / "endless.onnx"), "vae_decoder", SessionOptions()) as session:
            sender = threading.Thread(target=send)
            known = {*threading.enumerate(), sender}
            with pytest.raises(ending):
                sender.start()
                session.run(start=np.ones((), np.float32))
        sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
