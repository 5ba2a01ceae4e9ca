"""Weight files in shards: none too large, together what one file holds, and everywhere taken for weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file

from fluxonnx import api
from fluxonnx.check.inspect import inspect
from fluxonnx.checkpoint.manifest import build_name, graph_file, read_manifest
from fluxonnx.errors import UsageError
from fluxonnx.export import export
from tests.support import Case

CASE = Case("tiny-random")
SIZE = 60_000
BUILDS = [("int8", "ort"), ("fp32", "portable")]


@pytest.fixture
def root(checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "model"))


def own(root: Path, name: str, component: str = "transformer") -> list[str]:
    return read_manifest(root).builds[name].components[component].weights


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "flavour"), BUILDS)
def test_shards_are_what_one_file_is(root, checkpoints, precision, flavour):
    export(root, precision=precision, flavour=flavour, shard_size=SIZE)
    whole = checkpoints.exported(CASE, precision, flavour)
    name = build_name(precision, flavour)
    assert len(own(root, name)) > 1
    for component in ("text_encoder", "transformer", "vae_encoder", "vae_decoder"):
        parts = [load_file(root / file) for file in own(root, name, component)]
        (expected,) = (load_file(whole / file) for file in own(whole, name, component))
        assert sum(map(len, parts)) == len(expected)
        found = {key: value for part in parts for key, value in part.items()}
        assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in expected.items()}
        for file, part in zip(own(root, name, component), parts, strict=True):
            assert (root / file).stat().st_size <= SIZE or len({key.partition(".scale")[0] for key in part}) == 1
        path = root / graph_file(component, precision, flavour)
        onnx.checker.check_model(str(path), full_check=True)
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        files = inspect(path, 64, 64, 16).external
        assert {file.location for file in files} == set(own(root, name, component))
        assert all(file.digest and file.problem is None for file in files)
    pictures = []
    for folder in (root, whole):
        with api.load(folder, precision=precision, flavour=flavour) as flux:
            pictures.append(flux.generate("x", 64, 64, steps=1, seed=1).tobytes())
    assert pictures[0] == pictures[1]


def test_one_file_if_that_is_enough(root):
    export(root, precision="int8", shard_size=10**9, components=["transformer"])
    assert own(root, "int8") == ["transformer/int8.safetensors"]


@pytest.mark.slow
def test_exported_again_it_keeps_its_shards(root):
    """Nothing is written the second time; a shard that is gone or changed is."""
    export(root, precision="int8", shard_size=SIZE)
    names = own(root, "int8")
    assert all(report.seconds is None for report in export(root, precision="int8", shard_size=SIZE))
    before = {name: (root / name).read_bytes() for name in names}
    (root / names[0]).unlink()
    (root / names[1]).write_bytes(b"")
    api.load(root, precision="int8").close()
    assert own(root, "int8") == names
    assert {name: (root / name).read_bytes() for name in names} == before


@pytest.mark.slow
def test_files_of_another_size_are_removed(root):
    """They would be as large as the weights; but a file that somebody put there stays, and one that others use."""
    export(root, precision="int8", shard_size=SIZE, components=["transformer"])
    export(root, precision="int8", shape=(64, 64), text_seq=16, shard_size=SIZE, components=["transformer"])
    before = own(root, "int8")
    export(root, precision="int8", components=["transformer"], force=True)
    assert own(root, "int8") == ["transformer/int8.safetensors"]
    assert all((root / name).exists() for name in before), "the static build uses them"
    export(root, precision="int8", shape=(64, 64), text_seq=16, components=["transformer"], force=True)
    assert not any((root / name).exists() for name in before)


@pytest.mark.slow
def test_two_precisions_of_which_one_writes_nothing(root):
    export(root, precision="int8", text_encoder_precision="bf16", shard_size=SIZE)
    assert own(root, "bf16", "text_encoder") == []
    assert len(own(root, "int8")) > 1


@pytest.mark.parametrize(
    "arguments", [{"precision": "bf16", "shard_size": SIZE}, {"precision": "int8", "shard_size": 0}]
)
def test_impossible_shards(root, arguments):
    with pytest.raises(UsageError, match="--shard-size"):
        export(root, **arguments)
