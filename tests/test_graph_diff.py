"""`tools/graph_diff.py`: what counts as a difference, and that a change is reported only where it was made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tools import graph_diff
from tools.graph_match import resolve

LAYERS, WIDTH = 4, 8
WEIGHT_BYTES = WIDTH * WIDTH * 4


def node(op: str, inputs: str, name: str, **attributes: object) -> NodeProto:
    """Return a node whose output has the node's name."""
    return helper.make_node(op, inputs.split(), [name], name=name, **attributes)


def external(name: str, offset: int, file: str = "weights.safetensors", dtype: int = TensorProto.FLOAT) -> TensorProto:
    tensor = TensorProto(name=name, data_type=dtype, dims=[WIDTH, WIDTH], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", file), ("offset", offset), ("length", WEIGHT_BYTES)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(nodes: list[NodeProto], tensors: list[TensorProto] | None = None, **metadata: str) -> ModelProto:
    """Return a model that computes the last node's output from x."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH]) for name in ("x", nodes[-1].name)]
    made = helper.make_model(helper.make_graph(nodes, "test", values[:1], values[1:], tensors or []))
    helper.set_model_props(made, metadata)
    return made


def blocks(activation: str = "Relu") -> ModelProto:
    """Return a model of repeated layers: x + activation(x @ w)."""
    nodes, last = [], "x"
    for index in range(LAYERS):
        scope = f"/blocks.{index}"
        nodes += [
            node("MatMul", f"{last} blocks.{index}.w", f"{scope}/mlp/MatMul"),
            node(activation, f"{scope}/mlp/MatMul", f"{scope}/mlp/{activation}"),
            node("Add", f"{last} {scope}/mlp/{activation}", f"{scope}/Add"),
        ]
        last = nodes[-1].name
    nodes.append(node("Identity", last, "y"))
    return model(nodes, [external(f"blocks.{index}.w", index * WEIGHT_BYTES) for index in range(LAYERS)])


def renamed(old: ModelProto, tensors: bool = True) -> ModelProto:
    """Return the same model with other names for everything but its inputs and outputs."""
    new = ModelProto()
    new.CopyFrom(old)
    kept = {value.name for value in (*new.graph.input, *new.graph.output)}
    kept |= set() if tensors else {tensor.name for tensor in new.graph.initializer}
    for proto in new.graph.node:
        proto.name = f"renamed{proto.name}"
        for names in (proto.input, proto.output):
            names[:] = [name if name in kept else f"renamed {name}" for name in names]
    for tensor in new.graph.initializer if tensors else ():
        tensor.name = f"renamed {tensor.name}"
    return new


def edited(old: ModelProto, edit: Callable[[ModelProto], object]) -> ModelProto:
    new = ModelProto()
    new.CopyFrom(old)
    edit(new)
    return new


def differ(old: ModelProto, new: ModelProto) -> graph_diff.Diff:
    return graph_diff.compare(resolve(old), resolve(new))


def text(old: ModelProto, new: ModelProto, everything: bool = False) -> str:
    return "\n".join(graph_diff.report(differ(old, new), everything))


def chain(length: int, ops: tuple[str, ...], inserted: tuple[int, ...] = ()) -> ModelProto:
    """Return a chain without any names to go by; `inserted` are the positions of additional nodes."""
    nodes, last = [], "x"
    for index in range(length):
        for op in (*["Neg"] * (index in inserted), ops[index % len(ops)]):
            nodes.append(helper.make_node(op, [last], [f"v{len(nodes)}"]))
            last = nodes[-1].output[0]
    nodes.append(node("Identity", last, "y"))
    return model(nodes)


def test_identical_graphs():
    assert text(blocks(), blocks()) == "identical"


def test_names_are_no_difference():
    assert text(blocks(), renamed(blocks())) == "renamed only"


def test_swapped_names_of_weights_are_no_difference():
    def swap(new: ModelProto) -> None:
        first, second = new.graph.initializer[0], new.graph.initializer[1]
        first.name, second.name = second.name, first.name
        new.graph.node[0].input[1], new.graph.node[3].input[1] = first.name, second.name

    assert text(blocks(), edited(blocks(), swap)) == "renamed only"


def test_order_is_reported_but_no_difference():
    nodes = [node("Relu", "x", "/a/Relu"), node("Neg", "x", "/b/Neg"), node("Add", "/a/Relu /b/Neg", "y")]
    found = text(model(nodes), model([nodes[1], nodes[0], nodes[2]]))
    assert found.splitlines() == [
        "identical", "same nodes, other order: first difference at node 0: Relu /a -> Neg /b"
    ]  # fmt: skip


@pytest.mark.parametrize("ops", [("Relu",), ("Relu", "Exp"), ("Relu", "Exp", "Tanh", "Abs", "Sin")])
@pytest.mark.parametrize("inserted", [(0,), (2,), (49,), (2, 47), (2, 20, 30)])
def test_inserted_nodes_are_the_only_difference(ops, inserted):
    found = differ(chain(50, ops), chain(50, ops, inserted))
    assert (len(found.removed), len(found.added)) == (0, len(inserted))
    assert text(chain(50, ops, inserted), chain(50, ops)).startswith(f"{len(inserted)} nodes removed, 0 added (")


def test_inserted_node_says_what_it_feeds():
    found = text(chain(3, ("Relu", "Exp")), chain(3, ("Relu", "Exp"), (1,))).splitlines()
    assert found == [
        "0 nodes removed, 1 added (4 -> 5 nodes)",
        "operators:",
        "  Neg: 0 -> 1",
        "/",
        "  + Neg /",
        "  ~ Exp /: input 0: Relu / -> Neg /",
    ]


def test_changed_attribute():
    nodes = [node("Softmax", "x", "/a/Softmax", axis=1), node("Relu", "/a/Softmax", "y")]
    changed = [node("Softmax", "x", "/a/Softmax", axis=0), nodes[1]]
    assert text(model(nodes), model(changed)).splitlines() == [
        "1 nodes removed, 1 added (2 -> 2 nodes)",
        "a",
        "  - Softmax(axis=1)  float[rows, 8] -> ?",
        "  + Softmax(axis=0)  float[rows, 8] -> ?",
        "  ~ Relu /: input 0: Softmax -> Softmax",
    ]


@pytest.mark.parametrize("value", [np.float32([2]), np.float64([1]), np.float32([[1]])])
def test_changed_constant_is_a_changed_node(value):
    nodes = [node("Mul", "x c", "/Mul"), node("Relu", "/Mul", "y")]
    old = model(nodes, [numpy_helper.from_array(np.float32([1]), "c")])
    found = differ(old, model(nodes, [numpy_helper.from_array(value, "c")]))
    assert (found.removed, found.added, found.rewired[1:], found.replaced) == ([0], [0], [], [])


def test_swapped_inputs_are_a_difference():
    nodes = [node("Relu", "x", "/Relu"), node("Neg", "x", "/Neg"), node("Add", "/Relu /Neg", "y")]
    found = text(model(nodes), model([*nodes[:2], node("Add", "/Neg /Relu", "y")])).splitlines()
    assert found[0] == "same nodes, 2 inputs rewired (3 -> 3 nodes)"
    assert "  ~ Add /: input 0: Relu / -> Neg /" in found


def test_duplicates_count():
    nodes = [node("Relu", "x", "a"), node("Relu", "x", "b"), node("Add", "a b", "y")]
    found = differ(model(nodes), model([*nodes[:2], node("Add", "a a", "y")]))
    assert (found.removed, found.added, len(found.rewired)) == ([], [], 1)
    assert not differ(model(nodes), renamed(model(nodes))).size


def test_moved_weights():
    def shift(new: ModelProto) -> None:
        for tensor in new.graph.initializer:
            tensor.external_data[1].value = str(int(tensor.external_data[1].value) + WEIGHT_BYTES)

    # Each weight is now where another one was: names tell that they moved or, without them, the structure does.
    for tensors in (False, True):
        assert text(blocks(), renamed(edited(blocks(), shift), tensors)).splitlines() == [
            f"same nodes, {LAYERS} weights changed (13 -> 13 nodes)",
            "weights:",
            f"  ~ moved in weights.safetensors  (x {LAYERS})",
        ]


def test_changed_weights():
    def change(new: ModelProto) -> None:
        new.graph.initializer[0].CopyFrom(external("blocks.0.w", 0, dtype=TensorProto.FLOAT16))
        new.graph.initializer[1].CopyFrom(external("blocks.1.w", WEIGHT_BYTES, "other.safetensors"))

    assert text(blocks(), edited(blocks(), change)).splitlines()[2:] == [
        "  ~ blocks.0.w: float[8, 8] -> float16[8, 8] weights.safetensors",
        "  ~ blocks.1.w: weights.safetensors@256+256 -> other.safetensors@256+256",
    ]


@pytest.mark.parametrize("names", [False, True])
def test_repeated_layers_are_folded(names):
    changed = blocks("Sigmoid") if names else renamed(blocks("Sigmoid"), tensors=False)
    found = text(blocks(), changed).splitlines()
    assert found[0] == "4 nodes removed, 4 added (13 -> 13 nodes)"
    assert found[4:6] == ["x 4: blocks.0 ... .3", "  - Relu mlp"]
    assert len(found) == 8


def test_title_of_layers():
    assert graph_diff.title(["a.3", "a.5", "b"]) == "x 3: b, a.3 .5"


def test_interface_and_metadata():
    old = model([node("Relu", "x", "y")], version="1", precision="int8", architecture="a" * 100 + "b")
    new = edited(old, lambda new: helper.set_model_props(new, {"version": "2", "architecture": "a" * 100 + "c"}))
    new.producer_version, new.doc_string, new.graph.node[0].doc_string = "3", "other", "other"
    new.graph.input[0].name = new.graph.node[0].input[0] = "z"
    new.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    new.opset_import[0].version = 17
    opset = old.opset_import[0].version
    assert text(old, new).splitlines() == [
        "same nodes, other interface or metadata (1 -> 1 nodes)",
        "inputs, outputs, metadata:",
        "  input x float[rows, 8] -> z float[rows, 8]",
        "  output y float[rows, 8] -> y float16[rows, 8]",
        f"  metadata architecture: ...{'a' * 30}b -> ...{'a' * 30}c",
        "  metadata precision: int8 -> (none)",
        f"  opset of ai.onnx: {opset} -> 17",
    ]
    assert text(old, edited(old, lambda new: helper.set_model_props(new, {"version": "2"}))).startswith("same nodes")


def test_output_computed_by_another_node():
    nodes = [node("Relu", "x", "a"), node("Relu", "a", "b"), node("Neg", "a", "y")]
    old, new = model(nodes), model(nodes)
    for made, name in ((old, "a"), (new, "b")):
        made.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH]))
    new.graph.output[1].name = new.graph.node[1].output[0] = "a"
    new.graph.node[0].output[0] = new.graph.node[1].input[0] = new.graph.node[2].input[0] = "c"
    assert "  output a from: Relu / -> Relu /" in text(old, new).splitlines()


def test_long_reports_are_cut():
    old, new = (chain(60, (op,)) for op in ("Relu", "Exp"))
    for made in (old, new):
        for index, proto in enumerate(made.graph.node):
            proto.name = f"/scope{index}/{proto.op_type}"
    assert len(text(old, new).splitlines()) < 30 < 120 < len(text(old, new, everything=True).splitlines())


def save(path: Path, made: ModelProto) -> str:
    onnx.save(made, path)
    return str(path)


def test_exit_status(tmp_path, capsys):
    paths = [save(tmp_path / f"{name}.onnx", made) for name, made in
             (("a", blocks()), ("b", renamed(blocks())), ("c", blocks("Sigmoid")))]  # fmt: skip
    assert graph_diff.main(paths[:2]) == 0
    assert capsys.readouterr().out == f"{paths[0]} -> {paths[1]}: renamed only\n"
    assert graph_diff.main([*paths[1:], "--all"]) == 1
    assert "+ Sigmoid" in capsys.readouterr().out


def unreadable(directory: Path) -> dict[str, Path]:
    (directory / "empty.onnx").write_bytes(b"")
    (directory / "text.onnx").write_text("no protobuf")
    (directory / "empty").mkdir()
    disordered = model([node("Relu", "later", "a"), node("Relu", "x", "later"), node("Neg", "a", "y")])
    onnx.save(disordered, directory / "disordered.onnx")
    names = ("empty.onnx", "text.onnx", "missing.onnx", "disordered.onnx", "empty")
    return {name: directory / name for name in names}


@pytest.mark.parametrize("name", ["empty.onnx", "text.onnx", "missing.onnx", "disordered.onnx", "empty"])
def test_errors_are_one_line(tmp_path, capsys, name):
    path = str(unreadable(tmp_path)[name])
    assert graph_diff.main([path, path]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert path in captured.err


def test_wrong_usage(tmp_path, capsys):
    assert graph_diff.main([str(tmp_path), save(tmp_path / "a.onnx", blocks())]) == 2
    assert "two files or two directories" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        graph_diff.main(["only-one.onnx"])


def test_directories(tmp_path, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    for directory, names in ((old, ("same", "other", "gone")), (new, ("same", "other", "came"))):
        directory.mkdir()
        for name in names:
            onnx.save(blocks("Exp" if (directory, name) == (new, "other") else "Relu"), directory / f"{name}.onnx")
    assert graph_diff.main([str(old), str(new)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"only in {old}: gone.onnx", f"only in {new}: came.onnx"]
    assert lines[2].startswith(f"{old / 'other.onnx'} -> {new / 'other.onnx'}: 4 nodes removed, 4 added")
    assert lines[-1] == f"{old / 'same.onnx'} -> {new / 'same.onnx'}: identical"
    for name in ("gone", "other"):
        (old / f"{name}.onnx").unlink()
    assert graph_diff.main([str(old), str(old)]) == 0


def test_runs_as_a_script(tmp_path):
    path = save(tmp_path / "a.onnx", blocks())
    done = subprocess.run([sys.executable, graph_diff.__file__, path, path], capture_output=True, text=True, check=True)
    assert done.stdout == f"{path} -> {path}: identical\n"
