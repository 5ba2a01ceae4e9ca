"""What may not be read or written: one line that says so, nothing half done, and nothing silently left out.

Root may do everything. A test that runs as root lays this down for as long as it runs: the capabilities that override
permissions are taken out of the effective set of its thread (capabilities(7)), which is what the kernel looks at.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

import fluxonnx
from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.cli import main
from fluxonnx.errors import CheckpointError, FluxonnxError
from fluxonnx.export import export
from fluxonnx.files import atomic_write
from fluxonnx.runtime.metadata import read_parameters
from fluxonnx.runtime.outputs import check_output, write_output
from fluxonnx.runtime.saving import save_image
from tests.support import Case

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are others there")

CASE = Case("odd-heads")
RED = Image.new("RGB", (64, 64), "red")
# CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER of <linux/capability.h>
OVERRIDING = 0b1110
VERSION_3 = 0x20080522


@pytest.fixture(autouse=True)
def without_privileges() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "capset"):
        pytest.skip("root may do everything here")
    # struct __user_cap_header_struct, and twice struct __user_cap_data_struct: effective, permitted, inheritable
    header, sets = (ctypes.c_uint32 * 2)(VERSION_3, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~OVERRIDING
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = before
    assert libc.capset(header, sets) == 0


@contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    """Change the permissions of a file or folder for the length of a block."""
    before = path.stat().st_mode & 0o7777
    path.chmod(bits)
    try:
        yield
    finally:
        path.chmod(before)


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory) -> Path:
    """A model with a build, whose permissions the tests change and restore."""
    root = tmp_path_factory.mktemp("permissions") / "model"
    shutil.copytree(checkpoints.get(CASE), root)
    export(root)
    return root


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in root.rglob("*")}


GENERATE = ["generate", "-q", "-p", "x", "-W", "64", "-H", "64", "-s", "1", "-o", "a.png"]
COMMANDS = {
    "generate": [*GENERATE, "-d"],
    "generate another": [*GENERATE, "--precision", "int8", "-d"],
    "export": ["export", "-q", "--precision", "fp32", "-d"],
    "copy": ["export", "-q", "-o", "copy", "-d"],
    "bench": ["bench", "-q", "--size", "64", "--steps", "1", "-d"],
    "compare": ["compare", "-q", "--precision", "fp32", "-W", "64", "-H", "64", "-s", "1", "-o", "a.html", "-d"],
}
UNREADABLE = [
    *("", "model_index.json", "fluxonnx.json", "transformer", "transformer/config.json", "vae", "vae/config.json"),
    *("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "text_encoder"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_may_not_be_read_of_a_model(exported, place, fails, name):
    """Whatever command comes across it; a folder without x shows its names, but not what they stand for."""
    before = listing(exported)
    for bits in (0o000, 0o400) if (exported / name).is_dir() else (0o000,):
        for command in COMMANDS.values():
            if name == "fluxonnx.json" and "copy" in command:
                continue  # the copy has its own
            if name.endswith(".safetensors") and "bench" in command:
                continue  # read in another process, which as root has its privileges again
            with mode(exported / name, bits):
                fails(1, rf"{exported / name}.* can't be read: Permission denied", *command, exported)
            assert listing(exported) == before
            assert [path.name for path in place.iterdir() if path.suffix in (".png", ".html")] == []


@pytest.mark.parametrize(("name", "bits"), [("tokenizer", 0), ("tokenizer", 0o400), ("tokenizer/tokenizer.json", 0)])
def test_what_may_not_be_read_of_a_tokenizer(exported, place, fails, name, bits):
    """A copy without it would be worthless, and only its user would find out."""
    with mode(exported / name, bits):
        for command in ("generate", "copy"):
            fails(1, rf"{exported / name}.* can't be read: Permission denied", *COMMANDS[command], exported)
        with pytest.raises(CheckpointError, match=r"tokenizer.* can't be read: Permission denied"):
            fluxonnx.load(exported)
    assert list(place.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer.onnx", "conditioning.onnx"])
def test_a_graph_that_may_not_be_read(exported, place, fails, name):
    with mode(exported / name, 0):
        fails(1, rf"{exported / name} can't be read: Permission denied", *COMMANDS["generate"], exported)


@pytest.mark.slow
def test_a_good_build_needs_no_permission_to_write(exported, place):
    """Also that of another owner, as on a machine with many users."""
    folders = [exported, *(path for path in exported.rglob("*") if path.is_dir())]
    before = listing(exported)
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert main([*COMMANDS["generate"], str(exported)]) == 0
        assert main(["export", "-q", "-d", str(exported)]) == 0
        if os.geteuid() == 0:
            os.chown(exported, 65534, 65534)
            assert main([*COMMANDS["generate"], str(exported)]) == 0
    finally:
        if os.geteuid() == 0:
            os.chown(exported, 0, 0)
        for folder in folders:
            folder.chmod(0o755)
    assert listing(exported) == before
    assert read_parameters(place / "a.png")["prompt"] == "x"


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["", "transformer"])
def test_a_model_that_may_not_be_written(exported, place, fails, folder):
    """The message names what a person knows, not a temporary file."""
    before, builds = listing(exported), set(read_manifest(exported).builds)
    with mode(exported / folder, 0o555):
        for command in ("export", "generate another"):
            pattern = (
                rf"no permission to write {exported / folder}/[a-z]\S*: change the folder's permissions, or make a copy"
            )
            fails(1, pattern, *COMMANDS[command], exported)
    assert set(read_manifest(exported).builds) >= builds
    assert listing(exported) == before


@pytest.mark.parametrize("bits", [0o000, 0o400, 0o555])
def test_outputs_that_may_not_be_written(exported, place, fails, bits):
    """Found before anything is drawn, measured or exported."""
    out = place / "out"
    out.mkdir()
    save_image(RED, out / "old.png", {"prompt": "x"})
    generate = [*GENERATE[:-1]]
    for command in (
        [*generate, "out/new.png", "-d", exported],
        [*generate, "out/old.png", "-d", exported],
        [*generate, "out/new.png", "-n", "2", "-d", exported],
        [*COMMANDS["bench"], exported, "--json", "out/a.json"],
        [*COMMANDS["compare"], exported, "-o", "out/a.html"],
        ["export", "-q", "-d", exported, "-o", "out"],
        ["export", "-q", "-d", exported, "-o", "out/copy"],
    ):
        with mode(out, bits):
            fails(1, r"no permission to write out(/\w\S*)?: change the folder's permissions, or ", *command)
    assert [path.name for path in out.iterdir()] == ["old.png"]
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.parametrize("bits", [0o000, 0o400])
def test_inputs_that_may_not_be_read(exported, place, fails, bits):
    """A file, or one in a folder that may not be entered."""
    inputs = place / "in"
    inputs.mkdir()
    save_image(RED, inputs / "a.png", {"prompt": "x"})
    (inputs / "prompts.txt").write_text("x")
    (inputs / "weights.safetensors").touch()
    denied = "can't be read: Permission denied"
    for place_of_denial in (inputs, *inputs.iterdir()):
        if bits and place_of_denial is not inputs:
            continue
        for code, file, command in (
            (1, "a.png", ["info", "in/a.png"]),
            (1, "a.png", [*GENERATE, "-i", "in/a.png", "-d", exported]),
            (1, "a.png", ["generate", "-q", "--from", "in/a.png", "-o", "b.png", "-d", exported]),
            (2, "prompts.txt", ["generate", "-q", "--prompt-file", "in/prompts.txt", "-d", exported]),
            (1, "weights.safetensors", ["export", "-d", exported, "--transformer", "in/weights.safetensors"]),
        ):
            if place_of_denial in (inputs, inputs / file):
                with mode(place_of_denial, bits):
                    fails(code, rf"in/{file} {denied}", *command)
    assert [path.name for path in place.iterdir()] == ["in"]


@pytest.mark.slow
def test_a_cache_that_may_not_be_used(exported, place, fails, capsys):
    """One that can't be made is a mistake in the flag; one that can't be written to still lets the picture be made."""
    cache = place / "cache"
    cache.mkdir()
    for bits in (0o000, 0o400, 0o555):
        with mode(cache, bits):
            fails(2, "cache directory cache/new can't be used: Permission denied: choose another",
                  *COMMANDS["generate"], exported, "--cache-dir", "cache/new")  # fmt: skip
            arguments = [argument for argument in COMMANDS["generate"] if argument != "-q"]
            assert main([*arguments, str(exported), "--cache-dir", "cache"]) == 0
        (warning,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
        assert warning.startswith("fluxonnx: warning: the prompt was not cached: no permission to write cache/")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("bits", [0o000, 0o400, 0o555])
def test_a_cache_of_models_that_may_not_be_used(place, monkeypatch, fails, bits):
    caches = place / "caches"
    caches.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
    monkeypatch.delenv("FLUXONNX_MODEL", raising=False)
    with mode(caches, bits):
        fails(
            1, rf"no permission to write {caches}\S*: change the folder's permissions, or set XDG_CACHE_HOME", *GENERATE
        )
    assert list(caches.iterdir()) == []


def test_a_file_that_may_not_be_written_is_not_replaced(place):
    path = place / "a.json"
    path.write_text("mine")
    path.chmod(0o444)
    with pytest.raises(FluxonnxError, match="no permission"):
        check_output(path)
    with pytest.raises(PermissionError):
        write_output(path, b"x")
    assert path.read_text() == "mine"


@pytest.mark.parametrize("write", [atomic_write, lambda path: write_output(path, b"x")])
def test_errors_are_about_the_file_that_a_person_knows(place, write: Callable):
    path = place / "out" / "a.png"
    path.parent.mkdir()
    with mode(path.parent, 0o555), pytest.raises(PermissionError) as caught, write(path):
        pass
    assert (caught.value.filename, caught.value.filename2) == (str(path), None)


@pytest.mark.slow
def test_a_copy_of_a_model_that_may_only_be_read(exported, place):
    """Folders and files of the copy can be written, whatever the permissions of the original."""
    paths = [exported, *exported.rglob("*")]
    before = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        export(exported, place / "copy")
    finally:
        for path, bits in before.items():
            path.chmod(bits)
    export(place / "copy", precision="fp32")
    assert set(read_manifest(place / "copy").builds) == {"bf16", "fp32"}
