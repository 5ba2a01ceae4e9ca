"""What a server is told when it starts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from fluxonnx.errors import UsageError

MEGABYTE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for.

    Attributes:
        body: Bytes of a request.
        pixels: Of a picture that is drawn, width times height.
        upload_pixels: Of a picture that is uploaded; phones make 50 megapixels.
        count: Pictures of one job.
        queue: Jobs that one key may have waiting.
        waiting: Jobs that may wait altogether.
        connections: Open connections.
        header_seconds: How long a client may take to send the head of a request.
        body_seconds: How long it may pause in the middle of a body, or of reading an answer.
    """

    body: int = 64 * MEGABYTE
    pixels: int = 2048 * 2048
    upload_pixels: int = 64_000_000
    count: int = 100
    queue: int = 1000
    waiting: int = 10_000
    connections: int = 1000
    header_seconds: float = 20
    body_seconds: float = 30

    def __post_init__(self) -> None:
        """Validate the limits; raises UsageError."""
        for name, value in vars(self).items():
            if not value > 0:
                raise UsageError(f"the limit {name} is {value}, but must be above 0")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server is told when it starts.

    Attributes:
        models: Model directories; the first one is the default.
        data: The folder of the queue, the gallery and the uploads.
        host: The address to listen at.
        port: 0 for any that is free.
        keys: Keys of the API; without any, everybody who reaches the server may use it.
        precision: See `api.load`; likewise the following.
        provider: The execution provider.
        threads: Threads per operator.
        low_memory: Whether to need less memory and more time.
        lora_dir: The folder whose LoRA files may be used.
        hosts: Names by which the server may be called, besides addresses and localhost.
        origins: Origins of web pages that may use the API.
        limits: What a client may ask for.
        drain: Seconds that a running job gets to finish when the server is asked to end.
    """

    models: tuple[Path, ...]
    data: Path
    host: str = "127.0.0.1"
    port: int = 7860
    keys: tuple[str, ...] = ()
    precision: str | None = None
    provider: str | None = None
    threads: int | None = None
    low_memory: bool = False
    lora_dir: Path | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    drain: float = 30


def default_data() -> Path:
    """Return the folder of a server's data: $XDG_DATA_HOME/fluxonnx, else ~/.local/share/fluxonnx.

    Raises:
        UsageError: There is no home directory.
    """
    if found := os.environ.get("XDG_DATA_HOME"):
        return Path(found) / "fluxonnx"
    try:
        return Path.home() / ".local/share/fluxonnx"
    except RuntimeError:
        raise UsageError("no home directory for the pictures and the queue: pass a folder with --data") from None
