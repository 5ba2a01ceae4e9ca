"""Killed, or out of space, at any moment: the next run works, and is not wrong.

A run is killed at one of the moments at which it opens, renames, makes or removes a file, or has written a piece of
one. FLUXONNX_KILLS sets how many of these moments are tried in each test.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import fluxonnx
from fluxonnx.api import find_model
from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.cli import main
from fluxonnx.errors import ExportError
from fluxonnx.export import export
from fluxonnx.runtime.metadata import read_parameters
from fluxonnx.runtime.saving import save_image
from tests.support import Case

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="processes are killed otherwise there")]

CASE = Case("odd-heads")
KILLS = int(os.environ.get("FLUXONNX_KILLS", "2"))

RUN = """
import json, os, signal, sys

moment, folder, seen, renamed = int(sys.argv[1]), sys.argv[2], 0, {}

def tick(*_):
    global seen
    seen += 1
    if seen == moment:
        os.kill(os.getpid(), signal.SIGKILL)

def watch(event, args):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        if isinstance(args[0], (str, os.PathLike)) and os.fspath(args[0]).startswith(folder):
            tick()
            if event == "os.rename":
                renamed[os.path.basename(args[1])] = seen

before, _, call = sys.argv[3].rpartition("\\n")
exec(before)  # imports, which don't touch the folder
sys.addaudithook(watch)
exec(call)
print(json.dumps([seen, renamed]))
"""


EXPORT = "import onnx; from fluxonnx.export import export\n"
FIND = "from fluxonnx.api import find_model\n"
SAVE = "from PIL import Image; from fluxonnx.runtime.saving import save_image\n"


def run(moment: int, folder: Path, call: str) -> tuple[int, dict[str, int]] | None:
    """Run a call in a process that is killed at a moment.

    Returns:
        How many moments it had, and at which a file got each name; None if it was killed.
    """
    command = [sys.executable, "-c", RUN, str(moment), str(folder), call]
    result = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=False)
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    return tuple(json.loads(result.stdout)) if result.returncode == 0 else None


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "FLUXONNX_MODEL": ""}


def moments(folder: Path, call: str, *names: str) -> list[int]:
    """Moments of a call, spread over it, and those before a file gets one of these names."""
    whole = run(0, folder, call)
    assert whole is not None
    count, renamed = whole
    # the first moment is 1
    spread = {max(1, count * (2 * i + 1) // (2 * KILLS)) for i in range(KILLS)}
    return sorted(spread | {renamed[name] for name in names})


def picture(root: Path, precision: str) -> bytes:
    with fluxonnx.load(root, precision=precision) as flux:
        return flux.generate("x", 64, 64, steps=1, seed=1).tobytes()


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.rglob(".*") if path.name.endswith((".tmp", ".partial"))]


def test_export_in_place(checkpoints, tmp_path):
    source = checkpoints.get(CASE)
    call = EXPORT + "export(folder, progress=tick)"
    expected = picture(checkpoints.exported(CASE), "bf16")
    for moment in moments(Path(shutil.copytree(source, tmp_path / "whole")), call):
        root = Path(shutil.copytree(source, tmp_path / f"killed-{moment}"))
        assert run(moment, root, call) is None
        assert picture(root, "bf16") == expected, moment
        export(root)
        assert leftovers(root) == []


@pytest.mark.parametrize(("precision", "change"), [("int8", "keep='ff'"), ("int4", "block=64")])
def test_export_with_other_settings(checkpoints, tmp_path, precision, change):
    """The picture is that of the settings in the manifest, never of one's graph and the other's weights."""
    before = Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "before"))
    export(before, precision=precision, block=32 if precision == "int4" else None)
    call = f"{EXPORT}export(folder, precision={precision!r}, {change}, force=True, progress=tick)"
    after = Path(shutil.copytree(before, tmp_path / "after"))
    expected = {}
    tried = moments(after, call, f"transformer.{precision}.onnx")
    for root in (before, after):
        expected[json.dumps(read_manifest(root).builds[precision].settings)] = picture(root, precision)
    assert len(set(expected.values())) == 2
    for moment in tried:
        root = Path(shutil.copytree(before, tmp_path / f"killed-{moment}"))
        assert run(moment, root, call) is None
        found = picture(root, precision)
        assert found == expected[json.dumps(read_manifest(root).builds[precision].settings)], moment


def test_export_of_a_copy(checkpoints, tmp_path):
    source = checkpoints.get(CASE)
    call = f"{EXPORT}export({str(source)!r}, folder, precision='int8', progress=tick)"
    tried = moments(tmp_path / "whole", call)
    expected = picture(tmp_path / "whole", "int8")
    for moment in tried:
        root = tmp_path / f"killed-{moment}"
        assert run(moment, root, call) is None
        export(source, root, precision="int8")
        assert picture(root, "int8") == expected, moment
        assert leftovers(root) == []


def test_first_run(tmp_path):
    call = f"{FIND}find_model()"
    for moment in moments(tmp_path / "whole", call, "tiny-klein"):
        folder = tmp_path / f"killed-{moment}"
        assert run(moment, folder, call) is None
        assert run(0, folder, f"{call}; find_model()") is not None
        (version,) = (folder / "cache/fluxonnx").iterdir()
        assert (version / "tiny-klein/model_index.json").is_file()
        assert leftovers(folder) == []


@pytest.mark.parametrize("numbered", [False, True])
def test_saving_of_a_picture(tmp_path, numbered):
    """The old picture or the new one is there, whole; what was being written is removed by the next save."""
    picture = Image.new("RGB", (8, 8))
    old = save_image(picture, tmp_path / "old.png", {"prompt": "old"})
    call = f"{SAVE}save_image(Image.new('RGB', (8, 8), 'red'), folder + '/a.png', {{'prompt': 'new'}}, {numbered})"
    (tmp_path / "whole").mkdir()
    count, _ = run(0, tmp_path / "whole", call) or (0, {})
    left = 0
    for moment in range(1, count + 1):
        folder = tmp_path / f"killed-{moment}"
        folder.mkdir()
        shutil.copy(old, folder / "a.png")
        assert run(moment, folder, call) is None
        left += len(leftovers(folder))
        assert {read_parameters(path)["prompt"] for path in folder.glob("*.png")} <= {"old", "new"}
        taken = len(list(folder.glob("*.png")))
        save_image(picture, folder / "a.png", {"prompt": "next"}, numbered)
        assert leftovers(folder) == []
        assert len(list(folder.iterdir())) == taken + numbered
    assert left >= 2


def test_a_copy_of_the_demo_model_of_which_files_were_removed(tmp_path, monkeypatch):
    """As a cleaner of caches does with what was not used for weeks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FLUXONNX_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    model = find_model()
    before = sorted(model.rglob("*"))
    shutil.rmtree(model / "tokenizer")
    (model / "model_index.json").unlink()
    assert find_model() == model
    assert sorted(model.rglob("*")) == before
    assert leftovers(tmp_path) == []


