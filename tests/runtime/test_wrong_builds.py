"""A build that does not suit: of another provider, edited, without its weights; and a provider that fails in a run."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import onnx
import onnxruntime
import pytest

from fluxonnx import FluxonnxError, UsageError, api
from fluxonnx.checkpoint.digests import content_digest
from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.cli import main
from fluxonnx.export import export
from fluxonnx.runtime import providers
from tests.support import Case

CASE = Case("tiny-random")
PICTURE = ["-p", "a cat", "-S", "1", "-s", "1", "-W", "64", "-H", "64"]


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory) -> Path:
    """A copy with an int8 build and nothing else, its weights in shards; and beside it the checkpoint."""
    root = tmp_path_factory.mktemp("wrong") / "copy"
    export(checkpoints.get(CASE), root, precision="int8", shard_size=100_000)
    return root


@pytest.fixture
def root(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


def weights(root: Path) -> list[Path]:
    return sorted(root / name for name in read_manifest(root).builds["int8"].components["transformer"].weights)


def missing(root: Path) -> None:
    weights(root)[0].unlink()


def moved(root: Path) -> None:
    file = weights(root)[-1]
    file.rename(root / file.name)


def cut(root: Path) -> None:
    os.truncate(weights(root)[0], 1000)


def exchanged(root: Path) -> None:
    """The file is another one of the build, as in a copy that was put together by hand."""
    first, *_, last = weights(root)
    shutil.copyfile(last, first)


def edited(root: Path) -> None:
    """A node's name is changed, as an editor of graphs does."""
    file = root / read_manifest(root).builds["int8"].components["transformer"].graph
    model = onnx.load(file, load_external_data=False)
    model.graph.node[-1].name = "mine"
    onnx.save(model, file)


@pytest.mark.parametrize("damage", [missing, moved, cut, exchanged, edited])
def test_damaged_where_nothing_can_be_exported(root, fails, tmp_path, damage):
    damage(root)
    cure = r"make it again with fluxonnx export -d CHECKPOINT -o .*model --precision int8"
    fails(1, f"int8 build of .* is not whole .*: {cure}", "generate", "-q", "-d", root, *PICTURE)


def test_the_cure_cures(root, checkpoints):
    """The command of the message, with the checkpoint in its place."""
    missing(root)
    export(checkpoints.get(CASE), root, precision="int8", shard_size=100_000)
    api.load(root).close()


def test_an_edited_graph_is_replaced_with_a_warning(copy_of, capsys, tmp_path):
    root = copy_of(CASE)
    assert main(["export", "-q", "-d", str(root), "--precision", "int8"]) == 0
    edited(root)
    picture = str(tmp_path / "x.png")
    assert main(["generate", "-d", str(root), "--precision", "int8", *PICTURE, "-o", picture]) == 0
    pattern = "transformer.int8.onnx is not the file that was exported, so it is exported again"
    assert capsys.readouterr().err.count(pattern) == 1
    assert main(["generate", "-d", str(root), "--precision", "int8", *PICTURE, "-o", picture]) == 0
    assert pattern not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("provider", "name", "reason", "flags"),
    [
        ("webgpu", "WebGpuExecutionProvider", "runs portable graphs", "--precision fp16 --flavour portable"),
        ("coreml", "CoreMLExecutionProvider", "has no numbers of int8", "--precision fp16 --flavour portable --shape"),
        ("dml", "DmlExecutionProvider", None, None),
    ],
)
def test_a_build_for_another_provider(root, stand_in, provider, name, reason, flags):
    stand_in(name, 0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        api.load(root, provider=provider).close()
    messages = [str(item.message) for item in told if "is not made for" in str(item.message)]
    if reason is None:
        assert messages == []
    else:
        (message,) = messages
        assert reason in message
        assert f"fluxonnx export -d CHECKPOINT -o {root} {flags}" in message


def test_a_provider_that_fails_in_a_run(root, monkeypatch, fails, tmp_path):
    """The graphs load, and then the driver gives up."""
    real = onnxruntime.InferenceSession

    class Failing:
        def __init__(self, model, options, providers, **others):
            self.session, self.chosen = real(model, options, providers=["CPUExecutionProvider"]), providers
            self.is_probe = isinstance(model, bytes)

        def get_providers(self):
            return ["DmlExecutionProvider", "CPUExecutionProvider"]

        def run(self, *words):
            if self.is_probe or self.chosen == ["CPUExecutionProvider"]:
                return self.session.run(*words)
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : device removed")

    monkeypatch.setattr(onnxruntime, "InferenceSession", Failing)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["DmlExecutionProvider"])
    flags = ["generate", "-q", "-d", root, "--provider", "dml", *PICTURE, "-o", tmp_path / "x.png"]
    fails(1, r"text_encoder\.int8\.onnx failed on dml: .*device removed.* --low-memory .* --provider cpu", *flags)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("provider", "given", "message"),
    [
        ("cpu", {"MLComputeUnits": "ALL"}, r"provider 'cpu' has no option .MLComputeUnits.: it has none"),
        ("openblas", {"x": "1"}, r"provider 'openblas' has no option .x.: it has none"),
        ("coreml", {"ComputeUnits": "ALL"}, r"no option .ComputeUnits.: it has .*MLComputeUnits, .*ModelFormat"),
        ("coreml", {"MLComputeUnits": "gpu"}, r"can't be .gpu.: choose ALL or CPUAndGPU or"),
        ("webgpu", {"preferredLayout": ""}, r"can't be ..: choose NCHW or NHWC"),
    ],
)
def test_options_that_are_none(provider, given, message):
    with pytest.raises(UsageError, match=message):
        providers.check_provider_options(provider, given)


