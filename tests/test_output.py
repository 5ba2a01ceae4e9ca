"""What is written, when, and what survives: broken streams, signals, parallel runs, links, devices, long names."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from fluxonnx.cli import main
from fluxonnx.cli.messages import LONGEST, complain, escaped
from fluxonnx.cli.progress import Progress
from fluxonnx.errors import ImageError, UsageError
from fluxonnx.files import temporary_file
from fluxonnx.runtime.metadata import read_parameters
from fluxonnx.runtime.outputs import TEMPORARY, check_output
from fluxonnx.runtime.saving import check_output_path, save_image
from tests.support import Case

posix_only = pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX, its signals or its special files")
RED = Image.new("RGB", (8, 8), "red")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def model(checkpoints) -> str:
    return str(checkpoints.exported(Case("odd-heads")))


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "FLUXONNX": f"{sys.executable} -m fluxonnx"}


def whole(folder: Path) -> list[str]:
    """The names of the pictures of a folder, all of which can be read; there is nothing else."""
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        read_parameters(folder / name)
        with Image.open(folder / name) as image:
            image.load()
    return names


# Messages


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize(
    ("streams", "many"),
    [
        *((streams, False) for streams in ("2>&-", ">&- 2>&- <&-", "2>/dev/full")),
        *((streams, True) for streams in ("2>&1 | head -1", ">/dev/full 2>&1")),
    ],
)
def test_messages_never_decide_whether_a_picture_is_saved(model, environment, tmp_path, streams, many):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    (tmp_path / "out").mkdir()
    what = "--prompt-file prompts.txt" if many else "-p a"
    command = f"set -o pipefail; $FLUXONNX generate -v -d {model} {what} -W 64 -H 64 -s 1 -o out/a.png {streams}"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=False)
    assert result.returncode == 0
    assert whole(tmp_path / "out") == ([f"a-000{i}.png" for i in (1, 2, 3)] if many else ["a.png"])


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize(
    ("streams", "code", "message"),
    [
        ("| true", 0, ""),
        (">/dev/full", 1, "fluxonnx: the result can't be printed: No space left on device\n"),
        (">&-", 1, "fluxonnx: the result can't be printed: standard output is closed\n"),
    ],
)
def test_result_that_can_not_be_printed(environment, tmp_path, streams, code, message):
    save_image(RED, tmp_path / "a.png", {"prompt": "x" * 1_000_000})
    command = f"set -o pipefail; $FLUXONNX info a.png {streams}"
    result = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (code, message)


@posix_only
@pytest.mark.slow
def test_help_into_a_closed_pipe(environment, tmp_path):
    command = "set -o pipefail; $FLUXONNX generate --help | true"
    result = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_info_on_any_encoding_is_json(environment, tmp_path, encoding):
    known = {"prompt": "a ☂ 🐕 \x9b\u202e\ud800 b"}
    save_image(RED, tmp_path / "a.png", known)
    result = subprocess.run(
        [sys.executable, "-m", "fluxonnx", "info", "a.png"],
        cwd=tmp_path,
        env={**environment, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert json.loads(result.stdout.decode(encoding)) == known
    assert not {0x9B, 0x1B} & set(result.stdout)


class Broken:
    """A terminal that went away."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


def test_a_progress_bar_on_a_broken_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr", Broken())
    with Progress() as bar:
        for i in range(4):
            bar.bytes("x", i, 4)
    monkeypatch.setattr("sys.stderr", None)
    with Progress() as bar:
        bar.bytes("x", 1, 4)


def test_a_message_is_one_line_of_bounded_length(capsys):
    complain("\x1b[31ma\nb\r\x9b\u202e\ud800" + "x" * 2_600_000 + "END")
    line = capsys.readouterr().err
    assert line.startswith(r"fluxonnx: \x1b[31ma\nb\r\x9b\u202e\ud800x")
    assert line.endswith("xEND\n")
    assert len(line) < LONGEST + 200
    assert escaped("猫 é ☂") == "猫 é ☂"


