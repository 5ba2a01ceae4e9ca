"""Killed at any moment, started again: every accepted job is done exactly once, and every picture is whole.

A server is killed at one of its moments: before a statement of its database, or when it opens, renames or removes a
file of its folder. FLUXONNX_KILLS sets how many of them are tried, one after the other on the same folder.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import sqlite3
from pathlib import Path

import pytest

pytest.importorskip("starlette")

from tests.serving import Server, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="processes are killed otherwise there"),
]

KILLS = int(os.environ.get("FLUXONNX_KILLS", "3"))
# Moments between the start of a server and the end of the jobs below.
MOMENTS = 170

PROGRAM = """
import os, signal, sqlite3, sys

moment, folder, seen = int(os.environ["KILL_AT"]), os.environ["KILL_IN"], 0

def tick(*_):
    global seen
    seen += 1
    if seen == moment:
        os.kill(os.getpid(), signal.SIGKILL)

def watch(event, args):
    if event in ("open", "os.rename", "os.remove") and isinstance(args[0], (str, os.PathLike)):
        if os.fspath(args[0]).startswith(folder):
            tick()

connect = sqlite3.connect

def watched(*args, **named):
    base = connect(*args, **named)
    base.set_trace_callback(tick)
    return base

sqlite3.connect = watched
sys.addaudithook(watch)
from fluxonnx.cli import main
code = main(sys.argv[1:])
print(f"moments: {seen}", file=sys.stderr)
sys.exit(code)
"""
SMALL = {"width": 64, "height": 64, "steps": 1}
JOBS = {
    "one": {**SMALL, "prompt": "a red circle", "seed": 1, "count": 3},
    "two": {**SMALL, "prompt": "a red circle", "seed": 7, "count": 2},
    "three": {**SMALL, "prompt": "a blue square", "seed": 3},
}


def moments(count: int, seed: int) -> list[int]:
    """Moments at which a server is killed, spread over its life, at random within each part."""
    dice = random.Random(seed)
    return [dice.randint(1 + MOMENTS * i // count, MOMENTS * (i + 1) // count) for i in range(count)]


def started(model: Path, data: Path, moment: int) -> Server | None:
    """Start a server that will be killed at a moment; None if that is before it listens."""
    try:
        return Server(model, data, program=PROGRAM, environment={"KILL_AT": str(moment), "KILL_IN": str(data)})
    except AssertionError:
        return None


def submit(server: Server) -> dict[str, str]:
    """Send the jobs, whose names make them the same ones after a new start; returns the ids of those accepted."""
    accepted = {}
    for name, body in JOBS.items():
        try:
            status, _, data = server.request("POST", "/jobs", body, {"Idempotency-Key": name})
        except (OSError, http.client.HTTPException):
            break
        if status in (200, 202):
            accepted[name] = json.loads(data)["id"]
    return accepted


def wait_for(server: Server, accepted: dict[str, str]) -> None:
    """Wait until all jobs are done, or the server is killed."""
    try:
        for job in accepted.values():
            server.finished(job)
    except (OSError, http.client.HTTPException, AssertionError):
        server.process.wait()


@pytest.fixture(scope="module")
def expected(server) -> dict[str, list[bytes]]:
    """The pictures of each job, from a server that nobody kills."""
    found = {}
    for name, body in JOBS.items():
        told = server.finished(server.json("POST", "/jobs", body)["id"])
        found[name] = [server.request("GET", item["url"])[2] for item in told["pictures"]]
    return found


def test_every_accepted_job_is_done_exactly_once(model, tmp_path, expected):
    data, known, killed = tmp_path / "data", {}, 0
    for moment in moments(KILLS, seed=26):
        server = started(model, data, moment)
        if server is None:
            killed += 1
            continue
        accepted = submit(server)
        for name, job in accepted.items():
            assert known.setdefault(name, job) == job  # also the one whose answer was lost
        wait_for(server, accepted)
        if server.process.poll() is None:
            server.stop()
        else:
            killed += 1
    assert killed
    with serving(model, data) as server:
        known |= submit(server)
        for name, job in known.items():
            told = server.finished(job)
            assert told["state"] == "done", told
            assert [server.request("GET", item["url"])[2] for item in told["pictures"]] == expected[name]
        assert len(server.json("GET", "/jobs")["jobs"]) == len(JOBS)
        assert len(server.json("GET", "/pictures")["pictures"]) == sum(map(len, expected.values()))
    # nothing is left over
    names = {f"{job}-{i}.png" for name, job in known.items() for i in range(len(expected[name]))}
    assert {path.name for path in (data / "pictures").iterdir()} == names
    with sqlite3.connect(data / "queue.sqlite3") as base:
        assert base.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_the_moments_cover_the_life_of_a_server(model, tmp_path):
    server = started(model, tmp_path / "data", 0)
    assert server is not None
    wait_for(server, submit(server))
    printed = server.stop()
    count = int(printed.rsplit("moments: ", 1)[1])
    assert count * 0.7 < MOMENTS < count * 1.3, count


def test_a_client_that_waited_is_not_served_after_a_new_start(model, tmp_path):
    """Nobody would fetch its picture: it is cancelled."""
    import socket

    with serving(model, tmp_path) as server:
        body = b'{"prompt": "x", "steps": 900, "size": "64x64"}'
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + body)
            next(told for name, told in server.events("/events") if name == "preview")
            server.kill()
    with serving(model, tmp_path) as server:
        (job,) = server.json("GET", "/jobs")["jobs"]
        assert job["state"] == "cancelled"


def test_an_orderly_end_finishes_the_running_job_and_keeps_the_others(model, tmp_path):
    long = {**SMALL, "prompt": "a red circle", "steps": 12}
    with serving(model, tmp_path) as server:
        first = server.json("POST", "/jobs", long)["id"]
        second = server.json("POST", "/jobs", {**long, "prompt": "a blue square", "steps": 1})["id"]
        next(told for name, told in server.events("/events") if name == "preview")
        server.stop()
        assert server.process.returncode == 0
    with sqlite3.connect(tmp_path / "queue.sqlite3") as base:
        assert dict(base.execute("SELECT id, state FROM jobs")) == {first: "done", second: "queued"}
    with serving(model, tmp_path) as server:
        assert server.finished(second)["state"] == "done"


def test_an_end_that_may_not_wait_puts_the_running_job_back(model, tmp_path):
    with serving(model, tmp_path, "--drain", "0") as server:
        job = server.json("POST", "/jobs", {**SMALL, "prompt": "x", "steps": 400})["id"]
        next(told for name, told in server.events("/events") if name == "preview")
        assert "shutting down" in server.stop()
        assert server.process.returncode == 0
    with sqlite3.connect(tmp_path / "queue.sqlite3") as base:
        assert base.execute("SELECT id, state FROM jobs").fetchall() == [(job, "queued")]


def test_a_second_server_does_not_use_the_same_folder(server, model, data, fails):
    fails(2, f"another server uses {data}", "serve", "-d", model, "--data", data, "--port", "0")
