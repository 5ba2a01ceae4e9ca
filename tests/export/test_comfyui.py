"""ComfyUI's transformers: names, integers and rotation are those of the file."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from safetensors.numpy import load_file, save_file

import fluxonnx
from fluxonnx import auto
from fluxonnx.checkpoint.formats import resolve
from fluxonnx.checkpoint.manifest import graph_file, read_manifest
from fluxonnx.checkpoint.safetensors import ROWS, Tensor, read_header
from fluxonnx.cli import main
from fluxonnx.contract import open_checkpoint
from fluxonnx.errors import CheckpointError
from fluxonnx.export import export
from fluxonnx.export.precisions import Int8, rounding
from fluxonnx.export.precisions.dequantised import dequantised
from fluxonnx.export.precisions.int8 import Tuning
from tests import comfyui
from tests.comfyui import Form
from tests.support import Case, aged, golden_inputs, int8_matrix, operators, relative_error, run_graph

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
GROUP = 16  # rows of 96 are no multiple of 256
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LAYER = "double_blocks.0.img_attn.proj"

FORMS = [
    Form("original", 0, True, "unnamed"),
    Form("original", 0, False, "tensor"),  # as the repacks of FLUX.2-klein-9B are
    Form("original", GROUP, True, "tensor", extras=True),
    Form("original", GROUP, False, "nested"),
    Form("diffusers", 0, False, "twice", scale="scale_weight"),
    Form("diffusers", GROUP, True, "metadata"),
    Form("prefixed", 0, True, "none", flat=True),
    Form("prefixed", GROUP, True, "metadata", extras=True),
    Form("short prefix", GROUP, True, "bare metadata"),
]

# How a product is computed depends on the rotation and on the scales, not on names and markers.
COMPUTED = FORMS[:4]

# Relative L2 between computing with the file's integers in onnxruntime and in numpy: activations between two steps are
# rounded to one or the other, and each of these is off by 1 % of the largest value of its row. How many there are
# depends on the order in which a processor adds.
ROUNDING = 3e-3


@pytest.fixture
def copy(copy_of) -> Path:
    return copy_of(CASE)


def as_diffusers(integers: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Integers [out, in] and scales [out] by diffusers' names of the layers."""
    found = {}
    for layer, (values, scale) in integers.items():
        scales = np.broadcast_to(scale.reshape(-1), values.shape[:1])
        _, block, *rest = layer.split(".", 2)
        parts = comfyui.FUSED.get(rest[0]) if rest else None
        if parts:
            for part, piece, steps in zip(parts, np.split(values, 3), np.split(scales, 3), strict=True):
                found[f"transformer_blocks.{block}.attn.{part}"] = piece, steps
            continue
        for pattern, original in comfyui.NAMES:
            if layer == original.replace(r"\1", block):
                layer = pattern.replace(r"\.", ".").replace(r"(\d+)", block)
        found[layer] = values, scales
    return found


def expected_velocity(root: Path, integers: dict[str, tuple[np.ndarray, np.ndarray]], group: int) -> np.ndarray:
    """What the float32 graph gives with the integers' weights, and with inputs rounded as ComfyUI does."""
    weights = {f"{layer}.weight": (q * s[:, None]).astype(np.float32) for layer, (q, s) in integers.items()}

    export(root, precision="fp32", flavour="portable", components=["transformer"])
    model = onnx.load(root / graph_file("transformer", "fp32", "portable"))
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}

    class MatMul(OpRun):
        op_domain = ""

        def _run(self, a, b, **attributes):
            weight = weights.get(sources.get(self.onnx_node.input[1]))
            if weight is not None:
                a, b = comfyui.rotate(a, group), weight.T
                step = np.maximum(np.abs(a).max(-1, keepdims=True), 1e-30) / np.float32(127)
                a = np.rint(a / step) * step
            return (a @ b,)

    return ReferenceEvaluator(model, new_ops=[MatMul]).run(None, golden_inputs("transformer"))[0]


@pytest.mark.parametrize("form", COMPUTED, ids=lambda form: form.id)
def test_computes_with_the_files_integers(copy, tmp_path, form):
    file = tmp_path / "comfyui.safetensors"
    integers = as_diffusers(comfyui.write(copy / WEIGHTS, file, form))
    assert len(integers) == 28
    expected = expected_velocity(copy, integers, form.group)
    for flavour in ("ort", "portable"):
        export(copy, transformer=file, precision="int8", flavour=flavour, components=["transformer"])
        found = run_graph(copy, "transformer", "int8", flavour)
        assert relative_error(found, expected) < ROUNDING
        assert ROUNDING < relative_error(found, run_graph(copy, "transformer", "fp32", "portable")) < 0.02
        # q, k and v share the rotation of their rows, as they share the rounding, but not in the last block; the last
        # linear of each of the two single blocks reads two values
        rotations = 23 if form.group else 0
        assert flavour == "portable" or operators(copy, "transformer", "int8")["MatMul"] == rotations


