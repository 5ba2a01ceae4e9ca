"""References that are looked at once: graphs, shared weights, modes beside it, and what is told where it can't be."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxonnx
from fluxonnx.checkpoint.manifest import build_name, graph_file, read_manifest
from fluxonnx.cli import main
from fluxonnx.contract import KV_COMPONENTS
from fluxonnx.errors import UsageError
from fluxonnx.export import export
from fluxonnx.runtime.request import Request
from fluxonnx.runtime.session import Session, SessionOptions
from tests.digests import ARCHITECTURES as SIZES
from tests.lora.making import CASE, everything, layers_of, merged, weight, written
from tests.support import GRAPH_TOLERANCE, relative_error
from tools.make_checkpoint import make_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:this model was not made to look at references only once")

GRAPHS = ("transformer", *KV_COMPONENTS)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8))
OTHER = Image.fromarray(np.random.default_rng(1).integers(0, 256, (96, 64, 3), np.uint8))
# The error of a whole velocity in few bits, and of one in half precision, on random weights.
ROUNDED, HALF = 0.25, 5e-3


@pytest.fixture(scope="module")
def small(checkpoints, tmp_path_factory) -> Path:
    """A float32 checkpoint with all graphs, whose two streams and whose layers differ in number."""
    root = Path(shutil.copytree(checkpoints.get(CASE), tmp_path_factory.mktemp("kv") / "model"))
    export(root, kv=True)
    return root


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A checkpoint wide enough for panels of columns."""
    root = tmp_path_factory.mktemp("kv-wide") / "model"
    make_checkpoint(root, SIZES["wide"], dtype="bf16")
    return root


def request(**values) -> Request:
    return Request(
        **{"prompt": "a", "max_sequence_length": 16, "width": 64, "height": 64, "steps": 2, "kv": True, **values}
    )


def last_latents(flux, wanted: Request, seed: int = 3) -> np.ndarray:
    *_, last = flux.steps(wanted, seed)
    return last.latents


def run(root: Path, component: str, precision: str, flavour: str, inputs: dict) -> list[np.ndarray]:
    build = read_manifest(root).builds[build_name(precision, flavour)]
    with Session(root / graph_file(component, precision, flavour), component, SessionOptions(), build) as session:
        return session.run(**inputs)


def velocity(root: Path, precision: str, flavour: str = "ort") -> np.ndarray:
    """The velocity of random tokens beside random references, by both graphs of a build."""
    c, rng = SIZES["wide"].transformer, np.random.default_rng(0)
    channels, text_dim, features = c.in_channels, c.text_dim, 256

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    angles = random(20, c.head_dim // 2).repeat(2, axis=1)
    tables = {"rotary_cos": np.cos(angles), "rotary_sin": np.sin(angles)}
    found = run(
        root,
        "references",
        precision,
        flavour,
        {
            "hidden_states": random(2, 7, channels),
            "timestep_proj": random(1, features),
            **{k: v[:7] for k, v in tables.items()},
        },
    )
    names = [f"{kind}_{i}" for i in range(len(found) // 2) for kind in ("key", "value")]
    inputs = {
        "hidden_states": random(2, 12, channels),
        "encoder_hidden_states": random(2, 8, text_dim),
        "timestep_proj": random(1, features),
        **tables,
        **dict(zip(names, found, strict=True)),
    }
    return run(root, "transformer_cached", precision, flavour, inputs)[0]


# Graphs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "flavour", "most"),
    [
        ("bf16", "ort", GRAPH_TOLERANCE),
        ("bf16", "portable", GRAPH_TOLERANCE),
        ("fp32", "portable", GRAPH_TOLERANCE),
        ("fp16", "ort", HALF),
        ("fp16", "portable", HALF),
        ("int8", "ort", ROUNDED),
        ("int8", "portable", ROUNDED),
        ("int4", "ort", ROUNDED),
        ("int4", "portable", ROUNDED),
    ],
)
def test_every_precision_and_flavour(wide, precision, flavour, most):
    export(wide, precision="fp32", components=GRAPHS)
    export(wide, precision=precision, flavour=flavour, components=GRAPHS)
    assert relative_error(velocity(wide, precision, flavour), velocity(wide, "fp32")) < most


@pytest.mark.parametrize("precision", ["bf16", "fp32", "int8"])
def test_weights_are_stored_once(checkpoints, tmp_path, precision):
    root = Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "model"))
    reports = export(root, precision=precision, components=GRAPHS, kv=True)
    parts = read_manifest(root).builds[build_name(precision, "ort")].components
    assert parts["references"].weights == parts["transformer_cached"].weights == parts["transformer"].weights
    assert not list(root.glob("transformer/*references*")) + list(root.glob("transformer/*cached*"))
    assert all(report.seconds is None for report in export(root, precision=precision, components=GRAPHS))
    assert len(reports) == 3


