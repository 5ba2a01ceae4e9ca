"""`--text-encoder-precision`: the text encoder of one build beside the other graphs of another."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fluxonnx import api
from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.cli import main
from fluxonnx.export import export
from fluxonnx.measure import speed
from fluxonnx.runtime.events import GraphRan
from fluxonnx.runtime.metadata import read_parameters
from tests.support import Case, aged

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
SMALL = ["-W", "64", "-H", "64", "-s", "1", "-S", "3", "-p", "a cat"]
REST = ("conditioning", "transformer", "vae_encoder", "vae_decoder")


@pytest.fixture
def model(copy_of):
    return copy_of(CASE)


def graphs(root) -> dict[str, set[str]]:
    manifest = read_manifest(root)
    return {name: set(build.components) for name, build in manifest.builds.items()}


def draw(root, **options) -> Image.Image:
    with api.load(root, **options) as flux:
        return flux.generate("a cat", 64, 64, 1, 3)


def embeds(root, **options) -> np.ndarray:
    found = []

    def watch(event):
        if isinstance(event, GraphRan) and event.component == "text_encoder":
            found.append(event.outputs[0])

    draw(root, watch=watch, **options)
    return found[0]


def test_only_the_graphs_that_are_needed_are_exported(model):
    draw(model, precision="int8", text_encoder_precision="bf16")
    assert graphs(model) == {"bf16": {"text_encoder"}, "int8": set(REST)}


def test_each_graph_is_of_its_build(model):
    """The embeddings are those of the encoder's build; the picture that of the other build, from these embeddings."""
    mixed = embeds(model, precision="int8", text_encoder_precision="bf16")
    assert np.array_equal(mixed, embeds(model, precision="bf16"))
    assert not np.array_equal(mixed, embeds(model, precision="int8"))
    pictures = [
        np.asarray(draw(model, precision=one, text_encoder_precision=two))
        for one, two in (("int8", "bf16"), ("int8", None), ("bf16", None), ("bf16", "int8"))
    ]
    assert not any(np.array_equal(pictures[0], other) for other in pictures[1:])


def test_existing_builds_are_used(model):
    for precision in ("bf16", "int8"):
        export(model, precision=precision)
    exported = []
    draw(model, precision="int8", text_encoder_precision="bf16", on_export=exported.append)
    assert not exported


@pytest.mark.parametrize("name", ["text_encoder.onnx", "transformer.int8.onnx"])
def test_damaged_graphs_are_exported_again(model, name):
    """Whichever of the two builds it belongs to, and nothing else."""
    expected = draw(model, precision="int8", text_encoder_precision="bf16")
    times = {path.name: path.stat().st_mtime_ns for path in model.glob("*.onnx")}
    (model / name).write_bytes((model / name).read_bytes()[:-100])
    found = draw(model, precision="int8", text_encoder_precision="bf16")
    assert np.array_equal(found, expected)
    after = {path.name: path.stat().st_mtime_ns for path in model.glob("*.onnx")}
    assert {key for key in times if times[key] != after[key]} == {name}


def test_stale_builds_are_exported_again(model):
    draw(model, precision="int8", text_encoder_precision="bf16")
    aged(model)
    exported = []
    draw(model, precision="int8", text_encoder_precision="bf16", on_export=exported.append)
    assert len(exported) == 2
    assert graphs(model) == {"bf16": {"text_encoder"}, "int8": set(REST)}


@pytest.mark.parametrize(("one", "two"), [("int8", "bf16"), ("int8", "int4"), ("bf16", "int8")])
def test_copies_are_complete(model, tmp_path, one, two):
    """A copy knows its pair of builds without flags, and has no weights but those that they need."""
    copy = tmp_path / "copy"
    reports = export(model, copy, precision=one, text_encoder_precision=two)
    assert [report.component for report in reports] == ["text_encoder", *REST]
    assert all(report.seconds is None for report in export(model, copy, precision=one, text_encoder_precision=two))
    needed = {"text_encoder"} if two == "bf16" else set()
    needed |= {"transformer", "vae"} if one == "bf16" else set()
    weights = {path.parent.name for path in copy.glob("*/*.safetensors") if "int" not in path.name}
    assert weights == needed
    expected = draw(model, precision=one, text_encoder_precision=two)
    exported = []
    found = draw(copy, on_export=exported.append)
    assert not exported
    assert np.array_equal(found, expected)
    assert found.info["precision"] == one
    assert found.info["text_encoder_precision"] == two


