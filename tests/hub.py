"""A small server in the shape of the Hugging Face hub, on the loopback: one repository of a folder's files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has and what it was asked for.

    Attributes:
        repository: Its owner and name.
        folder: Its files.
        token: What a client has to say, if the repository is gated.
        card: The metadata of its README.
        cut: After how many bytes an answer with a file's content ends, once per file.
        status: What it answers to everything, if not what it is asked for.
        url: Its address.
        claimed: Sizes that it says files have, if those are not theirs.
        served: The files whose content was asked for, each with the first byte of the range.
    """

    repository: str
    folder: Path
    token: str | None = None
    card: dict = field(default_factory=lambda: {"license": "apache-2.0"})
    cut: int | None = None
    status: int | None = None
    url: str = ""
    claimed: dict[str, int] = field(default_factory=dict)
    served: list[tuple[str, int]] = field(default_factory=list)

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does, as far as its client asks."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keep standard error for the client."""

    def do_HEAD(self) -> None:
        self.answer(content=False)

    def do_GET(self) -> None:
        self.answer(content=True)

    def answer(self, content: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        if hub.status is not None:
            return self.refuse(hub.status)
        name = hub.repository
        if path.startswith(f"/api/models/{name}"):
            rest = path.removeprefix(f"/api/models/{name}")
            revision = rest.removeprefix("/revision/").removeprefix("/tree/").partition("/")[0]
            if rest and revision not in ("main", "v1", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            return self.send_json(self.tree() if rest.startswith("/tree/") else self.info())
        if path.startswith(f"/{name}/resolve/"):
            revision, _, file = path.removeprefix(f"/{name}/resolve/").partition("/")
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.refuse(401, "GatedRepo")
            if not (hub.folder / file).is_file():
                return self.refuse(404, "EntryNotFound")
            return self.send_file(hub.folder / file, file, content)
        return self.refuse(401 if path.startswith("/api/models/") else 404, "RepoNotFound")

    def info(self) -> dict:
        siblings = [
            {"rfilename": path.relative_to(self.hub.folder).as_posix(), "size": self.size(path)}
            for path in self.hub.files()
        ]
        known = {"id": self.hub.repository, "modelId": self.hub.repository, "sha": COMMIT, "private": False}
        return {**known, "gated": bool(self.hub.token), "cardData": self.hub.card, "siblings": siblings}

    def size(self, path: Path) -> int:
        return self.hub.claimed.get(path.name, path.stat().st_size)

    def tree(self) -> list[dict]:
        return [
            {
                "type": "file",
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                "size": self.size(path),
                "path": path.relative_to(self.hub.folder).as_posix(),
            }
            for path in self.hub.files()
        ]

    def send_json(self, value: object) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def send_file(self, path: Path, name: str, content: bool) -> None:
        data = path.read_bytes()
        given = self.headers.get("Range", "")
        start = int(given.removeprefix("bytes=").partition("-")[0]) if given else 0
        self.send_response(206 if given else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if given:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(self.size(path) - start))
        self.end_headers()
        if not content:
            return
        cut = self.hub.cut if all(name != served for served, _ in self.hub.served) else None
        self.hub.served.append((name, start))
        self.wfile.write(data[start:] if cut is None else data[start : start + cut])
        if cut is not None and start + cut < len(data):
            self.close_connection = True

    def refuse(self, status: int, code: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Let the server run for as long as the block lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
