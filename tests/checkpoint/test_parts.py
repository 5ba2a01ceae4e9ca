"""Parts of a model from anywhere, by anybody's names: the tensors are those of the diffusers layout, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.cli import main
from fluxonnx.contract import open_checkpoint
from fluxonnx.errors import CheckpointError
from fluxonnx.export import export
from tests import comfyui, formats
from tests.support import Case, run_graph

CASE = Case("odd-heads")
# Biases in the text encoder, another decoder than encoder, no outer convolutions, no attention in the autoencoder.
OTHER = Case("head-dim-64")
FILES = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
# The tensors of another model in the same file, one of a type that nobody knows.
STRANGERS = {"clip_l.logit_scale": np.zeros((), np.float32), "other.weight": np.zeros(4, ml_dtypes.float8_e8m0fnu)}

Write = Callable[[Path, dict[str, np.ndarray]], Path]


def written(rename: Callable = dict, prefix: str = "", others: dict | None = None) -> Write:
    return lambda path, tensors: formats.write(path, rename(tensors), prefix, others)


def bare(tensors):
    return {name.removeprefix("model."): array for name, array in tensors.items()}


NAMES = [
    ("transformer", "diffusers", written()),
    ("transformer", "original", written(comfyui.original_names)),
    ("transformer", "all-in-one", written(comfyui.original_names, "model.diffusion_model.", STRANGERS)),
    ("transformer", "short prefix", written(comfyui.original_names, "diffusion_model.")),
    ("text_encoder", "transformers", written()),
    ("text_encoder", "bare model", written(bare)),
    ("text_encoder", "all-in-one", written(prefix="text_encoders.qwen3_4b.transformer.", others=STRANGERS)),
    ("text_encoder", "llama.cpp", written(formats.llama_names)),
    ("vae", "diffusers", written()),
    ("vae", "ldm", written(formats.ldm_names)),
    ("vae", "original", written(lambda tensors: formats.ldm_names(tensors, inside=True))),
    ("vae", "old diffusers", written(formats.old_attention_names)),
    ("vae", "all-in-one", written(formats.ldm_names, "vae.", STRANGERS)),
    ("vae", "first stage", written(formats.ldm_names, "first_stage_model.", STRANGERS)),
]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor.name, tensor.dtype, tensor.shape) == (name, expected[name].dtype, expected[name].shape)
        np.testing.assert_array_equal(tensor.array(), expected[name].array(), err_msg=name)


def part(root: Path, component: str, path: Path) -> Checkpoint:
    return open_checkpoint(root, **{component: path})


@pytest.mark.parametrize("case", [CASE, OTHER], ids=lambda case: case.id)
@pytest.mark.parametrize(("component", "name", "write"), NAMES, ids=[f"{n[0]}-{n[1]}" for n in NAMES])
def test_names(checkpoints, tmp_path, case, component, name, write):
    root = checkpoints.get(case)
    file = write(tmp_path / "part.safetensors", load_file(root / FILES[component]))
    found = part(root, component, file).tensors(component)
    assert_equal(found, open_checkpoint(root).tensors(component))
    # fused weights are ranges of the file, and what has another order only is not
    assert {tensor.name for tensor in found.values() if not tensor.is_plain} <= {"norm_out.linear.weight"}
    assert all(tensor.file == file for tensor in found.values())


@pytest.mark.slow
@pytest.mark.parametrize(("component", "name", "write"), [NAMES[2], NAMES[6], NAMES[12]], ids=lambda n: str(n)[:20])
def test_graphs_of_renamed_files(copy_of, tmp_path, component, name, write):
    """They give the same, bit for bit, in the same folder and elsewhere."""
    root = copy_of(CASE)
    graphs = {"transformer": ["transformer"], "text_encoder": ["text_encoder"], "vae": ["vae_encoder", "vae_decoder"]}
    export(root, components=graphs[component])
    expected = [run_graph(root, graph, "bf16") for graph in graphs[component]]
    file = write(tmp_path / "part.safetensors", load_file(root / FILES[component]))
    for place in (file, Path(shutil.copy(file, root / "part.safetensors"))):
        export(root, components=graphs[component], **{component: place}, force=True)
        for graph, output in zip(graphs[component], expected, strict=True):
            np.testing.assert_array_equal(run_graph(root, graph, "bf16"), output)
        if component != "transformer" and place != file:
            assert all(not read_manifest(root).builds["bf16"].components[graph].weights for graph in graphs[component])


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_small_decoder_in_one_file(checkpoints, tmp_path, copy_of):
    """The directory's config describes the large decoder: the channels are read off the weights."""
    root = copy_of(OTHER)
    file = formats.write(tmp_path / "vae.safetensors", formats.ldm_names(load_file(root / FILES["vae"])))
    config = root / "vae/config.json"
    values = json.loads(config.read_text())
    assert values.pop("decoder_block_out_channels") == [12, 16, 24, 40]
    config.write_text(json.dumps(values))
    found = part(root, "vae", file).config("vae", "AutoencoderKLFlux2").integers("decoder_block_out_channels")
    assert found == (12, 16, 24, 40)