@pytest.mark.slow
def test_a_warning_about_a_long_prompt_is_short(model, tmp_path, capsys):
    arguments = ["-W", "64", "-H", "64", "-s", "1", "-o", str(tmp_path / "a.png")]
    assert main(["generate", "-d", model, "-p", "a cat " * 100_000, *arguments]) == 0
    assert len(capsys.readouterr().err) < 2 * LONGEST


@pytest.mark.slow
def test_seconds_of_an_export_are_printed_on_request(model, capsys):
    assert main(["export", "-v", "-d", model]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines[:2]] == ["open checkpoint", "export"]
    assert main(["export", "-d", model]) == 0
    assert capsys.readouterr().err.splitlines() == lines[2:]


# Signals


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_keeps_what_is_done_and_leaves_nothing_else(model, environment, tmp_path, number, code):
    """The signal comes while the third of 1000 pictures is made."""
    words = ["generate", "-d", model, "-p", "a", "-W", "64", "-H", "64", "-s", "1", "-n", "1000", "-o", "cat.png"]
    # On one core several small pictures would be made at a time.
    words += ["--threads", "2"]
    # Tests may run under nohup or in the background, where signals are ignored.
    heed = f"signal.signal(signal.{number}, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-c", f"import os, signal, sys; {heed}", sys.executable, "-m", "fluxonnx", *words]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        announced = 0
        for line in process.stderr:
            announced += line.startswith("cat-")
            if announced == 2:
                process.send_signal(getattr(signal, number))
                break
        rest = process.stderr.read().splitlines()
    assert process.returncode == code
    assert rest[-1] == f"fluxonnx: {'interrupted' if number == 'SIGINT' else f'ended by {number}'}"
    # a picture may be saved, but not yet announced, when the signal comes
    saved = whole(tmp_path)
    assert 0 <= len(saved) - announced - sum(line.startswith("cat-") for line in rest) <= 1
    assert saved == [f"cat-{i:04}.png" for i in range(1, len(saved) + 1)]


@posix_only
@pytest.mark.slow
def test_a_signal_that_is_ignored_stays_so(environment, tmp_path, model):
    """As under nohup."""
    command = f"trap '' HUP; $FLUXONNX generate -d {model} -p a -W 64 -H 64 -s 1 -n 3 -o cat.png"
    with subprocess.Popen(
        ["bash", "-c", f"{command} & wait"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        process.stderr.readline()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGHUP)
        process.stderr.read()
    assert process.returncode == 0
    assert len(whole(tmp_path)) == 3


# Leftovers


@posix_only
def test_what_is_being_written_stays_and_what_nobody_writes_goes(tmp_path):
    """Also if the writer is a process in another container, of which only its lock is known."""
    dead, other = tmp_path / ".fluxonnx-0123.tmp", tmp_path / ".fluxonnx-notes.txt"
    dead.touch()
    other.touch()
    with temporary_file(tmp_path / "cat.png", TEMPORARY) as alive:
        save_image(RED, tmp_path / "a.png")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, other.name, "a.png"])


# Names


