"""Exports are whole, valid, self-describing, and never lose anything."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

import fluxonnx
from fluxonnx.checkpoint.manifest import graph_file, read_manifest
from fluxonnx.checkpoint.safetensors import read_header
from fluxonnx.contract import COMPONENTS
from fluxonnx.errors import CheckpointError, ExportError, UsageError
from fluxonnx.export import export
from tests.support import Case

pytestmark = pytest.mark.slow

CASE = Case("one-double-three-single", shards=3)
BUILDS = [(precision, flavour) for precision in ("bf16", "fp32", "fp16") for flavour in ("ort", "portable")]


def graphs(root: Path, precision: str, flavour: str) -> dict[str, onnx.ModelProto]:
    return {
        name: onnx.load(root / graph_file(name, precision, flavour), load_external_data=False) for name in COMPONENTS
    }


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("precision", "flavour"), BUILDS)
def test_graphs_are_valid_and_describe_themselves(checkpoints, precision, flavour):
    root = checkpoints.exported(CASE, precision, flavour)
    for component, model in graphs(root, precision, flavour).items():
        onnx.checker.check_model(str(root / graph_file(component, precision, flavour)), full_check=True)
        metadata = {prop.key: prop.value for prop in model.metadata_props}
        assert (model.producer_name, metadata["precision"], metadata["flavour"]) == ("fluxonnx", precision, flavour)
        assert metadata["component"] == component
        assert json.loads(metadata["architecture"])
        assert all(value.doc_string for value in (*model.graph.input, *model.graph.output))
        typed = {info.name for info in (*model.graph.value_info, *model.graph.output)}
        # Other runtimes infer types themselves, and refuse what they would put otherwise.
        assert flavour == "ort" or not model.graph.value_info
        assert flavour == "portable" or {name for node in model.graph.node for name in node.output} <= typed
        for initializer in model.graph.initializer:
            if initializer.data_location != onnx.TensorProto.EXTERNAL:
                continue
            place = {item.key: item.value for item in initializer.external_data}
            tensors = read_header(root / place["location"])
            start, length = int(place["offset"]), int(place["length"])
            if initializer.name in tensors:
                tensor = tensors[initializer.name]
                assert (start, length) == (tensor.offset, tensor.nbytes)
            else:  # some rows of it
                tensor = tensors[initializer.name.rpartition(".")[0]]
                assert tensor.offset <= start < start + length <= tensor.offset + tensor.nbytes
                assert precision == "bf16"


def test_contract_of_names_and_shapes(checkpoints):
    """Other programs depend on these."""
    models = graphs(checkpoints.exported(CASE), "bf16", "ort")

    def signature(component: str) -> tuple[list, list]:
        def shape(value):
            dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            return value.name, value.type.tensor_type.elem_type, dims

        graph = models[component].graph
        return [shape(value) for value in graph.input], [shape(value) for value in graph.output]

    f32, i64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    text_and_image = "text_seq + image_seq"
    rotary = [(name, f32, [text_and_image, 32]) for name in ("rotary_cos", "rotary_sin")]
    assert signature("text_encoder") == (
        [(name, i64, ["batch", "text_seq"]) for name in ("input_ids", "attention_mask")],
        [("prompt_embeds", f32, ["batch", "text_seq", 144])],
    )
    assert signature("conditioning") == (
        [("timestep", f32, ["batch"]), ("txt_ids", i64, ["text_seq", 4]), ("img_ids", i64, ["image_seq", 4])],
        [("timestep_proj", f32, ["batch", 256]), *rotary],
    )
    assert signature("transformer") == (
        [
            ("hidden_states", f32, ["batch", "image_seq", 32]),
            ("encoder_hidden_states", f32, ["batch", "text_seq", 144]),
            ("timestep_proj", f32, ["batch", 256]),
            *rotary,
        ],
        [("velocity", f32, ["batch", "image_seq", 32])],
    )
    picture, latents = ["batch", 3, "height", "width"], ["batch", 32, "height/16", "width/16"]
    assert signature("vae_encoder") == ([("sample", f32, picture)], [("latents", f32, latents)])
    assert signature("vae_decoder") == ([("latents", f32, latents)], [("sample", f32, picture)])


def test_nodes_are_named_by_module_path(checkpoints):
    names = {node.name for node in graphs(checkpoints.exported(CASE), "bf16", "ort")["transformer"].graph.node}
    assert {"/transformer_blocks.0/attn/to_q/Gemm", "/single_transformer_blocks.2/attn/to_out/Gemm"} <= names


def test_weight_casts_come_first(checkpoints):
    """What keeps 16 GB of weights from being live at once in onnxruntime; see GraphBuilder.weight_op."""
    nodes = graphs(checkpoints.exported(CASE), "bf16", "ort")["transformer"].graph.node
    initializers = {
        item.name for item in graphs(checkpoints.exported(CASE), "bf16", "ort")["transformer"].graph.initializer
    }
    casts = [i for i, node in enumerate(nodes) if node.op_type == "Cast" and node.input[0] in initializers]
    assert casts == list(range(len(casts)))
    assert len(casts) > 30


@pytest.mark.parametrize("opset", [17, 18, 21])
def test_portable_is_plain_onnx(checkpoints, tmp_path, opset):
    root = shutil.copytree(checkpoints.get(CASE), tmp_path / "model")
    export(root, flavour="portable", opset=opset)
    for model in graphs(root, "bf16", "portable").values():
        assert [(item.domain, item.version) for item in model.opset_import] == [("", opset)]
        assert {node.domain for node in model.graph.node} == {""}


def test_bf16_writes_graphs_only(checkpoints, tmp_path):
    """The weights stay where they are."""
    root = shutil.copytree(checkpoints.get(CASE), tmp_path / "model")
    before = files(root)
    reports = export(root)
    assert files(root) - before == {graph_file(name, "bf16", "ort") for name in COMPONENTS} | {"fluxonnx.json"}
    for report in reports:
        assert report.bytes_written == (root / report.graph).stat().st_size < 500_000


def test_fp32_weights_are_valid_safetensors(checkpoints):
    root = checkpoints.exported(CASE, "fp32")
    found = load_file(root / "transformer" / "fp32.safetensors")
    shards = sorted((root / "transformer").glob("diffusion_pytorch_model-*.safetensors"))
    sources = {name: tensor for shard in shards for name, tensor in read_header(shard).items()}
    assert set(found) == set(sources)
    for name, tensor in sources.items():
        assert np.array_equal(found[name], tensor.array().astype(np.float32)), name


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_flavours_share_weight_files(checkpoints, tmp_path, precision):
    """Byte for byte, also in which order: the second export must not move the weights under the first one's graphs."""
    root = Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "model"))
    export(root, precision=precision)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*.safetensors")}
    export(root, precision=precision, flavour="portable")
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("precision", "flavour", "folded"),
    [("bf16", "ort", True), ("int8", "ort", True), ("fp16", "ort", False), ("bf16", "portable", False)],
)
def test_upsampling_is_folded_into_kernels(checkpoints, precision, flavour, folded):
    decoder = graphs(checkpoints.exported(CASE, precision, flavour), precision, flavour)["vae_decoder"]
    assert ("Resize" not in {node.op_type for node in decoder.graph.node}) == folded


