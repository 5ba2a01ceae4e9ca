"""Writing files so that nothing half-written ever has a final name."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; it becomes `path` if the block ends well and is removed if not."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def explain(error: OSError, what: object) -> str:
    """Say in one line why writing `what` failed and what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left to write {what}: free some and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write {what}: change the folder's permissions or choose another with -o"
    return f"can't write {what}: {error.strerror or error}"
