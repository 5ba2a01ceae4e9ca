"""`fluxonnx inspect`: what an ONNX file holds, for ours and others, intact and damaged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fluxonnx.check.inspect import inspect
from fluxonnx.check.shapes import evaluate
from fluxonnx.check.work import count, symbols
from fluxonnx.checkpoint.manifest import graph_file
from fluxonnx.cli import main
from fluxonnx.contract import COMPONENTS
from fluxonnx.errors import CheckpointError
from tests.support import Case

CASE = Case("odd-heads")


@pytest.fixture(scope="module")
def exported(checkpoints) -> Path:
    return checkpoints.exported(CASE)


@pytest.fixture
def model(exported, tmp_path) -> Path:
    """A copy of an exported model, which the test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_graph_of_ours(exported, component):
    found = inspect(exported / graph_file(component, "bf16", "ort"), 64, 96, 32)
    assert found.problems == []
    assert (found.metadata["component"], found.metadata["precision"]) == (component, "bf16")
    assert all(file.digest for file in found.external), "each weight file is compared with the manifest"
    assert found.work.unknown == {}, "every shape is known"
    assert found.work.free == ()
    assert (found.work.total == 0) == (component == "conditioning")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "flavour"), [("int8", "ort"), ("int4", "ort"), ("fp32", "portable")])
def test_other_builds_do_the_same_products(checkpoints, exported, precision, flavour):
    root = checkpoints.exported(CASE, precision, flavour)
    for component in ("text_encoder", "transformer", "vae_decoder"):
        here = inspect(exported / graph_file(component, "bf16", "ort"), 64, 64, 32).work
        there = inspect(root / graph_file(component, precision, flavour), 64, 64, 32).work
        assert there.unknown == {}
        # Some turn or average values by small products, too.
        assert here.total <= there.total <= 1.5 * here.total


def test_work_of_the_transformers_products(exported):
    """Attention's two products are queries x keys x width, in each block; the last one has no queries of the text."""
    sizes = json.loads(inspect(exported / "transformer.onnx").metadata["architecture"])
    found = inspect(exported / "transformer.onnx", 64, 128, 16)
    image, width = 4 * 8, sizes["heads"] * sizes["head_dim"]
    tokens, blocks = image + 16, sizes["double_layers"] + sizes["single_layers"]
    assert found.work.by_operator["MultiHeadAttention"] == 2 * width * tokens * ((blocks - 1) * tokens + image)


def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def write(path: Path, nodes: list, inputs: list, outputs: list, tensors: tuple = (), **options) -> Path:
    graph = helper.make_graph(nodes, "foreign", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 17)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8, **options).SerializeToString())
    return path


@pytest.mark.parametrize(
    ("node", "shapes", "output", "work"),
    [
        (("MatMul", {}), [(2, 3, 5), (5, 7)], (2, 3, 7), 2 * 3 * 5 * 7),
        (("MatMul", {}), [(2, 3, 5), (2, 5, 7)], (2, 3, 7), 2 * 3 * 5 * 7),
        (("MatMul", {}), [(3, 5), (2, 5, 7)], (2, 3, 7), 2 * 3 * 5 * 7),
        (("MatMul", {}), [(5,), (5, 7)], (7,), 5 * 7),
        (("MatMul", {}), [(3, 5), (5,)], (3,), 3 * 5),
        (("Gemm", {"transB": 1}), [(3, 5), (7, 5)], (3, 7), 3 * 5 * 7),
        (("Gemm", {"transA": 1}), [(5, 3), (5, 7)], (3, 7), 3 * 5 * 7),
        (("Conv", {"pads": [1] * 4}), [(1, 4, 8, 8), (6, 4, 3, 3)], (1, 6, 8, 8), 6 * 64 * 4 * 9),
        (("Conv", {"group": 2}), [(1, 4, 8, 8), (6, 2, 1, 1)], (1, 6, 8, 8), 6 * 64 * 2),
        (("ConvTranspose", {"strides": [2, 2]}), [(1, 4, 8, 8), (4, 6, 2, 2)], (1, 6, 16, 16), 4 * 64 * 6 * 4),
    ],
)
def test_work_of_one_operator(tmp_path, node, shapes, output, work):
    kind, attributes = node
    inputs = [value(f"x{i}", *shape) for i, shape in enumerate(shapes)]
    nodes = [helper.make_node(kind, [item.name for item in inputs], ["y"], **attributes)]
    path = write(tmp_path / "g.onnx", nodes, inputs, [value("y", *output)])
    assert count(onnx.load(path), {}).by_operator == {kind: work}


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("text_seq + image_seq", 12),
        ("height/16", 3),
        ("2 * batch", 2),
        ("other", None),
        ("batch/0", None),
        ("batch.real", None),
        ("f(batch)", None),
        ("batch ** 9", None),
        ("(" * 5000, None),
        ("", None),
    ],
)
def test_names_of_dimensions(name, number):
    assert evaluate(name, {"text_seq": 5, "image_seq": 7, "height": 48, "batch": 1}) == number


