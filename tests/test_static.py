"""Static builds: all sizes are numbers, pictures are those of the build for any size, what else is asked is told."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import shape_inference

from fluxonnx import UsageError, api
from fluxonnx.checkpoint.manifest import Shape, build_name, graph_file, read_manifest
from fluxonnx.cli import main
from fluxonnx.contract import COMPONENTS
from fluxonnx.errors import CheckpointError
from fluxonnx.export import export
from fluxonnx.runtime.engine import SessionOptions
from fluxonnx.runtime.engines import onnxruntime_engine
from fluxonnx.runtime.request import Request
from fluxonnx.runtime.session import Session
from tests.support import GRAPH_TOLERANCE, IMAGE_TOLERANCE, Case, relative_error

CASE = Case("tiny-random")
SHAPE = Shape(96, 64, 24)
SIZES = {"width": SHAPE.width, "height": SHAPE.height, "max_sequence_length": SHAPE.text_seq}
BUILDS = [("bf16", "ort"), ("fp16", "portable"), ("int8", "ort")]


def static(root: Path, precision: str, flavour: str = "ort"):
    return export(
        root, precision=precision, flavour=flavour, shape=(SHAPE.width, SHAPE.height), text_seq=SHAPE.text_seq
    )


@pytest.fixture(scope="module")
def full(checkpoints, tmp_path_factory) -> Path:
    """A checkpoint with a build for any size, and a static one, of each of `BUILDS`."""
    root = Path(shutil.copytree(checkpoints.get(CASE), tmp_path_factory.mktemp("static") / "model"))
    for precision, flavour in BUILDS:
        export(root, precision=precision, flavour=flavour)
        static(root, precision, flavour)
    return root


@pytest.fixture
def root(full, tmp_path) -> Path:
    return Path(shutil.copytree(full, tmp_path / "model"))


@pytest.fixture
def only(root) -> Path:
    """A directory with a static build and no other."""
    manifest = read_manifest(root)
    manifest.builds = {name: manifest.builds[name] for name in (build_name("int8", "ort", SHAPE),)}
    manifest.save(root)
    return root


class Recorder:
    """An engine that remembers which builds its graphs are of."""

    def __init__(self) -> None:
        self.used: dict[str, str] = {}

    def __call__(self, path, component, build, options):
        self.used[component] = build.name
        return onnxruntime_engine(path, component, build, options)


def drawn(root: Path, request: Request, seeds=(1,), **options) -> tuple[list[np.ndarray], dict[str, str]]:
    """Return pictures, and the build that each graph was of."""
    engine = Recorder()
    with api.load(root, engine=engine, **options) as flux:
        return [np.asarray(image, int) for _, image in flux.pictures(request, seeds)], engine.used


@pytest.mark.parametrize(("precision", "flavour"), BUILDS)
def test_all_sizes_are_numbers(full, precision, flavour):
    for component in COMPONENTS:
        model = onnx.load(full / graph_file(component, precision, flavour, SHAPE), load_external_data=False)
        assert "Shape" not in {node.op_type for node in model.graph.node}
        inferred = model if flavour == "ort" else shape_inference.infer_shapes(model)
        graph = inferred.graph
        for info in (*graph.input, *graph.output, *graph.value_info):
            assert all(dim.HasField("dim_value") for dim in info.type.tensor_type.shape.dim), info.name
        if flavour == "portable":
            typed = {info.name for info in (*graph.output, *graph.value_info)}
            assert {name for node in graph.node for name in node.output} <= typed


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "flavour"), BUILDS)
def test_graphs_compute_the_same(full, precision, flavour):
    builds = read_manifest(full).builds
    random = np.random.default_rng(1)
    for component in COMPONENTS:
        outputs = []
        for shape in (SHAPE, None):
            build = builds[build_name(precision, flavour, shape)]
            path = full / graph_file(component, precision, flavour, shape)
            if shape:
                graph = onnx.load(path, load_external_data=False).graph
                sizes = {info.name: [d.dim_value for d in info.type.tensor_type.shape.dim] for info in graph.input}
                inputs = {name: random.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
                for name in inputs:
                    if name.endswith("_ids"):
                        inputs[name] = random.integers(0, 64, sizes[name])
                    elif name == "attention_mask":
                        inputs[name] = (np.arange(SHAPE.text_seq) < 9)[None].astype(np.int64)
            with Session(path, component, SessionOptions(), build) as session:
                outputs.append(session.run(**inputs))
        for found, expected in zip(*outputs, strict=True):
            if component == "text_encoder":  # of padding nobody asks; portable and static graphs compute it otherwise
                found, expected = found[:, :9], expected[:, :9]
            assert relative_error(found, expected) < GRAPH_TOLERANCE


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_weights_are_those_of_the_other_build(root, precision):
    flavour = dict(BUILDS)[precision]
    reports = export(
        root, precision=precision, flavour=flavour, shape=(64, 64), text_seq=SHAPE.text_seq, components=["transformer"]
    )
    builds = read_manifest(root).builds
    here, there = (
        builds[build_name(precision, flavour, s)].components["transformer"] for s in (Shape(64, 64, 24), None)
    )
    assert here.weights == there.weights
    assert reports[0].bytes_written == (root / here.graph).stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "flavour"), BUILDS)
def test_it_draws_its_size_and_the_other_build_the_rest(root, precision, flavour):
    options = {"precision": precision, "flavour": flavour}
    name, its = build_name(precision, flavour), build_name(precision, flavour, SHAPE)
    request = Request(prompt="a cat", steps=2, **SIZES)
    pictures, used = drawn(root, request, (1, 2), **options)
    assert set(used.values()) == {its}
    manifest = read_manifest(root)
    del manifest.builds[its]
    manifest.save(root)
    expected, used = drawn(root, request, (1, 2), **options)
    assert set(used.values()) == {name}
    assert np.abs(np.array(pictures) - np.array(expected)).max() <= IMAGE_TOLERANCE


@pytest.mark.slow
def test_what_it_does_not_draw_is_of_the_other_build(root):
    for change in ({"width": 64}, {"references": [np.zeros((64, 96, 3), np.uint8)]}):
        _, used = drawn(root, Request(**{"prompt": "x", "steps": 1, **SIZES, **change}), precision="bf16")
        assert used["transformer"] == "bf16"
    _, used = drawn(root, Request(prompt="x", steps=1, **{**SIZES, "max_sequence_length": 16}), precision="bf16")
    assert {used["text_encoder"], used["transformer"]} == {"bf16"}


def test_alone_it_draws_its_size_by_default(only):
    pictures, used = drawn(only, Request(prompt="a cat", steps=1), (1, 2, 3))
    assert {picture.shape for picture in pictures} == {(SHAPE.height, SHAPE.width, 3)}
    assert set(used.values()) == {build_name("int8", "ort", SHAPE)}
    assert list(read_manifest(only).builds) == [build_name("int8", "ort", SHAPE)]


def test_alone_it_paints_over_previews_and_edits_steps(only):
    picture = np.full((SHAPE.height, SHAPE.width, 3), 99, np.uint8)
    request = Request(prompt="a cat", steps=2, image=picture, strength=0.6)
    with api.load(only, low_memory=True) as flux:
        (last,) = [step for step in flux.steps(request, 1) if step.index == step.steps]
        assert last.preview().size == (SHAPE.width // 2, SHAPE.height // 2)
        assert last.image().info.get("tile") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 64}, r"64x64 from a prompt of 24 tokens was asked for, .* static, for 96x64 from 24 tokens"),
        ({"max_sequence_length": 16}, r"96x64 from a prompt of 16 tokens .* --shape 96x64 --text-seq 16"),
        (
            {"references": [np.zeros((64, 96, 3), np.uint8)]},
            r"a picture with references .* fluxonnx export -d .* --precision int8",
        ),
        ({"image": np.zeros((128, 128, 3), np.uint8), "strength": 0.5, "width": 128, "height": 128}, "128x128"),
    ],
)
def test_alone_what_it_does_not_draw_is_refused(only, change, message):
    """At once, with the command that adds what is missing; and that command does."""
    request = Request(**{"prompt": "x", "steps": 1, **SIZES, **change})
    with api.load(only) as flux, pytest.raises(UsageError, match=message) as error:
        flux.check(request)
    command = re.findall(
        r"fluxonnx export -d (\S+) --precision (\w+)(?: --shape (\d+)x(\d+) --text-seq (\d+))?", str(error.value)
    )
    folder, precision, width, height, length = command[-1]
    shape = {"shape": (int(width), int(height)), "text_seq": int(length)} if width else {}
    export(folder, precision=precision, **shape)
    with api.load(only) as flux:
        flux.check(request)


def test_alone_a_prompt_of_another_length_is_refused(only):
    with api.load(only) as flux, pytest.raises(UsageError, match=r"a prompt of 16 tokens was asked for"):
        flux.encode_prompts(["x"], 16)


def test_a_line_that_is_not_drawn_is_found_before_the_first_picture(only, tmp_path, fails):
    prompts = tmp_path / "prompts"
    prompts.write_text('{"prompt": "x"}\n{"prompt": "x", "width": 64, "height": 64}\n')
    pattern = r".*prompts.*: 64x64 from a prompt of 24 tokens was asked for"
    fails(2, pattern, "generate", "-q", "-d", only, "--prompt-file", prompts, "-o", tmp_path / "x.png", "-S", "1")
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_guidance(checkpoints, tmp_path):
    """Two passes a step: each for one picture at a time."""
    root = Path(shutil.copytree(checkpoints.get(Case("tiny-random", is_distilled=False)), tmp_path / "model"))
    export(root)
    request = Request(prompt="a cat", negative_prompt="a dog", guidance_scale=3.0, steps=2, **SIZES)
    expected, _ = drawn(root, request, (1, 2))
    static(root, "bf16")
    pictures, used = drawn(root, request, (1, 2))
    assert set(used.values()) == {build_name("bf16", "ort", SHAPE)}
    assert np.abs(np.array(pictures) - np.array(expected)).max() <= IMAGE_TOLERANCE


def test_text_encoder_of_another_precision(root):
    _, used = drawn(root, Request(prompt="x", steps=1, **SIZES), precision="int8", text_encoder_precision="bf16")
    assert (used["text_encoder"], used["transformer"]) == ("bf16", "int8")


def test_a_damaged_one_is_passed_over(root):
    its = read_manifest(root).builds[build_name("bf16", "ort", SHAPE)]
    (root / its.components["transformer"].graph).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"bf16\.96x64-24 .* is not used .*--shape 96x64 --text-seq 24 --force"):
        _, used = drawn(root, Request(prompt="x", steps=1, **SIZES), precision="bf16")
    assert set(used.values()) == {"bf16"}


@pytest.mark.slow
def test_a_stale_one_is_exported_again(only):
    manifest = read_manifest(only)
    for component in manifest.builds[build_name("int8", "ort", SHAPE)].components.values():
        component.exporter_digest = "of another exporter"
    manifest.save(only)
    _, used = drawn(only, Request(prompt="x", steps=1))
    assert set(used.values()) == {build_name("int8", "ort", SHAPE)}
    found = read_manifest(only).builds
    assert list(found) == [build_name("int8", "ort", SHAPE)]
    assert "of another exporter" not in {
        c.exporter_digest for build in found.values() for c in build.components.values()
    }


@pytest.mark.parametrize("text", ["", "96", "96x64", "0x64-24", "96x64-24-1", "x-", "96x64-99999999"])
def test_damaged_shapes_in_a_manifest(only, text):
    manifest = read_manifest(only)
    (build,) = manifest.builds.values()
    manifest.builds = {f"int8.{text}": build}
    build.settings["shape"] = text
    manifest.save(only)
    with pytest.raises(CheckpointError, match=r"fluxonnx\.json is corrupt .*: export again with --force"):
        read_manifest(only)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "512"], "no size: write it as 512x512"),
        (["--shape", "63x64"], "sides are from 64 to 4096"),
        (["--shape", "70x64"], "width 70 can't be drawn: choose a multiple of 16"),
        (["--shape", "64x64", "--text-seq", "513"], "--text-seq 513 is out of range: 1 to 512"),
        (["--shape", "64x64", "--text-seq", "0"], "--text-seq 0 is out of range: 1 to 512"),
        (["--text-seq", "8"], "say which size it draws with --shape"),
        (["--shard-size", "5"], "no size of 1 MB or more"),
        (["--shard-size", "5MB"], "bf16 leaves them where they are"),
    ],
)
def test_impossible_flags(checkpoints, capsys, arguments, message):
    try:
        code = main(["export", "-d", str(checkpoints.get(CASE)), *arguments])
    except SystemExit as error:  # the parser's
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
