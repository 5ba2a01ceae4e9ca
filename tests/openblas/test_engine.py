"""Parts of the openblas provider: memory, threads, BLAS libraries, and what is said of what it can't run."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import fluxonnx
from fluxonnx.cli import main
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.openblas.arena import Arena
from fluxonnx.openblas.backend import BlasBackend
from fluxonnx.openblas.gemm import VARIABLE, find_blas, one_thread_per_call
from fluxonnx.openblas.graph import Graph
from fluxonnx.openblas.ops.elementwise import halve
from fluxonnx.openblas.ops.linear import panels
from fluxonnx.openblas.workers import Workers
from tests.support import Case, optional, relative_error

pytestmark = optional("threadpoolctl")

RNG = np.random.default_rng(3)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def model_of(nodes, inputs: dict[str, np.ndarray], constants=(), opset: int = 17) -> onnx.ModelProto:
    """A graph of some nodes, the last of which computes y."""
    takes = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in inputs.items()
    ]
    gives = [helper.make_empty_tensor_value_info("y")]
    graph = helper.make_graph(nodes, "small", takes, gives, list(constants))
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(nodes, constants=(), opset: int = 17, **inputs: np.ndarray) -> np.ndarray:
    graph = Graph(model_of(nodes, inputs, constants, opset), threads=3)
    try:
        return graph.run(inputs)[0]
    finally:
        graph.close()


def test_memory_is_used_again_when_nothing_lies_in_it():
    arena = Arena()
    first = arena.empty((300, 300), np.float32)
    assert arena.lies_alone(first)
    place, view = first.ctypes.data, first[1:]
    assert not arena.lies_alone(first)
    del first
    assert arena.empty((300, 300), np.float32).ctypes.data != place
    del view
    assert arena.empty((290, 300), np.float32).ctypes.data == place


def test_a_value_with_other_readers_is_not_overwritten():
    """The sum may take the memory of x * x, but not that of what is read once more under another shape."""
    x = random(400, 400)
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["a"]),
        helper.make_node("Reshape", ["a", "flat"], ["b"]),
        helper.make_node("Neg", ["b"], ["c"]),
        helper.make_node("Reshape", ["c", "square"], ["d"]),
        helper.make_node("Add", ["a", "d"], ["y"]),
    ]
    shapes = [
        numpy_helper.from_array(np.array(shape), name) for name, shape in (("flat", [-1]), ("square", [400, 400]))
    ]
    assert not run(nodes, shapes, x=x).any()


def test_inputs_and_constants_are_not_overwritten():
    x, weight = random(600, 300), random(600, 300)
    nodes = [helper.make_node("Add", ["x", "w"], ["a"]), helper.make_node("Sqrt", ["x"], ["b"]),
             helper.make_node("Where", ["never", "b", "a"], ["y"])]  # fmt: skip
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array(False), "never")]
    before = x.copy()
    graph = Graph(model_of(nodes, {"x": x}, constants), threads=2)
    for _ in range(2):
        np.testing.assert_array_equal(graph.run({"x": x})[0], before + weight)
    np.testing.assert_array_equal(x, before)


def test_an_error_in_a_thread_is_raised():
    workers = Workers(3)

    def fail(i: int) -> None:
        raise KeyError(i)

    with pytest.raises(KeyError):
        workers.each(fail, range(20))
    done: list[int] = []
    workers.each(done.append, range(20))
    assert sorted(done) == list(range(20))
    workers.close()


@pytest.mark.parametrize("sizes", [(700, 300, 5000), (1, 4096, 4096), (5000, 64, 24), (3, 5, 7)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_panels_cover_a_product_once(sizes, threads):
    workers = Workers(threads)
    rows, inner, columns = sizes
    seen = np.zeros((rows, columns), np.int8)
    for top, bottom, left, right in panels(workers, rows, inner, columns):
        seen[top:bottom, left:right] += 1
    assert (seen == 1).all()
    workers.close()


def test_halves_are_rounded_as_numpy_does():
    """All magnitudes: normal, subnormal, too small, too large, infinite, no number, and in the middle of two."""
    values = np.concatenate([
        np.arange(1 << 16, dtype=np.uint32) << 16,
        RNG.integers(0, 1 << 32, 200_000, np.uint32),
        (RNG.integers(0x33000000, 0x47800000, 100_000, np.uint32) & ~np.uint32(0xFFF)),
    ]).view(np.float32)  # fmt: skip
    found = np.empty(len(values), np.float16)
    halve(values, found)
    with np.errstate(all="ignore"):
        expected = values.astype(np.float16)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(found[number].view(np.uint16), expected[number].view(np.uint16))
    assert np.isnan(found[~number]).all()


def numpys_library() -> str:
    from threadpoolctl import threadpool_info

    return next(entry["filepath"] for entry in threadpool_info() if entry["user_api"] == "blas")


@pytest.mark.skipif(sys.platform == "darwin", reason="threadpoolctl does not see Accelerate")
def test_another_library_can_be_pointed_to(monkeypatch):
    monkeypatch.setenv(VARIABLE, numpys_library())
    blas = find_blas()
    assert not blas.is_numpys
    a, b = random(50, 60), random(70, 60)
    wide = np.zeros((50, 200), np.float32)
    for add in (False, True):
        blas.multiply(a, b.T, wide[:, 100:170], add)
    np.testing.assert_allclose(wide[:, 100:170], 2 * (a @ b.T), rtol=1e-4, atol=1e-4)
    assert not wide[:, :100].any()
    assert not wide[:, 170:].any()
    for left, right in ((a[::2], b[:, ::-1].T), (a.T[:50], b[:, :60]), (a[:1], b.T), (a[:, :1], b[:, :1].T)):
        out = np.zeros((left.shape[0], right.shape[1]), np.float32)
        if left.shape[1] == right.shape[0]:
            blas.multiply(left, right, out)
            np.testing.assert_allclose(out, left @ right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "message"), [("no-such-blas", "no file, no library"), (__file__, "can't be loaded")])
def test_a_library_that_is_none(monkeypatch, name, message):
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(UsageError, match=f"{VARIABLE}.*{message}"):
        find_blas()


def test_threads_of_blas_are_restored():
    from threadpoolctl import threadpool_info

    def threads() -> list[int]:
        return [entry["num_threads"] for entry in threadpool_info() if entry["user_api"] == "blas"]

    before = threads()
    with one_thread_per_call():
        with one_thread_per_call():
            assert set(threads()) <= {1}
        assert set(threads()) <= {1}
    assert threads() == before


def test_without_threadpoolctl(copy_of, monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    root = copy_of(Case("tiny-random"))
    fails(
        2, "openblas.*threadpoolctl", "generate", "-d", root, "-p", "x", "--provider", "openblas", "-o", root / "x.png"
    )


CONV = {"pads": [1, 0, 2, 1], "strides": [1, 1]}


@pytest.mark.parametrize("attributes", [CONV, {"pads": [1, 1, 1, 1], "strides": [2, 2]}, {"pads": [0] * 4}])
@pytest.mark.parametrize("channels", [3, 24])
def test_convolutions_of_any_padding(attributes, channels):
    """Against the sums written out; large enough for several bands."""
    x, weight, bias = random(2, channels, 33, 21), random(5, channels, 3, 3), random(5)
    top, left, bottom, right = attributes["pads"]
    step = attributes.get("strides", [1, 1])[0]
    padded = np.pad(x, [(0, 0), (0, 0), (top, bottom), (left, right)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::step, ::step]
    expected = np.einsum("bchwij,ocij->bohw", windows, weight) + bias[:, None, None]
    found = run([helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)], x=x, w=weight, b=bias)
    assert relative_error(found, expected) < 1e-6


def test_nearest_pixels_are_repeated():
    x = random(1, 2, 3, 4)
    modes = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], **modes)
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    np.testing.assert_array_equal(run([node], [scales], x=x), x.repeat(2, axis=2).repeat(2, axis=3))


ADD = helper.make_node("Add", ["x", "w"], ["y"], name="the_sum")


def external(location: str = "w.bin", length: int = 16) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": 0, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


@pytest.mark.parametrize(
    ("tensor", "content", "message"),
    [
        (external(), None, "w.bin with the weights w can't be read.*No such file"),
        (external(), b"1234", "has 4 bytes.*export again"),
        (external(length=20), bytes(20), "said to be 20 bytes of 16"),
        (external("../w.bin"), bytes(16), "outside the graph's folder"),
        (external("/w.bin"), bytes(16), "outside the graph's folder"),
    ],
)
def test_external_data_that_is_missing_or_damaged(tmp_path, tensor, content, message):
    if content is not None:
        (tmp_path / "w.bin").write_bytes(content)
    model = model_of([ADD], {"x": random(4)}, [tensor])
    path = tmp_path / "small.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FluxonnxError, match=f"(?s){message}"):
        Graph(path)


@pytest.mark.parametrize(
    ("nodes", "opset", "message"),
    [
        ([helper.make_node("Erf", ["x"], ["y"], name="odd")], 17, "node odd is a Erf.*--provider cpu"),
        ([helper.make_node("Softmax", ["x"], ["y"], name="old")], 11, "node old is a Softmax of opset 11.*13"),
        ([helper.make_node("Neg", ["gone"], ["y"], name="lost")], 17, "node lost.*reads gone"),
        ([helper.make_node("Neg", ["x"], ["z"])], 17, "output y is computed by no node"),
    ],
)
def test_graphs_that_can_not_be_loaded(nodes, opset, message):
    with pytest.raises(FluxonnxError, match=message):
        Graph(model_of(nodes, {"x": random(4)}, opset=opset))


def test_what_fails_is_named():
    two = helper.make_node("MatMul", ["x", "w"], ["y"], name="the_product")
    with pytest.raises(FluxonnxError, match=r"node the_product \(MatMul\) failed.*float32 \[2, 3\], float32 \[2, 3\]"):
        run([two], x=random(2, 3), w=random(2, 3))
    with pytest.raises(FluxonnxError, match=r"node y \(Gather\) failed: an index is not from -2 to 1"):
        run([helper.make_node("Gather", ["x", "w"], ["y"])], x=random(2, 3), w=np.array([7]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": np.zeros(4)}, "input x is float64, but must be float32"),
        ({"x": np.zeros((4, 4), np.float32)}, r"input x is \[4, 4\], but must be \[4\]"),
        ({"z": np.zeros(4, np.float32)}, "takes x, but was given z"),
    ],
)
def test_inputs_that_do_not_fit(inputs, message):
    graph = Graph(model_of([helper.make_node("Neg", ["x"], ["y"])], {"x": random(4)}))
    with pytest.raises(FluxonnxError, match=message):
        graph.run(inputs)


def test_backend():
    x = random(3, 4)
    assert BlasBackend.supports_device("CPU")
    assert not BlasBackend.supports_device("CUDA")
    np.testing.assert_array_equal(BlasBackend.run_node(helper.make_node("Neg", ["x"], ["y"]), [x])[0], -x)
    loaded = BlasBackend.prepare(model_of([helper.make_node("Neg", ["x"], ["y"])], {"x": x}))
    np.testing.assert_array_equal(loaded.run([x])[0], loaded.run({"x": x})[0])
    with pytest.raises(UsageError, match=r"takes 1 inputs \(x\), not 2"):
        loaded.run([x, x])
    with pytest.raises(UsageError, match="device CPU"):
        BlasBackend.prepare(model_of([helper.make_node("Neg", ["x"], ["y"])], {"x": x}), "CUDA")


def test_a_file_that_is_no_graph(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(FluxonnxError, match=r"x\.onnx is no ONNX file"):
        Graph(tmp_path / "x.onnx")
    with pytest.raises(FluxonnxError, match=r"y\.onnx can't be read"):
        Graph(tmp_path / "y.onnx")


@pytest.mark.slow
def test_command_line(copy_of, tmp_path, capsys):
    """A picture with --provider openblas names it; the metadata lead back to it."""
    root = copy_of(Case("tiny-random"))
    picture = tmp_path / "x.png"
    flags = ["-p", "a cat", "-W", "64", "-H", "64", "-s", "1", "-S", "1"]
    assert main(["generate", "-d", str(root), "--provider", "openblas", *flags, "-o", str(picture)]) == 0
    assert main(["info", str(picture)]) == 0
    assert '"provider": "openblas"' in capsys.readouterr().out
    assert main(["bench", "-d", str(root), "--provider", "openblas", "--size", "64x64", "--steps", "1"]) == 0
    assert "openblas" in capsys.readouterr().out
    with fluxonnx.load(root, provider="openblas", precision="auto") as flux:
        assert flux.generate("x", 64, 64, 1, seed=1).size == (64, 64)