def test_a_graph_alone_has_its_own_weights(checkpoints, tmp_path):
    root = Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "model"))
    export(root, precision="int8", components=["references"])
    parts = read_manifest(root).builds["int8"].components
    assert parts["references"].weights == ["transformer/references.int8.safetensors"]
    # with the transformer's, they are not needed any more
    export(root, precision="int8", components=GRAPHS, force=True)
    assert not (root / "transformer/references.int8.safetensors").exists()


def test_a_copy_needs_nothing_else(small, tmp_path):
    export(small, tmp_path / "copy", precision="int8", kv=True)
    with fluxonnx.load(tmp_path / "copy", precision="int8", kv=True) as flux:
        assert flux.run(request(references=(PHOTO,)), [1])


def test_models_made_for_it_have_the_graphs(checkpoints, tmp_path):
    root = Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "model"))
    index = json.loads((root / "model_index.json").read_text("utf-8"))
    del index["is_distilled"]
    (root / "model_index.json").write_text(json.dumps({**index, "_class_name": "Flux2KleinKVPipeline"}), "utf-8")
    with fluxonnx.load(root) as flux:
        assert flux.is_distilled
        kept = flux.run(request(references=(PHOTO,), kv=None), [1])[0]
        again = flux.run(request(references=(PHOTO,), kv=False), [1])[0]
    assert kept.info["kv"] is True
    assert again.info["kv"] is False
    assert kept.tobytes() != again.tobytes()
    assert set(KV_COMPONENTS) <= read_manifest(root).builds["bf16"].components.keys()


# Modes beside it


def test_a_batch_is_its_pictures(wide):
    """Each picture of a batch is bitwise what it is alone."""
    export(wide, kv=True)
    steps: list[int] = []

    def watch(event: object) -> None:
        if getattr(event, "component", "") == "transformer_cached":
            steps.append(len(event.inputs["hidden_states"]))

    with fluxonnx.load(wide, kv=True, threads=1, watch=watch) as flux:
        wanted = request(references=(PHOTO, OTHER))
        together = flux.run(wanted, [1, 2, 3])
        assert steps == [3, 3]
        alone = [flux.run(wanted, [seed])[0] for seed in (1, 2, 3)]
    assert [image.tobytes() for image in together] == [image.tobytes() for image in alone]


def test_the_references_are_read_once(small):
    loaded: list[str] = []
    with fluxonnx.load(small, kv=True, watch=lambda event: loaded.append(getattr(event, "component", ""))) as flux:
        flux.run(request(references=(PHOTO, OTHER), steps=3, guidance_scale=2.0, negative_prompt="b"), [1])
    assert loaded.count("references") == 1
    assert loaded.count("transformer_cached") == 6
    assert "transformer" not in loaded


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        {"references": (OTHER,), "image": PHOTO, "strength": 0.5},
        {"image": PHOTO, "mask": Image.new("L", PHOTO.size, 128)},
        {"image": PHOTO, "expand": (16, 0, 0, 0), "width": None, "height": None},
        {"references": (OTHER,), "step_cache": 2, "steps": 5},
        {"references": (OTHER,), "sampler": "heun"},
    ],
    ids=["strength", "mask", "expand", "step cache", "sampler"],
)
def test_modes(small, mode):
    """It changes what a mode draws, and the picture says that it was used."""
    with fluxonnx.load(small, kv=True) as flux:
        found = flux.run(request(**mode), [1])[0]
        assert found.info["kv"] is True
        assert found.tobytes() != flux.run(request(**{**mode, "kv": False}), [1])[0].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-4), ("bf16", 1e-4), ("int8", ROUNDED)])