def test_settings_go_to_the_build_that_has_them(model):
    export(model, precision="int8", text_encoder_precision="int4", rotate=True, block=32, keep="down_proj")
    builds = read_manifest(model).builds
    encoder, rest = builds["int4"].parsed_settings, builds["int8"].parsed_settings
    assert (encoder.block, encoder.rotate, encoder.keep) == (32, False, "down_proj")
    assert (rest.block, rest.rotate, rest.keep) == (None, True, "down_proj")


def test_only_wanted_graphs_are_exported(model):
    export(model, precision="int8", text_encoder_precision="bf16", components=["transformer"])
    assert graphs(model) == {"int8": {"transformer"}}


def test_picture_is_made_again_with_the_same_pair(model, tmp_path):
    first, second, third = (tmp_path / f"{i}.png" for i in range(3))
    flags = ["--precision", "int8", "--text-encoder-precision", "bf16"]
    assert main(["generate", "-d", str(model), *SMALL, *flags, "-o", str(first)]) == 0
    assert main(["generate", "-d", str(model), "--from", str(first), "-o", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert read_parameters(first)["text_encoder_precision"] == "bf16"
    flags = ["--text-encoder-precision", "int8"]
    assert main(["generate", "-d", str(model), "--from", str(first), *flags, "-o", str(third)]) == 0
    assert "text_encoder_precision" not in read_parameters(third)
    assert not np.array_equal(Image.open(third), Image.open(first))


def test_the_same_precision_is_no_pair(model):
    picture = draw(model, precision="bf16", text_encoder_precision="bf16")
    assert "text_encoder_precision" not in picture.info
    assert set(graphs(model)) == {"bf16"}


def test_auto(model):
    """`auto` chooses the other graphs, as without the flag."""
    picture = draw(model, precision="auto", text_encoder_precision="int8")
    assert (picture.info["precision"], picture.info["text_encoder_precision"]) == ("bf16", "int8")


def test_cached_prompts_are_those_of_the_encoder(model, tmp_path):
    options = {"precision": "int8", "cache_dir": tmp_path / "cache"}
    draw(model, **options, text_encoder_precision="bf16")
    draw(model, **options)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    draw(model, **options, text_encoder_precision="bf16")
    draw(model, **(options | {"precision": "bf16"}))
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


@pytest.mark.parametrize("command", ["generate", "export"])
def test_unknown_precision(model, fails, tmp_path, command):
    """Nothing is written before it is found out."""
    rest = [*SMALL, "-o", tmp_path / "a.png"] if command == "generate" else []
    flags = ["--precision", "int8", "--text-encoder-precision", "int3", "-q"]
    fails(2, "precision 'int3' is unknown: choose one of bf16", command, "-d", model, *flags, *rest)
    assert not list(model.glob("*.onnx"))


def test_bench(model, tmp_path):
    """Of both builds only the graphs that are used are exported."""
    output = tmp_path / "report.json"
    flags = ["--size", "64", "--steps", "1", "--precision", "int8", "--text-encoder-precision", "bf16", "--export"]
    assert main(["bench", "-d", str(model), *flags, "--json", str(output)]) == 0
    assert json.loads(output.read_text())["text_encoder_precision"] == "bf16"
    assert graphs(model) == {"bf16": {"text_encoder"}, "int8": set(REST)}
    plan = speed.Plan(model, speed.combine(["64"], ["int8"], []), text_encoder_precision="bf16")
    assert "text encoder in bf16" in speed.render(speed.Report(plan, {}, []))
