"""Files of a cache that end with a SHA-256 of themselves, so that a damaged one is not taken for what was written."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fluxonnx.files import atomic_write

# Of a SHA-256.
DIGEST_BYTES = 32


def read_sealed(path: Path, size: int) -> bytes | None:
    """Return the `size` bytes that `write_sealed` wrote; None for anything else that is found there."""
    try:
        # a device or a pipe of this name could be endless
        if not path.is_file() or path.stat().st_size != size + DIGEST_BYTES:
            return None
        content = path.read_bytes()
    except OSError:
        return None
    body, digest = content[:size], content[size:]
    return body if hashlib.sha256(body).digest() == digest else None


def write_sealed(path: Path, body: bytes) -> None:
    """Write a file, which appears only when it is complete.

    Raises:
        OSError: It can't be written.
    """
    with atomic_write(path) as temporary:
        temporary.write_bytes(body + hashlib.sha256(body).digest())
