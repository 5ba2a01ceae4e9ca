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

import fluxonnx
from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.errors import ExportError
from fluxonnx.export import export
from tests.support import Case

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="processes are killed otherwise there")]

CASE = Case("odd-heads")
KILLS = int(os.environ.get("FLUXONNX_KILLS", "2"))

RUN = """
import json, os, signal, sys
import onnx
from fluxonnx.api import find_model
from fluxonnx.export import export

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

sys.addaudithook(watch)
exec(sys.argv[3])
print(json.dumps([seen, renamed]))
"""


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
    return sorted({count * (2 * i + 1) // (2 * KILLS) for i in range(KILLS)} | {renamed[name] for name in names})


def picture(root: Path, precision: str) -> bytes:
    with fluxonnx.load(root, precision=precision) as flux:
        return flux.generate("x", 64, 64, steps=1, seed=1).tobytes()


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.rglob(".*") if path.name.endswith((".tmp", ".partial"))]


def test_export_in_place(checkpoints, tmp_path):
    source = checkpoints.get(CASE)
    call = "export(folder, progress=tick)"
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
    call = f"export(folder, precision={precision!r}, {change}, force=True, progress=tick)"
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
    call = f"export({str(source)!r}, folder, precision='int8', progress=tick)"
    tried = moments(tmp_path / "whole", call)
    expected = picture(tmp_path / "whole", "int8")
    for moment in tried:
        root = tmp_path / f"killed-{moment}"
        assert run(moment, root, call) is None
        export(source, root, precision="int8")
        assert picture(root, "int8") == expected, moment
        assert leftovers(root) == []


def test_first_run(tmp_path):
    call = "find_model()"
    for moment in moments(tmp_path / "whole", call, "tiny-klein"):
        folder = tmp_path / f"killed-{moment}"
        assert run(moment, folder, call) is None
        assert run(0, folder, f"{call}; {call}") is not None
        (version,) = (folder / "cache/fluxonnx").iterdir()
        assert (version / "tiny-klein/model_index.json").is_file()
        assert leftovers(folder) == []


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
    at_once(tmp_path, *["find_model()"] * 4)
    (version,) = (tmp_path / "cache/fluxonnx").iterdir()
    assert [path.name for path in version.iterdir()] == ["tiny-klein"]


def test_exports_at_once(copy_of):
    """Each build is in the manifest, and runs of one that is being made wait for it."""
    root = copy_of(CASE)
    load = "import fluxonnx; fluxonnx.load(folder).close()"
    at_once(root, load, load, *(f"export(folder, precision={name!r})" for name in ("int8", "fp16")))
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


@pytest.mark.parametrize("space", [0, 4096, 80_000, 300_000])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_full_disk(checkpoints, small_disk, precision, space):
    root = Path(shutil.copytree(checkpoints.get(CASE), small_disk / "model"))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - space))
    with pytest.raises(ExportError, match="space"):
        export(root, precision=precision)
    filler.unlink()
    export(root, precision=precision)
    assert leftovers(root) == []
    assert picture(root, precision)