def test_options_are_passed_on(monkeypatch, tmp_path):
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CoreMLExecutionProvider", "OpenVINOExecutionProvider"]
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    given = {"MLComputeUnits": "CPUAndGPU", "ModelCacheDirectory": "mine"}
    providers.check_provider_options("coreml", given)
    (_, options), _ = providers.session_providers("coreml", None, None, given, "0123")
    assert options == {"ModelFormat": "MLProgram", **given}
    (_, options), _ = providers.session_providers("coreml", None, None, {}, "0123")
    assert Path(options["ModelCacheDirectory"]) == tmp_path / "fluxonnx/coreml/0123"
    assert Path(options["ModelCacheDirectory"]).is_dir()
    (_, options), _ = providers.session_providers("openvino", None, None, {"device_type": "GPU"}, "0123")
    assert options == {"device_type": "GPU"}


def test_compiled_graphs_are_told_apart(root, stand_in, monkeypatch, tmp_path):
    """onnxruntime would take what was compiled of another graph, or of other weights, for this one's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    made = stand_in("CoreMLExecutionProvider", 0)

    def folders() -> list[str]:
        made.clear()
        with pytest.warns(UserWarning, match="is not made"), api.load(root, provider="coreml") as flux:
            flux.generate("x", 64, 64, steps=1, seed=1)
        return [words[0][1].get("ModelCacheDirectory") for s in made if isinstance((words := s.chosen)[0], tuple)]

    first = [folder for folder in folders() if folder]
    assert len(set(first)) == 3, "the text encoder, the transformer and the decoder"
    assert [folder for folder in folders() if folder] == first
    manifest = read_manifest(root)
    for name in manifest.builds["int8"].components["transformer"].files:
        file = root / name
        if file.suffix == ".onnx":
            model = onnx.load(file, load_external_data=False)
            model.doc_string = "of other weights"
            onnx.save(model, file)
            manifest.builds["int8"].components["transformer"].files[name] = content_digest(file)
    manifest.save(root)
    again = [folder for folder in folders() if folder]
    assert [a == b for a, b in zip(first, again, strict=True)] == [True, False, True]


@pytest.mark.parametrize("text", ["MLComputeUnits", "=ALL", ""])
def test_provider_option_that_is_no_pair(text, capsys):
    with pytest.raises(SystemExit) as error:
        main(["generate", "--provider-option", text, *PICTURE])
    assert error.value.code == 2
    assert "is no option: write it as NAME=VALUE" in capsys.readouterr().err


def test_provider_option_of_the_cpu(root, fails):
    pattern = "provider 'cpu' has no option .a.: it has none"
    fails(2, pattern, "generate", "-q", "-d", root, "--provider-option", "a=b", *PICTURE)


def test_errors_are_ours(root):
    missing(root)
    with pytest.raises(FluxonnxError):
        api.load(root)
