"""Load a server with many clients at once: nothing is lost, memory stays flat, and how long a picture takes.

    python benchmarks/server.py --clients 50 --pictures 1000

It starts `fluxonnx serve` with the bundled model, and has each client send a job, wait for it by its events, and fetch
the picture; then it looks whether every accepted job was done once, every picture is whole and is the one of its seed,
and how much memory the server takes. Times are those that a client sees, from its request to the bytes of the picture:
with N clients at once, N - 1 other pictures are made in between.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parent.parent
PROMPTS = ("a red circle", "a blue square", "a green triangle")


@dataclass
class Seen:
    """What the clients have seen."""

    seconds: list[float] = field(default_factory=list)
    jobs: set[str] = field(default_factory=set)
    pictures: dict[tuple[str, int], bytes] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def start(model: Path, data: Path) -> tuple[subprocess.Popen[str], int]:
    words = ["serve", "-d", str(model), "--data", str(data), "--port", "0", "--log", "json"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with (data.parent / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fluxonnx", *words], stdout=log, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.match(r"Serving .*:(\d+)/$", line):
            threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
            return process, int(found[1])
    raise SystemExit("the server did not start")


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def one(port: int, number: int, side: int, steps: int) -> tuple[str, bytes]:
    """Have one picture made; returns its job and its bytes."""
    body = {"prompt": PROMPTS[number % len(PROMPTS)], "width": side, "height": side, "steps": steps, "seed": number}
    status, data = ask(port, "POST", "/jobs", body)
    if status != 202:
        raise RuntimeError(f"{status}: {data[:200]!r}")
    job = json.loads(data)["id"]
    ask(port, "GET", f"/jobs/{job}/events")  # it ends with the job
    told = json.loads(ask(port, "GET", f"/jobs/{job}")[1])
    if told["state"] != "done" or len(told["pictures"]) != 1:
        raise RuntimeError(f"{told['state']}: {told['error']}")
    status, picture = ask(port, "GET", told["pictures"][0]["url"])
    if status != 200:
        raise RuntimeError(f"the picture: {status}")
    return job, picture


def client(port: int, numbers: list[int], side: int, steps: int, seen: Seen) -> None:
    while True:
        with seen.lock:
            if not numbers:
                return
            number = numbers.pop()
        begin = time.perf_counter()
        try:
            job, picture = one(port, number, side, steps)
        except Exception as error:
            with seen.lock:
                seen.failures.append(f"{type(error).__name__}: {error}")
            continue
        with seen.lock:
            seen.seconds.append(time.perf_counter() - begin)
            seen.jobs.add(job)
            seen.pictures[PROMPTS[number % len(PROMPTS)], number] = picture


def memory(process: int) -> float:
    """Resident memory of a process in megabytes; 0 where the system does not tell."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return int(found[1]) / 1024 if found else 0.0


def percentile(values: list[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


def load(clients: int, pictures: int, side: int, steps: int, model: Path | None = None) -> dict[str, Any]:
    """Run the load; returns what was found."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if model is None:
            model = place / "tiny-klein"
            shutil.copytree(ROOT / "models/tiny-klein", model, ignore=shutil.ignore_patterns("training"))
        process, port = start(model, place / "data")
        try:
            one(port, 0, side, steps)  # graphs are loaded now
            warm, seen, numbers = memory(process.pid), Seen(), list(range(1, pictures + 1))
            begin = time.perf_counter()
            threads = [threading.Thread(target=client, args=(port, numbers, side, steps, seen)) for _ in range(clients)]
            for thread in threads:
                thread.start()
            most, halfway = warm, 0.0
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.5)
                most = max(most, memory(process.pid))
                if not halfway and len(seen.seconds) >= pictures // 2:
                    halfway = memory(process.pid)
            for thread in threads:
                thread.join()
            took, end = time.perf_counter() - begin, memory(process.pid)
            whole = sum(
                Image.open(io.BytesIO(data)).convert("RGB").size == (side, side) for data in seen.pictures.values()
            )
            listed, before = 0, ""
            while page := json.loads(ask(port, "GET", f"/pictures?limit=500{before}")[1])["pictures"]:
                listed, before = listed + len(page), f"&before={page[-1]['id']}"
            files = len(os.listdir(place / "data/pictures"))  # noqa: PTH208
        finally:
            process.terminate()
            process.wait(timeout=60)
    return {
        "clients": clients,
        "pictures": pictures,
        "whole": whole,
        "jobs": len(seen.jobs),
        "files": files - 1,
        "listed": listed - 1,
        "failures": seen.failures,
        "seconds": took,
        "p50": percentile(seen.seconds, 0.5),
        "p99": percentile(seen.seconds, 0.99),
        "memory at start": warm,
        "memory halfway": halfway,
        "memory at most": most,
        "memory at end": end,
        "exit": process.returncode,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1)
    arguments = parser.parse_args()
    found = load(arguments.clients, arguments.pictures, arguments.side, arguments.steps)
    for name, value in found.items():
        print(f"{name:<16} {value:.2f}" if isinstance(value, float) else f"{name:<16} {value}")


if __name__ == "__main__":
    main()
