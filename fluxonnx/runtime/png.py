"""PNG chunks that Pillow refuses a whole picture for, though nothing needs them."""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import BinaryIO

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXT = (b"tEXt", b"zTXt", b"iTXt")
PROFILE = b"iCCP"
# Far beyond any profile; it bounds the memory that a few compressed bytes can take.
MAX_PROFILE_BYTES = 64 << 20


def readable(file: BinaryIO) -> tuple[BinaryIO, bytes | None]:
    """Return a file that Pillow opens: itself, or a copy without the texts and the profile that are too large for it.

    Screenshots have large profiles, and pictures of other generators texts of megabytes.

    Returns:
        The file, at its start, and the colour profile if it was left out but can be used.
    """
    kept, profile, text_bytes = [SIGNATURE], None, 0
    whole = file.read(len(SIGNATURE)) == SIGNATURE
    position, size = len(SIGNATURE), os.fstat(file.fileno()).st_size
    spans: list[tuple[int, int]] = []
    while whole and position + 12 <= size:
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        end = position + 12 + length
        spans.append((position, end))
        if end <= size and kind == PROFILE:
            rest = file.read(length).partition(b"\0")[2]
            known = rest[:1] == b"\0"  # the method of compression
            if not known or _inflated(rest[1:], PngImagePlugin.MAX_TEXT_CHUNK) is None:
                spans.pop()
                profile = _inflated(rest[1:], MAX_PROFILE_BYTES) if known else None
        elif end <= size and kind in TEXT:
            count = _text_bytes(kind, file.read(length))
            if count is None or text_bytes + count > PngImagePlugin.MAX_TEXT_MEMORY:
                spans.pop()
            else:
                text_bytes += count
        position = end
        if kind == b"IEND":
            break
    file.seek(0)
    if not whole or sum(end - start for start, end in spans) == position - len(SIGNATURE):
        return file, None
    for start, end in spans:
        file.seek(start)
        kept.append(file.read(end - start))
    return io.BytesIO(b"".join(kept)), profile


def _text_bytes(kind: bytes, chunk: bytes) -> int | None:
    """Return the length of a chunk's text; None if Pillow would refuse it."""
    text = chunk.partition(b"\0")[2]
    compressed = kind == b"zTXt"
    if kind == b"iTXt":
        is_compressed, method = text[:1], text[1:2]
        text = text[2:].split(b"\0", 2)[-1]
        compressed = is_compressed not in (b"", b"\0") and method == b"\0"
    elif compressed:
        if text[:1] not in (b"", b"\0"):
            return None
        text = text[1:]
    if not compressed:
        return len(text)
    inflated = _inflated(text, PngImagePlugin.MAX_TEXT_CHUNK)
    return None if inflated is None else len(inflated)


def _inflated(data: bytes, limit: int) -> bytes | None:
    """Return decompressed data, nothing of damaged ones; None if they have more than `limit` bytes."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(data, limit)
    except zlib.error:
        return b""
    return None if stream.unconsumed_tail else content