@pytest.mark.parametrize("zero_point", [0, 128], ids=["exact", "pairs"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.id)
def test_integers_are_stored_as_they_are(copy, tmp_path, form, zero_point):
    precision = Int8(saturating=zero_point != 0)
    original = read_header(copy / WEIGHTS)
    file = tmp_path / "comfyui.safetensors"
    integers = as_diffusers(comfyui.write(copy / WEIGHTS, file, form))
    export(copy, transformer=file, precision=precision, components=["transformer"])
    stored = joined(read_header(copy / "transformer/int8.safetensors"))
    assert stored.keys() == original.keys() | {f"{layer}.weight.scale" for layer in integers}
    for layer, (values, scales) in integers.items():
        found = stored[f"{layer}.weight"]
        assert found.dtype == (np.uint8 if zero_point else np.int8)
        np.testing.assert_array_equal(found.astype(int) - zero_point, values.T)
        np.testing.assert_array_equal(stored[f"{layer}.weight.scale"], scales)
    for name in original.keys() - {f"{layer}.weight" for layer in integers}:
        assert stored[name].dtype == original[name].array().dtype
        assert stored[name].tobytes() == original[name].array().tobytes(), name


def joined(stored: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Put together what is computed in parts, weight.0, weight.0.scale, weight.1.0, ...: outputs are columns of
    integers, and rows of what is not quantised."""
    parts: dict[str, list[np.ndarray]] = {}
    for name, tensor in stored.items():
        parts.setdefault(re.sub(r"(\.weight)(\.\d+)+", r"\1", name), []).append(tensor.array())
    axes = {name: -1 if f"{name}.scale" in parts or name.endswith(".scale") else 0 for name in parts}
    return {name: np.concatenate(found, axes[name]) if len(found) > 1 else found[0] for name, found in parts.items()}


def test_every_integer(tmp_path):
    """-128 as well, which our own quantising never makes."""
    values = np.arange(-128, 128, dtype=np.int8).reshape(4, 64)
    save_file({"w.weight": values, "w.weight_scale": np.array(0.5, np.float32)}, tmp_path / "w.safetensors")
    tensors = read_header(tmp_path / "w.safetensors")
    tensor = resolve(tensors)["w.weight"]
    for zero_point in (0, 128):
        columns, scales = rounding.given_columns(tensor, zero_point == 128)
        np.testing.assert_array_equal(columns.astype(int) - zero_point, values.T)
        np.testing.assert_array_equal(scales, np.full(4, 0.5, np.float32))


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_rotation_is_comfyuis(group):
    np.testing.assert_array_equal(rounding.hadamard(group), comfyui.hadamard(group))


def test_our_own_rotation_makes_the_same_integers(tmp_path):
    """So what --rotate stores could be theirs, and the other way round."""
    weight = np.random.default_rng(0).standard_normal((40, 512), np.float32)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    found, steps = int8_matrix(read_header(tmp_path / "w.safetensors")["w"], None, 256)
    integers, scale = comfyui.quantise(weight, Form(group=256))
    assert Tuning().rotation == 256
    np.testing.assert_allclose(steps, scale[:, 0], rtol=1e-5)
    assert np.abs(found.T.astype(int) - integers).max() <= 1
    assert (integers != found.T).mean() < 1e-3


def test_every_layer_may_be_quantised(copy, tmp_path):
    """Also the last one, of whose scale and shift the order is another, with a scale for each row."""
    file = tmp_path / "comfyui.safetensors"
    tensors = comfyui.original_names(load_file(copy / WEIGHTS))
    form = Form()
    stored = {}
    for name, array in tensors.items():
        if array.ndim == 2:
            integers, scale = comfyui.quantise(array, form)
            stored |= {name: integers, f"{name}_scale": scale}
        else:
            stored[name] = array
    save_file(stored, file)
    export(copy, precision="fp32", components=["transformer"])
    export(copy, transformer=file, precision="int8", components=["transformer"])
    assert relative_error(run_graph(copy, "transformer", "int8"), run_graph(copy, "transformer", "fp32")) < 0.03


@pytest.mark.parametrize("name", ["bf16", "fp32", "int8"])
def test_original_names_of_what_is_not_quantised(copy, tmp_path, name):
    export(copy, precision=name, components=["transformer"])
    expected = run_graph(copy, "transformer", name)
    file = tmp_path / "flux-2-klein.safetensors"
    save_file(comfyui.original_names(load_file(copy / WEIGHTS)), file)
    export(copy, transformer=file, precision=name, components=["transformer"], force=True)
    np.testing.assert_array_equal(run_graph(copy, "transformer", name), expected)


def test_file_elsewhere_is_linked(copy, tmp_path, monkeypatch):
    """Also if its path begins like the model's; and then it is not needed any more."""
    file = tmp_path / "flux-2-klein.safetensors"
    save_file(comfyui.original_names(load_file(copy / WEIGHTS)), file)
    monkeypatch.chdir(copy)
    export(".", transformer="../flux-2-klein.safetensors")
    build = read_manifest(copy).builds["bf16"].components["transformer"]
    assert build.weights == ["transformer/bf16.flux-2-klein.safetensors", "transformer/bf16.safetensors"]
    assert (copy / build.weights[0]).samefile(file)
    assert set(read_manifest(copy).builds["bf16"].components["transformer"].sources) == {file.as_posix()}
    file.unlink()
    fluxonnx.load(".").close()


def test_original_names_in_the_folder_stay_in_place(copy):
    """All but the one tensor whose halves are the other way round."""
    save_file(comfyui.original_names(load_file(copy / WEIGHTS)), copy / WEIGHTS)
    export(copy, components=["transformer"])
    assert list(read_header(copy / "transformer/bf16.safetensors")) == ["norm_out.linear.weight"]


@pytest.mark.parametrize("name", ["bf16", "fp32", "fp16", "int4"])
def test_other_precisions_restore_the_weights(copy, tmp_path, name):
    """As far as they go: the result is that of a file with the restored weights."""
    file, restored = tmp_path / "comfyui.safetensors", tmp_path / "restored.safetensors"
    form = Form(group=GROUP)
    integers = comfyui.write(copy / WEIGHTS, file, form)
    tensors = comfyui.original_names(load_file(copy / WEIGHTS))
    for layer, (values, scale) in integers.items():
        tensors[f"{layer}.weight"] = comfyui.rotate(values * scale, GROUP)
    save_file(tensors, restored)
    arguments = {"precision": name, "components": ["transformer"], "force": True}
    export(copy, transformer=file, **arguments)
    found = run_graph(copy, "transformer", name)
    export(copy, transformer=restored, **arguments)
    # A restored weight is rounded to 16 bits before it is rounded to 4.
    limit = {"bf16": 3e-3, "fp32": 1e-5, "fp16": 1e-3, "int4": 2e-2}[name]
    assert relative_error(found, run_graph(copy, "transformer", name)) < limit


def test_weights_without_a_marker_are_warned_of_once(copy, tmp_path, capsys):
    """Whether they are rotated can't be told."""
    file = tmp_path / "comfyui.safetensors"
    comfyui.write(copy / WEIGHTS, file, Form(marker="none"))
    arguments = ["export", "-d", str(copy), "--transformer", str(file), "--component", "transformer"]
    assert main(arguments) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert re.search(r"does not say how its integers .*weight and 27 more have no comfy_quant\).*unrotated", lines[0])
    assert main(arguments) == 0
    assert "does not say" not in capsys.readouterr().err


def test_pieces_of_restored_weights(copy, tmp_path):
    """The rows of each, and no more of them at a time than fit in memory."""
    file = tmp_path / "comfyui.safetensors"
    comfyui.write(copy / WEIGHTS, file, Form(group=GROUP))
    tensors = open_checkpoint(copy, transformer=file).tensors("transformer").values()
    restored = [dequantised(tensor, "BF16") for tensor in tensors if tensor.quantisation]
    assert restored
    for tensor in restored[:4]:
        pieces = list(tensor.pieces(1 << 22))
        assert [len(piece) for piece in pieces[:-1]] == [ROWS] * (len(pieces) - 1)
        assert len(pieces[-1]) <= ROWS
        np.testing.assert_array_equal(np.concatenate(pieces), tensor.array())


def test_a_zero_row(copy, tmp_path):
    """Its scale may be 0, or as small as the tool's least."""
    file = tmp_path / "comfyui.safetensors"
    form = Form(group=GROUP)
    comfyui.write(copy / WEIGHTS, file, form)
    tensors = load_file(file)
    tensors[f"{LAYER}.weight"][:2] = 0
    tensors[f"{LAYER}.weight_scale"][:2] = [[0], [1e-30]]
    save_file(tensors, file, form.metadata([]))
    for name in ("int8", "fp32"):
        export(copy, transformer=file, precision=name, components=["transformer"])
    assert relative_error(run_graph(copy, "transformer", "int8"), run_graph(copy, "transformer", "fp32")) < 0.02


def test_commands(copy, tmp_path, capsys, fails):
    """The file makes an int8 build, beside the bf16 one; another file needs --force."""
    file, other, output = (tmp_path / name for name in ("flux-2-klein-int8.safetensors", "other.safetensors", "x.png"))
    comfyui.write(copy / WEIGHTS, file, Form(group=GROUP))
    comfyui.write(copy / WEIGHTS, other, Form())
    arguments = ["export", "-d", str(copy), "--transformer"]
    assert main([*arguments, str(file)]) == 0
    assert main([*arguments, str(file)]) == 0
    assert capsys.readouterr().err.count("up to date") == 5
    assert read_manifest(copy).builds["int8"].settings["transformer"].startswith("flux-2-klein-int8.safetensors ")
    fails(1, "other settings: overwrite it with --force", *arguments, other, "-q")
    fails(1, "other settings: overwrite it with --force", "export", "-d", copy, "--precision", "int8", "-q")
    fails(1, "--transformer .* is not a file", *arguments, tmp_path / "none.safetensors")
    size = ["-W", "64", "-H", "64", "-s", "1", "-S", "1", "-q"]
    generate = ["generate", "-d", str(copy), "-p", "x", "-o", str(output), *size]
    assert main([*generate, "--precision", "int8"]) == 0
    assert set(read_manifest(copy).builds) == {"int8"}
    assert main(generate) == 0
    assert set(read_manifest(copy).builds) == {"int8"}
    assert main([*generate, "--precision", "bf16"]) == 0
    assert set(read_manifest(copy).builds) == {"int8", "bf16"}
    assert main([*arguments, str(other), "--force"]) == 0


def test_loading_a_stale_build_reads_the_file_again(copy, tmp_path):
    file = tmp_path / "comfyui.safetensors"
    integers = comfyui.write(copy / WEIGHTS, file, Form())
    export(copy, transformer=file, precision="int8")
    written = (copy / "transformer/int8.safetensors").read_bytes()
    aged(copy)
    fluxonnx.load(copy, precision="int8").close()
    assert read_manifest(copy).builds["int8"].components["transformer"].graph_format > 0
    values = load_file(copy / "transformer/int8.safetensors")["single_transformer_blocks.0.attn.to_out.weight"]
    np.testing.assert_array_equal(
        values.astype(int) - (128 if values.dtype == np.uint8 else 0), integers["single_blocks.0.linear2"][0].T
    )
    assert len(written) == (copy / "transformer/int8.safetensors").stat().st_size


def test_stale_build_whose_file_is_gone(copy, tmp_path):
    """It has all its weights, so it still runs; without them, the message says what makes it again."""
    file = tmp_path / "comfyui.safetensors"
    comfyui.write(copy / WEIGHTS, file, Form())
    export(copy, transformer=file, precision="int8")
    file.unlink()
    aged(copy)
    with fluxonnx.load(copy, precision="int8") as flux:
        assert flux.generate("x", 64, 64, steps=1, seed=1).info["precision"] == "int8"
    (copy / "transformer/int8.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"comfyui\.safetensors, which it was made from, is gone.*--transformer FILE"
    ):
        fluxonnx.load(copy, precision="int8")


@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_in_the_models_folder(copy, names):
    """Instead of the checkpoint's own weights: then nothing has to be said about it."""
    comfyui.write(copy / WEIGHTS, copy / WEIGHTS, Form(names, group=GROUP))
    reason = "the transformer's weights are 8-bit integers already"
    assert auto.choose(open_checkpoint(copy)) == auto.Choice("int8", "cpu", reason)
    with fluxonnx.load(copy) as flux:
        assert flux.generate("x", 64, 64, steps=1, seed=1).info["precision"] == "int8"
    assert main(["export", "-d", str(copy), "-q"]) == 0
    assert set(read_manifest(copy).builds) == {"int8"}


def test_copy_of_a_model_without_transformer_weights(copy, tmp_path):
    """The file and the rest of the model are enough, and the copy needs neither."""
    file = tmp_path / "comfyui.safetensors"
    comfyui.write(copy / WEIGHTS, file, Form())
    (copy / WEIGHTS).unlink()
    export(copy, tmp_path / "copy", transformer=file, precision="int8")
    shutil.rmtree(copy)
    file.unlink()
    with fluxonnx.load(tmp_path / "copy") as flux:
        assert flux.generate("x", 64, 64, steps=1, seed=1).info["precision"] == "int8"