@pytest.mark.parametrize(
    "place",
    ["file", "folder", "model", "other name", "variant", "sharded", "index", "link"],
)
def test_places(checkpoints, copy_of, tmp_path, place):
    """A file, an index, or a folder in any of the ways that people have them."""
    root = checkpoints.get(CASE)
    expected = open_checkpoint(root).tensors("transformer")
    folder = tmp_path / "here"
    folder.mkdir()
    source = root / FILES["transformer"]
    path = folder
    if place == "file":
        path = Path(shutil.copy(source, folder / "any name.safetensors"))
    elif place == "folder":
        shutil.copy(source, folder)
    elif place == "model":
        path = copy_of(CASE)
    elif place == "other name":
        shutil.copy(source, folder / "flux-2-klein-4b.safetensors")
    elif place == "variant":
        shutil.copy(source, folder / "diffusion_pytorch_model.bf16.safetensors")
    elif place == "link":
        (folder / "linked.safetensors").symlink_to(source)
        path = folder / "linked.safetensors"
    else:
        shutil.copytree(checkpoints.get(Case("odd-heads", shards=3)) / "transformer", folder, dirs_exist_ok=True)
        if place == "index":
            path = next(folder.glob("*.json.index*"), next(folder.glob("*.index.json")))
    assert_equal(part(root, "transformer", path).tensors("transformer"), expected)


@pytest.mark.parametrize("variant", ["diffusion_pytorch_model.fp16.safetensors", "index.fp16", "fp16.index"])
def test_variants_in_a_model_directory(copy_of, variant):
    """The plain file goes before a variant, the nearest to the original before others."""
    root = copy_of(Case("odd-heads", shards=2) if "index" in variant else CASE)
    expected = {name: tensor.array().copy() for name, tensor in open_checkpoint(root).tensors("transformer").items()}
    folder = root / "transformer"
    for path in folder.glob("*.safetensors*"):
        if path.suffix == ".json":
            names = {"index.fp16": ".safetensors.index.fp16.json", "fp16.index": ".fp16.safetensors.index.json"}
            values = json.loads(path.read_text())
            values["weight_map"] = {
                name: file.replace("model-", "model.fp16-") for name, file in values["weight_map"].items()
            }
            path.unlink()
            (folder / f"diffusion_pytorch_model{names[variant]}").write_text(json.dumps(values))
        elif "index" in variant:
            path.rename(folder / path.name.replace("model-", "model.fp16-"))
        else:
            path.rename(folder / variant)
    found = open_checkpoint(root)
    assert found.has_weights("transformer")
    for name, tensor in found.tensors("transformer").items():
        np.testing.assert_array_equal(tensor.array(), expected[name])
    if "index" not in variant:
        save_file({"x": np.ones(1, np.float32)}, folder / "diffusion_pytorch_model.ema.safetensors")
        assert len(open_checkpoint(root).tensors("transformer")) == len(expected)


