"""What ordinary use, a failure or damage does to a model directory: nothing is used that is not what was exported."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fluxonnx
from fluxonnx.checkpoint.manifest import FILE_NAME, read_manifest
from fluxonnx.errors import CheckpointError, ExportError
from fluxonnx.export import export
from tests.support import Case

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(copy_of):
    return copy_of(CASE)


def picture(root: Path, precision: str | None = None) -> bytes:
    with fluxonnx.load(root, precision=precision) as flux:
        return flux.generate("x", 64, 64, steps=1, seed=1).tobytes()


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def zero_second_half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


@pytest.mark.parametrize(
    "name", ["transformer/int8.safetensors", "vae_decoder.int8.onnx", "vae/decoder.int8.safetensors"]
)
def test_damaged_files_of_a_build(copy, tmp_path, name):
    """They are made again where that is possible; elsewhere one line says what is wrong."""
    target = tmp_path / "copy"
    export(copy, target, precision="int8")
    expected, content = picture(target), (target / name).read_bytes()
    zero_second_half(target / name)
    with pytest.raises(CheckpointError, match=rf"{name} is not the file that was exported.*make it again with"):
        fluxonnx.load(target)
    reports = export(copy, target, precision="int8", force=name.endswith(".onnx"))
    assert any(report.seconds is not None for report in reports)
    assert (target / name).read_bytes() == content
    assert picture(target) == expected

    export(copy, precision="int8")
    zero_second_half(copy / name)
    assert picture(copy, "int8") == expected
    assert (copy / name).read_bytes() == content


def test_force_always_rewrites(copy):
    export(copy, precision="int8")
    stamp = (copy / "transformer/int8.safetensors").stat().st_ino
    reports = export(copy, precision="int8", force=True)
    assert all(report.seconds is not None for report in reports)
    assert (copy / "transformer/int8.safetensors").stat().st_ino != stamp


def test_file_of_another_model_with_the_same_header_is_not_reused(copy):
    """Nothing but the manifest says that a file is whole and of these weights."""
    export(copy, precision="int8")
    content = (copy / "transformer/int8.safetensors").read_bytes()
    (copy / FILE_NAME).unlink()
    zero_second_half(copy / "transformer/int8.safetensors")
    export(copy, precision="int8")
    assert (copy / "transformer/int8.safetensors").read_bytes() == content


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize(
    ("config", "change"),
    [
        ("transformer/config.json", {"rope_theta": 77.0}),
        ("transformer/config.json", {"eps": 0.01}),
        ("text_encoder/config.json", {"rope_theta": 77.0}),
        ("text_encoder/config.json", {"rms_norm_eps": 0.01}),
        ("fluxonnx.json", {"text_encoder_out_layers": [0, 1, 2]}),
    ],
)
def test_configs_changed_after_an_export(copy, tmp_path, precision, config, change):
    """The picture is that of a model which had them from the start."""
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    old = picture(copy, precision)
    edit(copy / config, **change)
    if config == FILE_NAME:
        edit(copy / config, **change)
        (other / config).write_text(json.dumps({"format_version": 1, "builds": {}, **change}))
    else:
        edit(other / config, **change)
    assert old != picture(copy, precision) == picture(other, precision)


def test_how_a_config_is_written_does_not_matter(copy):
    export(copy)
    config = copy / "transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_diffusers_version": "99"}, indent=7))
    assert all(report.seconds is None for report in export(copy))


def test_config_changed_where_nothing_can_be_exported(copy, tmp_path):
    target = tmp_path / "copy"
    export(copy, target, precision="int8")
    edit(target / "transformer/config.json", rope_theta=77.0)
    with pytest.raises(CheckpointError, match=r"transformer/config\.json has changed.*make it again with"):
        fluxonnx.load(target)


def test_one_changed_value_is_noticed(copy):
    """In a tensor of which no sample was taken, too."""
    export(copy, precision="int8")
    tensors = load_file(copy / WEIGHTS)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[-1] += np.ones((), tensors[name].dtype)
    save_file(tensors, copy / WEIGHTS)
    assert [report.seconds is None for report in export(copy, precision="int8")] == [True, True, False, True, True]


def test_copies_keep_what_the_maker_wrote(copy, tmp_path):
    said = {"text_encoder_out_layers": [0, 1, 2], "defaults": {"width": 96, "height": 64}}
    (copy / FILE_NAME).write_text(json.dumps({"format_version": 1, "builds": {}, **said}))
    for precision in ("bf16", "int8"):
        export(copy, tmp_path / precision, precision=precision)
        manifest = read_manifest(tmp_path / precision)
        assert (manifest.text_encoder_out_layers, manifest.defaults) == tuple(said.values())
        with fluxonnx.load(tmp_path / precision) as flux:
            assert flux.generate("x", steps=1).size == (96, 64)


@pytest.mark.parametrize("damage", [lambda text: text[:-5], lambda text: text.replace('"builds": {}', '"builds": 5')])
def test_forced_over_a_damaged_manifest(copy, damage):
    said = {"text_encoder_out_layers": [0, 1, 2], "defaults": {"width": 96, "height": 64}}
    (copy / FILE_NAME).write_text(damage(json.dumps({"format_version": 1, **said, "builds": {}})))
    with pytest.raises(CheckpointError, match="export again with --force"):
        export(copy)
    export(copy, force=True)
    manifest = read_manifest(copy)
    assert (manifest.text_encoder_out_layers, manifest.defaults) == tuple(said.values())


def test_forced_over_a_manifest_that_says_nothing(copy):
    (copy / FILE_NAME).write_text("\0")
    with pytest.warns(UserWarning, match="text_encoder_out_layers"):
        export(copy, force=True)


class Stop(Exception):
    pass


@pytest.mark.parametrize("options", [{}, {"components": ["vae_decoder"]}])
@pytest.mark.parametrize("before", [False, True])
def test_failed_export_of_a_transformer_is_forgotten(copy, tmp_path, options, before):
    """Whether the file is wrong or the export is stopped, the model draws what it drew before."""
    expected = picture(Path(shutil.copytree(copy, tmp_path / "other")))
    wrong, right = tmp_path / "wrong.safetensors", tmp_path / "right.safetensors"
    save_file({"x": np.ones(3, np.float32)}, wrong)
    tensors = load_file(copy / WEIGHTS)
    save_file({name: array * 2 for name, array in tensors.items()}, right)
    if before:
        export(copy)

    def stop(what: str, done: int, total: int) -> None:
        if what in ("transformer", *options.get("components", ())):
            raise Stop

    if not options:
        with pytest.raises(CheckpointError):
            export(copy, transformer=wrong, force=True)
    with pytest.raises(Stop):
        export(copy, transformer=right, force=True, progress=stop, **options)
    assert picture(copy) == expected
    export(copy, transformer=right, force=True)
    assert picture(copy) != expected


def test_session_notices_that_its_build_was_exported_again(copy):
    with fluxonnx.load(copy, precision="int8") as flux:
        export(copy, precision="int8", keep="ff", force=True)
        with pytest.raises(CheckpointError, match="was exported again since the model was opened: open it anew"):
            flux.generate("x", 64, 64, steps=1)


def test_component_folder_that_is_a_link(copy, tmp_path):
    """The build lies beside it, where ONNX takes it, and the folder is left alone."""
    (copy / "transformer").rename(tmp_path / "elsewhere")
    (copy / "transformer").symlink_to(tmp_path / "elsewhere")
    for precision in ("bf16", "int8"):
        assert picture(copy, precision)
        assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"config.json", Path(WEIGHTS).name}
        export(copy, tmp_path / precision, precision=precision)
        assert picture(tmp_path / precision)


@pytest.mark.skipif(os.name != "posix", reason="names are text elsewhere")
def test_names_that_are_not_text(copy, tmp_path):
    other = tmp_path / os.fsdecode(b"model\xff")
    try:
        shutil.copytree(copy, other)
    except OSError:
        pytest.skip("the file system has no such names")
    for call in (export, fluxonnx.load, lambda path: export(copy, path)):
        with pytest.raises(CheckpointError, match=r"not UTF-8.*rename the folder"):
            call(other)
    file = tmp_path / os.fsdecode(b"weights\xff.safetensors")
    shutil.copy(copy / WEIGHTS, file)
    export(copy, transformer=file, precision="int8")
    assert picture(copy, "int8")


def test_leftovers_are_removed(copy):
    """Of killed exports of other builds, too, which nobody may go on with."""
    (copy / "transformer/.fp32.safetensors.partial").write_bytes(b"gigabytes")
    (copy / f"transformer/.int4.safetensors.{os.getpid()}.0123abcd.tmp").write_bytes(b"gigabytes")
    export(copy)
    assert not list(copy.rglob(".*"))


def test_output_that_is_a_file(copy, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="is not a folder: choose another -o"):
        export(copy, tmp_path / "file")