def test_second_export_does_nothing(checkpoints, tmp_path):
    root = shutil.copytree(checkpoints.get(CASE), tmp_path / "model")
    export(root, precision="fp32")
    stamps = {name: (root / name).stat().st_mtime_ns for name in files(root)}
    assert all(report.seconds is None for report in export(root, precision="fp32"))
    assert {name: (root / name).stat().st_mtime_ns for name in files(root)} == stamps
    # the portable flavour has the same weights: they are not written again
    export(root, precision="fp32", flavour="portable")
    weight_files = [name for name in stamps if "fp32" in name and name.endswith(".safetensors")]
    assert len(weight_files) == 4
    assert all((root / name).stat().st_mtime_ns == stamps[name] for name in weight_files)


def test_one_component(checkpoints, tmp_path):
    root = shutil.copytree(checkpoints.get(CASE), tmp_path / "model")
    (report,) = export(root, components=["vae_decoder"])
    assert report.graph == "vae_decoder.onnx"
    assert list(read_manifest(root).builds["bf16"].components) == ["vae_decoder"]


def test_foreign_graph_is_kept_unless_forced(checkpoints, tmp_path):
    root = shutil.copytree(checkpoints.get(CASE), tmp_path / "model")
    (root / "transformer.onnx").write_bytes(b"somebody's own")
    with pytest.raises(ExportError, match=r"transformer\.onnx exists.*--force"):
        export(root)
    assert (root / "transformer.onnx").read_bytes() == b"somebody's own"
    export(root, force=True)
    onnx.checker.check_model(str(root / "transformer.onnx"))


def test_another_opset_needs_force(checkpoints, tmp_path):
    root = shutil.copytree(checkpoints.get(CASE), tmp_path / "model")
    export(root)
    with pytest.raises(ExportError, match=r"other settings.*--force"):
        export(root, opset=21)
    export(root, opset=21, force=True)
    assert read_manifest(root).builds["bf16"].opset == 21
    with fluxonnx.load(root) as flux:
        flux.generate("x", 64, 64, steps=1)


def test_changed_checkpoint_is_noticed(checkpoints, tmp_path):
    """Graphs that point into files which have been replaced are never used as they are."""
    root = shutil.copytree(checkpoints.get(CASE), tmp_path / "model")
    export(root)
    shutil.copytree(checkpoints.get(Case("odd-heads")), root, dirs_exist_ok=True)
    for shard in root.rglob("*-of-00003.safetensors"):
        shard.unlink()
    with pytest.raises(ExportError, match="--force"):
        export(root)
    with fluxonnx.load(root) as flux:  # exports again by itself
        assert flux.generate("x", 64, 64, steps=1, seed=1).size == (64, 64)


