"""A server in a process of its own, and requests to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Server:
    """A running `fluxonnx serve`.

    Attributes:
        process: The process.
        port: Its port.
        lines: What it has printed.
    """

    def __init__(
        self,
        model: Path,
        data: Path,
        *flags: str,
        environment: dict[str, str] | None = None,
        program: str | None = None,
    ) -> None:
        """Start one, and wait until it listens; `program` is Python code that runs the words after it as a command."""
        words = ["serve", "-d", str(model), "--data", str(data), "--log", "json", *flags]
        if "--port" not in flags:
            words += ["--port", "0"]
        start = ["-m", "fluxonnx"] if program is None else ["-c", program]
        self.process = subprocess.Popen(
            [sys.executable, *start, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.lines: list[str] = []
        self.port = 0
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.match(r"Serving .* at http://.*:(\d+)/$", line):
                self.port = int(found[1])
                break
        assert self.port, "".join(self.lines)
        # its log would fill the pipe
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a request; a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers or {})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """Send a request that succeeds; returns the JSON of the answer."""
        status, _, data = self.request(method, path, body, headers)
        assert status < 300, (status, data)
        return json.loads(data) if data else None

    def events(self, path: str, headers: dict[str, str] | None = None) -> Iterator[tuple[str, Any]]:
        """Yield server-sent events until the server ends the stream."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("GET", path, headers=headers or {})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            name, data = "message", []
            for line in answer:
                text = line.decode().rstrip("\r\n")
                if text.startswith("event:"):
                    name = text[6:].strip()
                elif text.startswith("data:"):
                    data.append(text[5:].strip())
                elif not text and data:
                    yield name, json.loads("\n".join(data))
                    name, data = "message", []
        finally:
            connection.close()

    def finished(self, job: str) -> Any:
        """Wait until a job has ended; returns it."""
        for name, told in self.events(f"/jobs/{job}/events"):
            if name == "job" and told["state"] in ("done", "failed", "cancelled"):
                return told
        return self.json("GET", f"/jobs/{job}")

    def draw(self, **wanted: Any) -> Any:
        """Have a job done; returns it."""
        values = {"prompt": "a red circle", "width": 64, "height": 64, "steps": 1, **wanted}
        return self.finished(self.json("POST", "/jobs", values)["id"])

    def kill(self) -> None:
        """End it at once, by SIGKILL."""
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def stop(self) -> str:
        """End it in an orderly way; returns what it has printed."""
        self.process.terminate()
        self.process.wait(timeout=120)
        self._reader.join()
        return "".join(self.lines)


@contextmanager
def serving(model: Path, data: Path, *flags: str, **options: Any) -> Iterator[Server]:
    """A server for the length of a `with` block."""
    server = Server(model, data, *flags, **options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def pictures_of(folder: Path) -> Sequence[Path]:
    """The files of the gallery."""
    return sorted((folder / "pictures").iterdir())