def at_once(folder: Path, *calls: str) -> None:
    """Run calls at the same time, all of which must succeed."""
    commands = [[sys.executable, "-c", RUN, "0", str(folder), call] for call in calls]
    running = [
        subprocess.Popen(command, env=environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for command in commands
    ]
    errors = [process.communicate()[1].decode() for process in running]
    assert [process.returncode for process in running] == [0] * len(calls), errors


def test_four_first_runs_at_once(tmp_path):
    at_once(tmp_path, *[f"{FIND}find_model()"] * 4)
    (version,) = (tmp_path / "cache/fluxonnx").iterdir()
    assert [path.name for path in version.iterdir()] == ["tiny-klein"]


def test_exports_at_once(copy_of):
    """Each build is in the manifest, and runs of one that is being made wait for it."""
    root = copy_of(CASE)
    load = "import fluxonnx\nfluxonnx.load(folder).close()"
    at_once(root, load, load, *(f"{EXPORT}export(folder, precision={name!r})" for name in ("int8", "fp16")))
    assert set(read_manifest(root).builds) == {"bf16", "int8", "fp16"}
    assert not list(root.glob(".*"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not possible here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, space: int) -> Path:
    """Leave only so many bytes of a disk; returns the file that takes the others."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - space))
    return filler


@pytest.mark.parametrize("space", [0, 4096, 80_000, 300_000])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_full_disk(checkpoints, small_disk, precision, space):
    root = Path(shutil.copytree(checkpoints.get(CASE), small_disk / "model"))
    filler = fill(small_disk, space)
    with pytest.raises(ExportError, match="space"):
        export(root, precision=precision)
    filler.unlink()
    export(root, precision=precision)
    assert leftovers(root) == []
    assert picture(root, precision)


DRAW = ["generate", "-q", "-p", "x", "-W", "64", "-H", "64", "-s", "1"]


def test_full_disk_of_pictures(checkpoints, small_disk, fails):
    """What was finished is kept, and no picture is half there."""
    root, out = checkpoints.exported(CASE), small_disk / "out"
    out.mkdir()
    command = [*DRAW, "-d", root, "-S", "1", "-o", out / "a.png"]
    assert main([*map(str, command)]) == 0
    size = -(-(out / "a.png").stat().st_size // 4096) * 4096
    before = (out / "a.png").read_bytes()
    filler = fill(small_disk, 2 * size)
    fails(1, rf"no space left to write {out}/a.png: free some and run the same command again", *command, "-n", "3")
    saved = ["a-0001.png", "a-0002.png", "a.png"]
    assert sorted(path.name for path in out.iterdir()) == saved
    assert [read_parameters(out / name)["seed"] for name in saved] == [1, 2, 1]
    fails(1, "no space left", *command)
    assert (out / "a.png").read_bytes() == before
    filler.unlink()
    assert main([*map(str, command), "-n", "1"]) == 0
    assert sorted(path.name for path in out.iterdir()) == saved


def test_full_disk_of_a_cache(checkpoints, small_disk, tmp_path, capsys):
    """The picture is made all the same, once a warning has said that its prompt is not kept."""
    root, cache = checkpoints.exported(CASE), small_disk / "cache"
    cache.mkdir()
    command = [*DRAW[:1], *DRAW[2:], "-d", str(root), "--cache-dir", str(cache), "-o", str(tmp_path / "a.png")]
    filler = fill(small_disk, 4096)
    assert main(command) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fluxonnx:")]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"fluxonnx: warning: the prompt was not cached: no space left to write {cache}")
    assert read_parameters(tmp_path / "a.png")["prompt"] == "x"
    assert {path.suffix for path in cache.iterdir()} <= {".tokens"}  # small enough for what is left
    filler.unlink()
    assert main(command) == 0
    assert {path.suffix for path in cache.iterdir()} == {".npy", ".tokens"}
    assert "warning" not in capsys.readouterr().err


def test_full_disk_of_a_first_run(small_disk, monkeypatch, fails, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk / "caches"))
    monkeypatch.delenv("FLUXONNX_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    for space in (4096, 1_000_000):
        filler = fill(small_disk, space)
        fails(1, rf"no space left to write {small_disk}/caches/.*tiny-klein: free some", *DRAW, "-o", "a.png")
        assert leftovers(small_disk) == []
        filler.unlink()
    assert list(tmp_path.glob("*.png")) == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert main([*DRAW, "-o", "a.png"]) == 0