def test_numbered_names_are_never_written_twice(tmp_path):
    """Threads that save at once, as processes do: each gets a name of its own."""
    (tmp_path / "cat-0003.png").write_text("mine")
    gate = threading.Barrier(8)

    def save(i: int) -> None:
        gate.wait()
        for _ in range(4):
            save_image(RED, tmp_path / "cat.png", {"prompt": str(i)}, numbered=True)

    threads = [threading.Thread(target=save, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "cat-0003.png").read_text() == "mine"
    (tmp_path / "cat-0003.png").unlink()
    names = whole(tmp_path)
    assert names == [f"cat-{i:04}.png" for i in range(1, 34) if i != 3]
    found = sorted(read_parameters(tmp_path / name)["prompt"] for name in names)
    assert found == sorted(str(i) for i in range(8) for _ in range(4))


def test_numbered_names_on_a_file_system_without_links(tmp_path, monkeypatch):
    def link(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    for i in (1, 2):
        assert save_image(RED, tmp_path / "a.png", {"prompt": "a"}, numbered=True) == tmp_path / f"a-000{i}.png"
    assert whole(tmp_path) == ["a-0001.png", "a-0002.png"]


@posix_only
@pytest.mark.slow
def test_parallel_runs_overwrite_nothing(model, environment, tmp_path):
    command = [sys.executable, "-m", "fluxonnx", "generate", "-q", "-d", model, "-p", "a", "-W", "64", "-H", "64"]
    command += ["-s", "1", "-n", "2", "-o", "cat.png"]
    runs = [subprocess.Popen(command, cwd=tmp_path, env=environment) for _ in range(4)]
    assert [run.wait() for run in runs] == [0] * 4
    assert len(whole(tmp_path)) == 8


@posix_only
def test_names_as_long_as_the_system_allows(tmp_path):
    for stem in ("a" * 251, "猫" * 83 + "aa"):
        path = tmp_path / f"{stem}.png"
        save_image(RED, path, {"prompt": "a"})
        assert path.is_file()
        with pytest.raises(UsageError, match="too long: it has 260 bytes, and 255 are possible"):
            check_output_path(path, numbered=True)
        with pytest.raises(UsageError, match="is too long"):
            check_output_path(tmp_path / f"{stem}a.png")
    longest = tmp_path / f"{'猫' * 82}.png"
    assert save_image(RED, longest, numbered=True).name == f"{'猫' * 82}-0001.png"


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png"])
def test_names_that_are_none(tmp_path, name):
    with pytest.raises(UsageError, match="can't be the name of a file"):
        check_output_path(tmp_path / name)


def test_two_lines_of_a_prompt_file_never_write_one_file(model, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"prompt": "a", "output": "x.png"}\n{"prompt": "b", "output": "./x.png"}')
    fails(2, "prompt 2 of in.jsonl: x.png would overwrite that of prompt 1", "generate", "-q", "-d", model,
          "--prompt-file", "in.jsonl")  # fmt: skip
    assert [path.name for path in Path().iterdir()] == ["in.jsonl"]


# What is at the target


@posix_only
def test_a_link_stays_a_link_and_a_file_keeps_its_permissions(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    target, link = folder / "real.png", tmp_path / "a.png"
    link.symlink_to("disk/real.png")
    save_image(RED, link)  # a link to nothing yet
    target.chmod(0o640)
    before = target.read_bytes()
    save_image(RED, link, {"prompt": "a"})
    assert link.is_symlink()
    assert target.read_bytes() != before
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert [path.name for path in folder.iterdir()] == ["real.png"]
    link.unlink()
    link.symlink_to("no/such/real.png")
    with pytest.raises(UsageError, match="does not exist: create it"):
        check_output_path(link)
    link.unlink()
    link.symlink_to("a.png")
    with pytest.raises(ImageError, match=r"can't write .*symbolic links"):
        check_output_path(link)


@posix_only
def test_devices_and_pipes_are_written_through(tmp_path):
    null, pipe = tmp_path / "null.png", tmp_path / "pipe.png"
    null.symlink_to("/dev/null")
    os.mkfifo(pipe)
    read: list[bytes] = []
    thread = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    thread.start()
    for path in (null, pipe):
        save_image(RED, path)
    thread.join()
    assert read[0].startswith(b"\x89PNG")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert null.is_symlink()


@posix_only
def test_sockets_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a.png")
        with pytest.raises(UsageError, match=r"a\.png is a socket: choose a file name for --json"):
            check_output(Path("a.png"), "--json")
    with pytest.raises(UsageError, match="is a folder: choose a file name for -o"):
        check_output(tmp_path)


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize("redirected", [True, False])
def test_figures_go_to_standard_output(environment, tmp_path, redirected):
    """Behind what was printed before, whether that is a file or a pipe."""
    code = "from pathlib import Path; from fluxonnx.runtime.outputs import write_output as w; print(1, flush=True); "
    code += "w(Path('/dev/stdout'), b'2\\n'); print(3)"
    command = f'{sys.executable} -c "{code}" {"> a.txt; cat a.txt" if redirected else "| cat"}'
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert result.stdout == b"1\n2\n3\n"
