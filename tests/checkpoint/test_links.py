"""Weights behind links: a hub cache, hard links and folders on other disks work as they are, for every precision."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

import fluxonnx
from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.cli import main
from fluxonnx.export import export
from tests.support import Case, hub_cache

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="symbolic links need rights elsewhere")]

CASE = Case("tiny-random")


def picture(root: Path, precision: str | None = None) -> bytes:
    with fluxonnx.load(root, precision=precision) as flux:
        return flux.generate("x", 64, 64, steps=1, seed=1).tobytes()


@pytest.fixture(scope="module")
def expected(checkpoints) -> bytes:
    """The picture of the same model without links."""
    return picture(checkpoints.exported(CASE))


def hard_links(source: Path, root: Path) -> Path:
    return Path(shutil.copytree(source, root, copy_function=os.link))


def linked_folders(source: Path, root: Path) -> Path:
    """Component folders elsewhere, as people move them to a larger disk."""
    shutil.copytree(source, root)
    elsewhere = root.with_name("elsewhere")
    elsewhere.mkdir()
    for name in ("transformer", "text_encoder", "vae"):
        shutil.move(root / name, elsewhere / name)
        (root / name).symlink_to(elsewhere / name)
    return root


LAYOUTS = {"hub cache": hub_cache, "hard links": hard_links, "linked folders": linked_folders}


@pytest.mark.parametrize(
    ("layout", "disk"),
    [
        ("hub cache", "one disk"),
        ("hub cache", "two disks"),
        ("hard links", "one disk"),
        ("linked folders", "one disk"),
        ("linked folders", "two disks"),
    ],
)
def test_layouts(checkpoints, expected, tmp_path, monkeypatch, layout, disk):
    """On one disk nothing is copied; on two it is, and the line says so."""
    source = Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "source"))
    root = LAYOUTS[layout](source, tmp_path / "models--a--b")
    before = {path: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    if disk == "two disks":

        def refused(*names: object) -> None:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "link", refused)
    if layout == "hard links":
        export(root)
    else:
        with pytest.warns(UserWarning, match=r"lie behind a link"):
            export(root)
    assert picture(root) == expected
    build = read_manifest(root).builds["bf16"]
    new = {path for path in root.rglob("*.safetensors") if path not in before and not path.is_symlink()}
    names = {name for component in build.components.values() for name in component.weights}
    assert {path.relative_to(root).as_posix() for path in new} == names
    copied = [path for path in new if path.stat().st_nlink == 1]
    if layout == "hard links":
        assert not new
    else:
        assert new
        assert bool(copied) == (disk == "two disks")
    # it is up to date, and whole
    assert all(report.seconds is None for report in export(root))
    assert main(["inspect", str(root / "transformer.onnx")]) == 0
    if disk == "one disk":
        assert picture(root, "int4")


def test_the_cache_may_be_cleaned_after_a_copy(checkpoints, tmp_path):
    """A build of hard links keeps the bytes; that of other precisions needs none."""
    root = hub_cache(checkpoints.get(CASE), tmp_path / "models--a--b")
    export(root, precision="int8")
    expected = picture(root, "int8")
    for link in root.rglob("*.safetensors"):
        if link.is_symlink():
            link.resolve().unlink()
            link.unlink()
    assert picture(root, "int8") == expected


def test_changed_bytes_behind_a_hard_link_are_noticed(checkpoints, tmp_path):
    """The link shares them."""
    root = hub_cache(checkpoints.get(CASE), tmp_path / "models--a--b")
    export(root)
    expected = picture(root)
    blob = (root / "vae/diffusion_pytorch_model.safetensors").resolve()
    content = blob.read_bytes()
    with blob.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x80\x3f")
    os.utime(blob, (1, 1))
    reports = {report.component: report.seconds for report in export(root)}
    assert reports["transformer"] is None
    assert reports["vae_decoder"] is not None
    blob.write_bytes(content)
    os.utime(blob, (2, 2))
    assert picture(root) == expected