@pytest.mark.parametrize(
    "name",
    ["Flux2KleinInpaintPipeline", "Flux2KleinKVPipeline", "Flux2KleinModularPipeline", "Flux2KleinBaseModularPipeline"],
)
@pytest.mark.parametrize("file", ["model_index.json", "modular_model_index.json"])
def test_sibling_pipelines(copy_of, name, file):
    root = copy_of(CASE)
    (root / "model_index.json").rename(root / file)
    edit(root / file, _class_name=name)
    assert open_checkpoint(root).is_distilled
    values = json.loads((root / file).read_text())
    del values["is_distilled"]
    (root / file).write_text(json.dumps(values))
    # the default of Flux2KleinKVPipeline of diffusers
    assert open_checkpoint(root).is_distilled == (name in ("Flux2KleinModularPipeline", "Flux2KleinKVPipeline"))


def test_encoder_saved_as_the_bare_model(copy_of):
    root = copy_of(CASE)
    edit(root / "text_encoder/config.json", architectures=["Qwen3Model"])
    assert open_checkpoint(root).config("text_encoder", "Qwen3ForCausalLM").integer("hidden_size")


@pytest.mark.parametrize(
    ("flag", "content", "message"),
    [
        ("transformer", None, "--transformer .* is not a file: pass a .safetensors or .gguf file"),
        ("text_encoder", None, "--text-encoder .* is not a file"),
        ("vae", [], "holds no weights"),
        ("vae", ["a.safetensors", "b.safetensors"], r"holds several files \(a.safetensors, b.safetensors\): pass one"),
        ("vae", ["model.ckpt"], "holds model.ckpt, but fluxonnx reads only"),
    ],
)
def test_parts_that_are_not_there(checkpoints, tmp_path, flag, content, message):
    path = tmp_path / "part"
    if content is not None:
        path.mkdir()
        for name in content:
            (path / name).touch()
    with pytest.raises(CheckpointError, match=message):
        part(checkpoints.get(CASE), flag, path)


@pytest.mark.parametrize("flag", FILES)
@pytest.mark.parametrize("held", FILES)
def test_another_part_than_the_flag_says(checkpoints, flag, held):
    if flag == held:
        return
    root = checkpoints.get(CASE)
    message = rf"not an? .*: pass it with --{held.replace('_', '-')}"
    with pytest.raises(CheckpointError, match=message):
        part(root, flag, root / FILES[held]).tensors(flag)


@pytest.mark.slow
def test_commands(copy_of, tmp_path, capsys):
    """A directory without weights and one file for all parts are a model; what was exported is not exported again."""
    root = copy_of(CASE)
    expected, found = tmp_path / "expected.png", tmp_path / "found.png"
    size = ["-p", "x", "-W", "64", "-H", "64", "-s", "1", "-S", "1"]
    assert main(["generate", "-d", str(root), "-o", str(expected), "-q", *size]) == 0
    tensors = {
        f"{prefix}{name}": array
        for component, prefix in (("text_encoder", "text_encoders.qwen3_4b.transformer."), ("vae", "vae."))
        for name, array in load_file(root / FILES[component]).items()
    }
    original = comfyui.original_names(load_file(root / FILES["transformer"]))
    file = formats.write(tmp_path / "all.safetensors", original, "model.diffusion_model.", tensors)
    for path in [*root.glob("*/*.safetensors"), *root.glob("*.onnx"), root / "fluxonnx.json"]:
        path.unlink()
    parts = [item for flag in ("transformer", "text-encoder", "vae") for item in (f"--{flag}", str(file))]
    for _ in range(2):
        assert main(["generate", "-d", str(root), "-o", str(found), *size, *parts]) == 0
    from PIL import Image

    assert Image.open(found).tobytes() == Image.open(expected).tobytes()
    assert main(["export", "-d", str(root), *parts]) == 0
    assert capsys.readouterr().err.count("up to date") == 5
    # it is remembered where the weights came from
    assert main(["generate", "-d", str(root), "-o", str(found), "-q", *size]) == 0
