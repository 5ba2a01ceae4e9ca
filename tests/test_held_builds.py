"""Which build of a directory is used where none is asked for, and that no other one is exported beside it."""

from __future__ import annotations

import shutil
from itertools import chain, combinations
from pathlib import Path

import pytest

from fluxonnx import api
from fluxonnx.auto import held_build
from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.cli import main
from fluxonnx.contract import open_checkpoint
from fluxonnx.errors import CheckpointError
from tests.support import Case

CASE = Case("tiny-random")
BUILDS = [("bf16", "ort"), ("int8", "ort"), ("fp32", "portable"), ("fp16", "portable"), ("int8", "portable")]
NAMES = ["bf16", "int8", "fp32.portable", "fp16.portable", "int8.portable"]
# Every set of builds but the empty one.
SETS = list(chain.from_iterable(combinations(NAMES, count) for count in range(1, len(NAMES) + 1)))
# The builds in the order of docs/providers.md: those that a provider does not run right are left out.
ORDER = {
    "cpu": ["bf16", "int8", "fp32.portable", "int8.portable", "fp16.portable"],
    "cuda": ["bf16", "fp16.portable", "fp32.portable"],
    "webgpu": ["fp16.portable", "fp32.portable", "int8.portable"],
    "coreml": ["fp16.portable", "fp32.portable"],
    "openvino": ["fp32.portable", "int8.portable", "fp16.portable"],
}


@pytest.fixture(scope="module")
def full(checkpoints) -> Path:
    """A checkpoint with all of `BUILDS`."""
    for precision, flavour in BUILDS:
        root = checkpoints.exported(CASE, precision, flavour)
    return root


@pytest.fixture
def root(full, tmp_path) -> Path:
    return Path(shutil.copytree(full, tmp_path / "model"))


def keep(root: Path, names: tuple[str, ...]) -> None:
    """Have the manifest know only some builds."""
    manifest = read_manifest(root)
    manifest.builds = {name: build for name, build in manifest.builds.items() if name in names}
    manifest.save(root)


def without_weights(root: Path) -> None:
    """Remove the checkpoint's weights."""
    for file in (*root.glob("*/diffusion_pytorch_model.safetensors"), *root.glob("*/model.safetensors")):
        file.unlink()


def states(root: Path) -> dict[str, int]:
    return {path.as_posix(): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("provider", ORDER)
def test_the_order_of_several(root, full, provider):
    for names in SETS:
        shutil.copyfile(full / "fluxonnx.json", root / "fluxonnx.json")
        keep(root, names)
        held = held_build(open_checkpoint(root), provider)
        expected = next((name for name in ORDER[provider] if name in names), None)
        assert (held.build.name if held else None) == expected, names


@pytest.mark.slow
def test_nothing_is_exported_beside_a_build_that_works(root, full):
    def on_export(root):
        raise AssertionError("exported")

    for names in (*SETS[:15], SETS[-1]):  # one, two, and all of them
        shutil.copyfile(full / "fluxonnx.json", root / "fluxonnx.json")
        keep(root, names)
        before = states(root)
        api.load(root, on_export=on_export).close()
        assert states(root) == before, names


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_generate_draws_with_it_and_says_so(root, tmp_path, capsys, name):
    keep(root, (name,))
    arguments = ["-p", "x", "-S", "1", "-W", "64", "-H", "64", "-s", "1", "-o", str(tmp_path / "x.png")]
    assert main(["generate", "-d", str(root), *arguments]) == 0
    told = capsys.readouterr().err
    assert "Exporting" not in told
    assert (f"holds the build {name} (--precision asks for another one)" in told) == (name != "bf16")
    assert set(read_manifest(root).builds) == {name}


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{"precision": "fp32"}, {"flavour": "portable"}, {"precision": "int8"}])
def test_what_is_said_is_exported(root, asked):
    keep(root, ("bf16",))
    api.load(root, **asked).close()
    assert len(read_manifest(root).builds) == 2


@pytest.mark.slow
@pytest.mark.parametrize("names", [("int8",), ("int8", "bf16"), ("fp16.portable",)])
def test_a_build_that_does_not_work_is_passed_over(root, names):
    """Its file is damaged: the next one is taken, or the usual one exported."""
    keep(root, names)
    broken = read_manifest(root).builds[names[0]].components["transformer"]
    (root / broken.graph).write_bytes(b"")
    api.load(root).close()
    assert "bf16" in read_manifest(root).builds


def test_text_encoder_of_another_build(root):
    """A pair of builds works as well as one, but one that is whole comes first."""
    manifest = read_manifest(root)
    del manifest.builds["int8"].components["text_encoder"]
    for part in set(manifest.builds["bf16"].components) - {"text_encoder"}:
        del manifest.builds["bf16"].components[part]
    manifest.save(root)
    assert held_build(open_checkpoint(root), "cpu").build.name == "fp32.portable"
    keep(root, ("int8", "bf16"))
    held = held_build(open_checkpoint(root), "cpu")
    assert (held.build.name, held.encoder) == ("int8", "bf16")
    before = states(root)
    api.load(root).close()
    assert states(root) == before


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{}, {"precision": "int8"}, {"precision": "auto"}])
def test_without_weights_any_flavour_will_do(root, asked):
    keep(root, ("int8.portable",))
    without_weights(root)
    with api.load(root, **asked) as flux:
        info = flux.generate("x", 64, 64, steps=1, seed=1).info
    assert (info["precision"], info["flavour"]) == ("int8", "portable")


def test_without_weights_a_damaged_build_says_so(root):
    keep(root, ("int8.portable",))
    without_weights(root)
    (root / "transformer/int8.portable.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"int8\.portable build of .* is not whole .*: make it again with"):
        api.load(root)