@pytest.mark.parametrize("moment", ["save", "check", "weights"])
def test_killed_export_leaves_nothing_half_done(checkpoints, tmp_path, monkeypatch, moment):
    root = shutil.copytree(checkpoints.get(CASE), tmp_path / "model")
    before = files(root)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    if moment == "save":
        monkeypatch.setattr(onnx, "save", die)
    elif moment == "check":
        monkeypatch.setattr(onnx.checker, "check_model", die)
    with pytest.raises(KeyboardInterrupt):
        export(root, precision="fp32", components=["transformer"], progress=die if moment == "weights" else None)
    assert not [name for name in files(root) - before if name.endswith((".onnx", ".tmp"))]
    monkeypatch.undo()
    export(root, precision="fp32")
    assert not [name for name in files(root) if name.endswith(".tmp")]


def test_graph_left_by_a_killed_export_is_replaced(checkpoints, tmp_path):
    """Killed between the graph and the manifest: the graph is ours and of the same settings, so no --force."""
    root = shutil.copytree(checkpoints.get(CASE), tmp_path / "model")
    export(root)
    (root / "fluxonnx.json").unlink()
    assert all(report.seconds is not None for report in export(root))


def rewrite(path: Path, change) -> None:
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def transpose(header: dict) -> None:
    shape = header["x_embedder.weight"]["shape"]
    shape.reverse()


def rename(header: dict) -> None:
    header["y_embedder.weight"] = header.pop("x_embedder.weight")


def duplicate(header: dict) -> None:
    header["extra.weight"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (transpose, r"x_embedder\.weight has shape \[32, 96\], expected \[96, 32\]"),
        (rename, r"x_embedder\.weight is missing, expected shape \[96, 32\]"),
        (duplicate, r"extra\.weight \[0\] is not part of the model"),
    ],
)
def test_tensors_that_do_not_fit_the_config(copy_of, change, message):
    root = copy_of(Case("odd-heads"))
    rewrite(root / "transformer" / "diffusion_pytorch_model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        export(root)
    assert not (root / "transformer.onnx").exists()


@pytest.mark.parametrize(
    ("component", "key", "value", "message"),
    [
        ("transformer", "num_layers", 3, "is missing"),
        ("transformer", "num_layers", "many", "expected a positive integer"),
        ("transformer", "guidance_embeds", True, "guidance_embeds"),
        ("transformer", "axes_dims_rope", [8, 8, 8, 9], "axes_dims_rope"),
        ("transformer", "joint_attention_dim", 99, "different models"),
        ("transformer", "in_channels", 64, "different models"),
        ("text_encoder", "hidden_act", "gelu", "hidden_act"),
        ("text_encoder", "rope_scaling", {"rope_type": "yarn"}, "rope_scaling"),
        ("text_encoder", "num_key_value_heads", 3, "not a multiple"),
        ("text_encoder", "hidden_size", None, 'no "hidden_size"'),
        ("vae", "norm_num_groups", 5, "norm_num_groups"),
        ("vae", "act_fn", "relu", "act_fn"),
    ],
)
def test_configs_that_can_not_be(copy_of, component, key, value, message):
    root = copy_of(Case("odd-heads"))
    config = root / component / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=message):
        export(root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int3"}, "bf16, fp32"),
        ({"flavour": "vanilla"}, "ort, portable"),
        ({"components": ["unet"]}, "text_encoder, conditioning"),
        ({"opset": 12}, "17 to 23"),
        ({"opset": 23, "flavour": "portable"}, "17 to 21"),
    ],
)
def test_impossible_arguments(checkpoints, arguments, message):
    with pytest.raises(UsageError, match=message):
        export(checkpoints.get(CASE), **arguments)


def test_full_disk_is_foreseen(checkpoints, tmp_path, monkeypatch):
    root = shutil.copytree(checkpoints.get(CASE), tmp_path / "model")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ExportError, match=r"needs 0\.0 GB.*free some space"):
        export(root, precision="fp32")
    with pytest.raises(ExportError, match="free some space"):
        export(root, tmp_path / "copy")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EACCES, "no permission to write.*make a copy with"),
        (errno.EIO, "can't write"),
    ],
)
def test_write_errors(checkpoints, tmp_path, monkeypatch, code, message):
    root = shutil.copytree(checkpoints.get(CASE), tmp_path / "model")
    before = files(root)

    def fail(model, path):
        Path(path).touch()
        raise OSError(code, "synthetic", str(path))

    monkeypatch.setattr(onnx, "save", fail)
    with pytest.raises(ExportError, match=message):
        export(root)
    assert files(root) == before