def test_lora(checkpoints, tmp_path, precision, most):
    """A LoRA of all layers does what the same change of the checkpoint's weights does."""
    source = checkpoints.get(CASE)
    root = merged(source, tmp_path / "model", {})
    tensors = everything(layers_of(source).shapes["transformer"])
    file = written(tmp_path / "all.safetensors", tensors)
    changes = {}
    for path in layers_of(source).shapes["transformer"]:
        up, down = (tensors[f"transformer.{path}.lora_{name}.weight"].astype(np.float64) for name in "BA")
        changes[path] = weight(root, path, "transformer") + up @ down
    changed = merged(source, tmp_path / "changed", changes)
    wanted = request(references=(PHOTO,))
    with fluxonnx.load(root, precision=precision, kv=True) as flux:
        plain = last_latents(flux, wanted)
        flux.load_lora(file)
        found = last_latents(flux, wanted)
    with fluxonnx.load(changed, precision="fp32", kv=True) as flux:
        expected = last_latents(flux, wanted)
    assert relative_error(found, expected) < most < relative_error(plain, expected)


# What can't be


def test_a_build_without_the_graphs(checkpoints, tmp_path):
    root = Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "model"))
    with fluxonnx.load(root) as flux:
        with pytest.raises(UsageError, match=r"no graphs for that: add them with fluxonnx export -d .* --kv"):
            flux.run(request(references=(PHOTO,)), [1])
        with pytest.warns(UserWarning, match="kv is about references, but there are none"):
            assert flux.run(request(), [1])[0].info.get("kv") is None
    with fluxonnx.load(root, kv=True) as flux:
        assert flux.run(request(references=(PHOTO,)), [1])


def test_a_copy_without_the_graphs(small, tmp_path, fails):
    export(small, tmp_path / "copy", precision="int8", kv=False)
    words = ("generate", "-q", "-d", tmp_path / "copy", "-p", "x", "--kv", "-o", tmp_path / "x.png")
    fails(1, "has no references graph, and .* holds no weights to make it from: .* --precision int8 --kv", *words)


def test_static_builds_have_none(small, fails):
    fails(2, "--kv is for references, but static builds take none", "export", "-d", small, "--kv", "--shape", "64x64")
    fails(
        2,
        "component references is for pictures with references, which static builds do not draw",
        *("export", "-d", small, "--component", "references", "--shape", "64x64"),
    )
    fails(2, "component 'reference' is unknown.*transformer_cached", "export", "-d", small, "--component", "reference")


def test_damaged_metadata_of_a_graph(small):
    import onnx

    from fluxonnx.errors import CheckpointError
    from fluxonnx.lora.products import Layout

    model = onnx.load(small / "references.onnx", load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == "first_rows":
            entry.value = '{"a": "b"}'
    with pytest.raises(CheckpointError, match="damaged metadata"):
        Layout(model)


# On the command line


@pytest.mark.slow
def test_meaning(tmp_path):
    """The bundled model was not made for it, but follows the prompt, and draws about the picture without it."""
    model = Path(shutil.copytree(Path(__file__).parent.parent / "models/tiny-klein", tmp_path / "model"))

    def make(name: str, *flags: object) -> np.ndarray:
        file = tmp_path / f"{name}.png"
        assert main(["generate", "-d", str(model), "-q", "-S", "2", "-o", str(file), *map(str, flags)]) == 0
        return np.asarray(Image.open(file), np.float64)

    make("seen", "-p", "a red circle")
    edit = ("-p", "a blue square", "-r", tmp_path / "seen.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, kept = make("plain", *edit), make("kept", *edit, "--kv")
    assert np.sqrt(np.square(plain - kept).mean()) < 16
    # blue in the middle, as asked for
    red, _, blue = kept[56:72, 56:72].mean((0, 1))
    assert blue > 2 * red
    again = make("again", "--from", tmp_path / "kept.png", "-r", tmp_path / "seen.png")
    assert np.array_equal(kept, again)