def test_symbols_of_a_picture():
    assert symbols(64, 32, 7)["joint_seq"] == 7 + 4 * 2


def test_a_foreign_file(tmp_path, capsys):
    """No metadata, a symbol that is not ours, a branch, a constant node, and an initializer listed as an input."""
    weights = numpy_helper.from_array(np.ones((4, 6), np.float32), "w")
    branch = helper.make_graph([helper.make_node("Mul", ["y", "y"], ["b"])], "branch", [], [value("b", "rows", 6)])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch),
    ]
    inputs = [value("x", "rows", 4), value("w", 4, 6)]
    path = write(tmp_path / "foreign.onnx", nodes, inputs, [value("z", "rows", 6)], (weights,))
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "work: not known whole, as 'rows' has no number: give it with --dim NAME=N" in text
    assert "external data: none" in text
    assert main(["inspect", str(path), "--dim", "rows=5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["intact"]
    assert found["work"]["total"] == 5 * 4 * 6
    assert found["operators"] == {"Mul": 2, "MatMul": 1, "Constant": 1, "If": 1}
    assert [item["name"] for item in found["inputs"]] == ["x"]
    assert {item["type"]: item["values"] for item in found["parameters"]} == {"float32": 24, "bool": 1}


def test_external_data_without_a_manifest(tmp_path):
    """Two tensors may share bytes; only what is needed has to be there."""
    (tmp_path / "data.bin").write_bytes(bytes(100))
    tensors = []
    for name, offset in (("a", 0), ("b", 0), ("c", 64)):
        tensor = TensorProto(name=name, dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
        for key, text in (("location", "data.bin"), ("offset", str(offset)), ("length", "16")):
            tensor.external_data.add(key=key, value=text)
        tensors.append(tensor)
    nodes = [helper.make_node("Sum", ["a", "b", "c"], ["y"])]
    path = write(tmp_path / "g.onnx", nodes, [], [value("y", 4)], tuple(tensors))
    found = inspect(path)
    (file,) = found.external
    assert (file.tensors, file.bytes, file.file_bytes, file.digest, file.problem) == (3, 32, 100, None, None)


def truncate(root: Path) -> None:
    file = root / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def replace(root: Path) -> None:
    file = root / "transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def make_folder(root: Path) -> None:
    file = root / "transformer/diffusion_pytorch_model.safetensors"
    file.unlink()
    file.mkdir()


def make_link(root: Path) -> None:
    (root / "transformer").rename(root / "elsewhere")
    (root / "transformer").symlink_to(root / "elsewhere")


def edited(change: Callable[[onnx.ModelProto], None]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        graph = onnx.load(root / "transformer.onnx", load_external_data=False)
        change(graph)
        (root / "transformer.onnx").write_bytes(graph.SerializeToString())
        (root / "fluxonnx.json").unlink()

    return damage


def entry(key: str, text: str) -> Callable[[Path], None]:
    def change(graph: onnx.ModelProto) -> None:
        tensor = next(item for item in graph.graph.initializer if item.external_data)
        for found in tensor.external_data:
            if found.key == key:
                found.value = text

    return edited(change)


DAMAGES = {
    "missing": (
        lambda root: (root / "transformer/diffusion_pytorch_model.safetensors").unlink(),
        "is missing: bring it back, or export again with --force",
    ),
    "folder": (make_folder, "is not a regular file"),
    "link": (make_link, "transformer is a symbolic link, which ONNX can't use for weights"),
    "truncated": (truncate, "is truncated: .* bytes, but .* ends at"),
    "replaced": (replace, "is not the file that the graph was exported with: export again with --force"),
    "graph": (
        lambda root: shutil.copyfile(root / "vae_encoder.onnx", root / "transformer.onnx"),
        "is not the graph that fluxonnx.json tells of: export again with --force",
    ),
    "manifest": (lambda root: (root / "fluxonnx.json").write_text("{"), "fluxonnx.json"),
    "node": (edited(lambda graph: graph.graph.node.pop(3)), "takes .*, which nothing makes before it"),
    "last node": (edited(lambda graph: graph.graph.node.pop()), "the output 'velocity' is made by no node"),
    "outside": (entry("location", "../secret"), "outside the graph's folder"),
    "absolute": (entry("location", "/etc/passwd"), "outside the graph's folder"),
    "drive": (entry("location", "C:\\weights"), "outside the graph's folder"),
    "no place": (entry("location", ""), "have no location"),
    "no number": (entry("offset", "x"), "is no number"),
    "negative": (entry("offset", "-1"), "is negative"),
    "beyond": (entry("offset", str(2**62)), "is truncated"),
    "length": (entry("length", "1"), "have 1 bytes, but .* needs"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_in_one_line(model, capsys, name):
    damage, pattern = DAMAGES[name]
    try:
        damage(model)
    except OSError as error:  # Windows, where links need a right
        pytest.skip(str(error))
    assert main(["inspect", str(model / "transformer.onnx")]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(str(model)), "what can be told is told all the same"
    (line,) = captured.err.splitlines()
    assert line.startswith("fluxonnx: ")

    assert re.search(pattern, line), line
    assert main(["inspect", "--json", str(model / "transformer.onnx")]) == 1
    assert not json.loads(capsys.readouterr().out)["intact"]


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "is no ONNX file, or a damaged one"),
        (b"\x00\x01 what", "is no ONNX file, or a damaged one"),
        (b"hello, world" * 100, "is no ONNX file, or a damaged one"),
        (b"version https://git-lfs.github.com/spec/v1", "is a git-LFS pointer"),
        (b"<!doctype html>", "is a web page"),
    ],
)
def test_other_files(tmp_path, fails, content, pattern):
    (tmp_path / "x.onnx").write_bytes(content)
    fails(1, pattern, "inspect", tmp_path / "x.onnx")


def test_no_file(tmp_path, fails):
    fails(1, "is a folder: name one of its .onnx files", "inspect", tmp_path)
    fails(1, "can't be read: No such file", "inspect", tmp_path / "none.onnx")
    with (tmp_path / "large.onnx").open("wb") as file:
        file.truncate(2**31)  # sparse: it takes no room
    fails(1, "has 2147483648 bytes, but an ONNX file has at most 2 GB", "inspect", tmp_path / "large.onnx")
    fails(2, "size 'big' is not a size", "inspect", tmp_path, "--size", "big")


def test_truncated_graphs(exported, tmp_path):
    """A graph cut anywhere is refused, or its report tells of the damage."""
    content = (exported / "vae_encoder.onnx").read_bytes()
    shutil.copytree(exported / "vae", tmp_path / "vae")
    for end in np.linspace(0, len(content) - 1, 40).astype(int):
        (tmp_path / "cut.onnx").write_bytes(content[:end])
        try:
            found = inspect(tmp_path / "cut.onnx")
        except CheckpointError:
            continue
        assert found.problems or len(content) - end < 2000, "only metadata, which are last, can be lost unseen"


@pytest.mark.parametrize(
    "flags", [["--text-seq", "0"], ["--text-seq", "x"], ["--dim", "5"], ["--dim", "a=b"], ["--dim", "=1"]]
)
def test_wrong_numbers(tmp_path, capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", str(tmp_path), *flags])
    assert flags[0] in capsys.readouterr().err


def test_changed_bytes_are_never_a_traceback(exported, tmp_path, capsys):
    """Any byte of a graph may be another: the report is printed, or one line says what is wrong."""
    shutil.copytree(exported / "vae", tmp_path / "vae")
    shutil.copyfile(exported / "fluxonnx.json", tmp_path / "fluxonnx.json")
    content = (exported / "vae_encoder.onnx").read_bytes()
    random = np.random.default_rng(3)
    for name in ("vae_encoder.onnx", "unknown.onnx") * 10:
        changed = bytearray(content)
        for place in random.integers(0, len(content), 30):
            changed[place] = random.integers(256)
        (tmp_path / name).write_bytes(changed)
        code = main(["inspect", "--json", str(tmp_path / name)])
        captured = capsys.readouterr()
        assert "internal error" not in captured.err
        assert (code == 0) == (captured.err == "")
        if captured.out:
            assert json.loads(captured.out)["intact"] == (code == 0)


@pytest.mark.parametrize(
    "text", [b"hidden_states", b"bf16", b"transformer/diffusion_pytorch_model.safetensors", b"Gemm"]
)
def test_names_that_are_no_text(model, fails, text):
    """protobuf returns bytes in the place of text then."""
    path = model / "transformer.onnx"
    content = path.read_bytes()
    assert text in content
    path.write_bytes(content.replace(text, b"\xff" + text[1:], 1))
    fails(1, "is a damaged ONNX file, with names that are no text", "inspect", path)


@pytest.mark.parametrize("dims", [(2**62,) * 70, (-1, 4), (2**63 - 1,) * 3])
def test_shapes_that_cannot_be(tmp_path, fails, capsys, dims):
    tensor = TensorProto(name="w", dims=dims, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="data.bin")
    (tmp_path / "data.bin").write_bytes(bytes(10))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = write(tmp_path / "g.onnx", nodes, [value("x", 2**62, 2**62)], [value("y", "n")], (tensor,))
    assert main(["inspect", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "has a shape that can't be" in line or "is truncated" in line


def test_a_large_constant_is_not_made(tmp_path):
    """A small file may ask for an array of terabytes."""
    shape = numpy_helper.from_array(np.array([2**40, 2**20]), "shape")
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["c"]), helper.make_node("MatMul", ["c", "c"], ["y"])]
    found = inspect(write(tmp_path / "g.onnx", nodes, [], [value("y", "n")], (shape,)))
    assert found.work.by_operator == {"MatMul": 2**40 * 2**20 * 2**20}


def test_functions_are_not_counted(tmp_path):
    inner = helper.make_node("MatMul", ["a", "a"], ["b"])
    function = helper.make_function("mine", "Square", ["a"], ["b"], [inner], [helper.make_opsetid("", 17)])
    nodes = [helper.make_node("Square", ["x"], ["y"], domain="mine")]
    path = write(tmp_path / "g.onnx", nodes, [value("x", 4, 4)], [value("y", 4, 4)], functions=[function])
    found = inspect(path)
    assert found.operators == {"MatMul": 1, "mine.Square": 1}
    assert found.work.unknown == {"Square": 1}
