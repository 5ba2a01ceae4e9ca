"""Pictures whose pixels are whole are read, whatever else is damaged or too large; all else ends in one line."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageCms

from fluxonnx.errors import ImageError
from fluxonnx.runtime import metadata
from fluxonnx.runtime.images import load_image
from fluxonnx.runtime.metadata import read_parameters


def halves(left: tuple, right: tuple, mode: str = "RGB", size: tuple[int, int] = (8, 4)) -> Image.Image:
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def with_chunks(image: Image.Image, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with further chunks behind its header."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = buffer.getvalue()
    extra = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return data[:33] + extra + data[33:]


LONG = zlib.compress(bytes(3 << 20))


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"workflow\0\0" + LONG),
        (b"iTXt", b"workflow\0\1\0\0\0" + LONG),
        (b"iTXt", b"workflow\0\1"),
        (b"zTXt", b"workflow\0\7abc"),
        (b"zTXt", b"workflow"),
        (b"iCCP", b"profile\0\0" + LONG),
        (b"iCCP", b"profile\0\7abc"),
        (b"iCCP", b"profile"),
        (b"iCCP", b""),
        (b"eXIf", b"garbage"),
    ],
)
@pytest.mark.parametrize("place", ["before", "behind"])
def test_chunks_that_nothing_needs(tmp_path, chunk, place):
    """Screenshots and pictures of other generators have them; the pixels count."""
    image = halves((255, 0, 0), (0, 0, 255))
    data = with_chunks(image, chunk)
    if place == "behind":
        plain, extra = with_chunks(image), len(chunk[1]) + 12
        data = plain[:-12] + data[33 : 33 + extra] + plain[-12:]
    (tmp_path / "a.png").write_bytes(data)
    assert load_image(tmp_path / "a.png").tobytes() == image.tobytes()
    with pytest.raises(ImageError, match="holds no fluxonnx parameters"):
        read_parameters(tmp_path / "a.png")


def test_many_texts(tmp_path):
    """Pillow bounds their sum."""
    image = halves((255, 0, 0), (0, 0, 255))
    chunks = [(b"zTXt", b"a%d\0\0" % i + zlib.compress(bytes(1 << 20))) for i in range(70)]
    (tmp_path / "a.png").write_bytes(with_chunks(image, *chunks))
    assert load_image(tmp_path / "a.png").tobytes() == image.tobytes()


def test_a_large_profile_still_counts(tmp_path):
    """It is longer than Pillow reads; here because of its end, which nothing refers to."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    picture = halves((200, 100, 50), (20, 30, 200))
    seen = []
    for padding in (0, 2 << 20):
        size = (len(profile) + padding).to_bytes(4, "big")
        chunk = b"p\0\0" + zlib.compress(size + profile[4:] + bytes(padding))
        (tmp_path / "a.png").write_bytes(with_chunks(picture, (b"iCCP", chunk)))
        with metadata.opened(tmp_path / "a.png") as image:
            seen.append(image.info["icc_profile"][4 : len(profile)])
    assert seen[0] == seen[1] == profile[4:]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"garbage", b"Exif\0\0MM\0*\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0"]
)
def test_broken_exif_turns_nothing(tmp_path, format, exif):
    image = halves((255, 0, 0), (0, 0, 255), size=(32, 16))
    path = tmp_path / "a"
    image.save(path, format, exif=exif)
    found = load_image(path)
    assert found.size == (32, 16)
    with pytest.raises(ImageError, match="holds no fluxonnx parameters"):
        read_parameters(path)


def test_damaged_bytes_at_every_place_of_exif(tmp_path):
    """The sizes and places in it are numbers, which Pillow believes."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    buffer = io.BytesIO()
    halves((255, 0, 0), (0, 0, 255), size=(32, 16)).save(buffer, "JPEG", exif=exif)
    data = buffer.getvalue()
    start = data.index(b"Exif\0\0")
    for i in range(start, start + len(exif.tobytes()) - 3):
        for bad in (b"\0\0\0\0", b"\xff\xff\xff\xff"):
            (tmp_path / "a.jpg").write_bytes(data[:i] + bad + data[i + 4 :])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert sorted(load_image(tmp_path / "a.jpg").size) == [16, 32]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_only_regular_files_are_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        for read in (load_image, read_parameters):
            with pytest.raises(ImageError, match="not a regular file"):
                read(path)
    for name in ("a\0b.png", "\ud800.png", "a" * 5000):
        with pytest.raises(ImageError, match=r"no file can have such a name|too long"):
            load_image(tmp_path / name)
