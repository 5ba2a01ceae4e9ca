"""The limits of this machine: the rates of bare matrix products, and the bandwidth of a copy.

    python benchmarks/limits.py [--rows 768] [--inner 3072] [--columns 9216] [--repeat 5] [-d DIR --size 256]

onnxruntime computes products of one size in alternating rounds, each form in a session of its own: float32, 8-bit
integers in the forms in which weights can be stored (int8 builds store panels), and MatMulNBits. With a model
directory, the script also counts the operations of one step at a size, and prints how long they would take at those
rates: a lower bound for any schedule of the same products.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from fluxonnx.contract import COMPONENT_CLASSES, TransformerConfig, open_checkpoint
from fluxonnx.errors import FluxonnxError
from fluxonnx.export.panels import panel_width
from fluxonnx.export.transformer import read_config
from fluxonnx.measure.speed import parse_size
from fluxonnx.measure.tables import machine, table

TEXT_TOKENS = 512
UNPACKED = {"session.disable_prepacking": "1"}
# Makes onnxruntime convert signed weights to unsigned ones, whose products cannot saturate.
UNSIGNED = {"session.x64quantprecision": "1"}


def product(
    op: str,
    rows: int,
    dtype: int,
    weights: dict[str, np.ndarray],
    config: dict[str, str],
    domain: str = "",
    **attributes: Any,
) -> Callable[[], object]:
    """Return a function that computes one product; `weights` are the inputs after x, in order."""
    inner = attributes.get("K") or next(iter(weights.values())).shape[-2]
    node = helper.make_node(op, ["x", *weights], ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        op,
        [helper.make_tensor_value_info("x", dtype, [rows, inner])],
        [helper.make_tensor_value_info("y", TensorProto.INT32 if op == "MatMulInteger" else TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Threads of a session wait for its next run in a busy loop, which would slow the other sessions down.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    values = rng.standard_normal((rows, inner), np.float32)
    x = values if dtype == TensorProto.FLOAT else rng.integers(0, 225, (rows, inner)).astype(np.uint8)
    # Every result goes to the same buffer, as within a step. A new buffer from the system for each would cost more than
    # a third of the time of the fastest products.
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(session.run(None, {"x": x})[0]))
    return lambda: session.run_with_iobinding(binding)


def products(rows: int, inner: int, columns: int) -> dict[str, Callable[[], object]]:
    """Return all forms of the product, by their names in the table."""
    rng = np.random.default_rng(1)
    floats = rng.standard_normal((inner, columns), np.float32)
    signed = rng.integers(-72, 73, (inner, columns)).astype(np.int8)  # so small that no pair of products saturates
    unsigned = (signed.astype(np.int16) + 128).astype(np.uint8)
    x_zero, w_zero = np.array(112, np.uint8), np.array(128, np.uint8)
    panels = signed.reshape(inner, -1, panel_width(columns, 1)).transpose(1, 0, 2).copy()
    u8 = TensorProto.UINT8
    found = {
        "float32": product("MatMul", rows, TensorProto.FLOAT, {"w": floats}, {}),
        "uint8 x int8, in panels": product("MatMulInteger", rows, u8, {"w": panels, "a": x_zero}, UNPACKED),
        "uint8 x int8, packed": product("MatMulInteger", rows, u8, {"w": signed, "a": x_zero}, {}),
        "uint8 x int8, not packed": product("MatMulInteger", rows, u8, {"w": signed, "a": x_zero}, UNPACKED),
        "uint8 x int8 made unsigned": product("MatMulInteger", rows, u8, {"w": signed, "a": x_zero}, UNSIGNED),
        "uint8 x uint8, packed": product("MatMulInteger", rows, u8, {"w": unsigned, "a": x_zero, "b": w_zero}, {}),
    }
    for bits, block in ((4, 64), (8, 64)):
        blocks = inner // block
        packed = rng.integers(0, 256, (columns, blocks, block * bits // 8)).astype(np.uint8)
        scales = np.full((columns, blocks), 0.01, np.float32)
        sizes = {"K": inner, "N": columns, "bits": bits, "block_size": block, "accuracy_level": 4}
        found[f"MatMulNBits, {bits} bits"] = product(
            "MatMulNBits", rows, TensorProto.FLOAT, {"w": packed, "s": scales}, {}, "com.microsoft", **sizes
        )
    return found


def seconds_of(calls: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Return the median seconds of each call over alternating rounds; the first round is dropped."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeat + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    return {name: median(values[1:]) for name, values in found.items()}


def operations_of_a_step(c: TransformerConfig, tokens: int) -> tuple[float, float]:
    """Return the operations of a step's linears, and of its attention: two for each multiply-add.

    The last block computes only keys and values of the text tokens.
    """
    linear = c.dim * (4 * c.dim + 3 * c.mlp_dim)  # parameters of one stream of a double block, and of a single block
    total = TEXT_TOKENS + tokens
    layers = c.double_layers + c.single_layers
    products = total * linear * layers - TEXT_TOKENS * (linear - 2 * c.dim**2)
    pairs = total * (total * layers - TEXT_TOKENS)
    return 2.0 * products, 4.0 * pairs * c.dim


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns 0, or 1 if the model can't be read."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="See the docstring of this file for more."
    )
    parser.add_argument("--rows", type=int, default=768, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--inner", type=int, default=3072, metavar="N", help="inputs (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=9216, metavar="N", help="outputs (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("-d", "--dir", help="model directory; the operations of its step are counted")
    parser.add_argument("--size", default="256", metavar="WxH", help="size of its pictures (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.repeat < 1:
        parser.error("argument --repeat: must be at least 1")
    here = machine()
    print(f"{here['processor']}, {here['cores']} cores; {arguments.rows} x {arguments.inner} x {arguments.columns}\n")
    found = seconds_of(products(arguments.rows, arguments.inner, arguments.columns), arguments.repeat)
    rates = {name: 2e-9 * arguments.rows * arguments.inner * arguments.columns / s for name, s in found.items()}
    times = {name: rate / rates["float32"] for name, rate in rates.items()}
    print(table(["product", "GOPS", "times float32"], [[n, f"{rates[n]:.0f}", f"{times[n]:.2f}"] for n in rates]))

    source = np.ones(1 << 28, np.uint8)
    target = np.empty_like(source)
    copy = seconds_of({"copy": lambda: np.copyto(target, source)}, arguments.repeat)["copy"]
    print(f"\nA copy, one thread: {2 * source.nbytes / copy / 1e9:.1f} GB/s read and written")
    if arguments.dir is None:
        return 0
    try:
        width, height = parse_size(arguments.size)
        checkpoint = open_checkpoint(arguments.dir)
        config = read_config(checkpoint.config("transformer", COMPONENT_CLASSES["transformer"]))
    except FluxonnxError as error:
        print(f"limits: {error}", file=sys.stderr)
        return 1
    linear, attention = operations_of_a_step(config, width * height // 256)
    print(
        f"\nA step at {width}x{height}: {linear / 1e12:.2f} T operations in linears, "
        f"{attention / 1e12:.2f} T in attention\n"
    )
    in_floats = attention / rates["float32"] / 1e9
    rows = [
        [name, f"{linear / rate / 1e9:.1f}", f"{linear / rate / 1e9 + in_floats:.1f}"] for name, rate in rates.items()
    ]
    print(table(["at the rate of", "linears, s", "with attention in float32, s"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
