"""The pictures that were made, and those that clients sent: files in the server's own folder, under names of ours."""

from __future__ import annotations

import io
import json
import secrets
import sqlite3
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fluxonnx.checkpoint.reading import parse_json
from fluxonnx.errors import FluxonnxError, ImageError
from fluxonnx.runtime.images import load_image
from fluxonnx.runtime.metadata import embed, opened, read_values
from fluxonnx.serve.database import Database, write_whole
from fluxonnx.serve.errors import ApiError, unknown, wrong
from fluxonnx.serve.fields import values_of
from fluxonnx.serve.infotext import parse_infotext
from fluxonnx.serve.queue import LAST
from fluxonnx.serve.warned import silently

# What pictures are sent as.
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
# The longer side of a thumbnail.
THUMBNAIL = 320
# Uploads are kept for so many seconds.
UPLOADS_KEPT = 7 * 24 * 60 * 60
# What browsers show; others are sent to them as PNG.
SHOWN = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


@dataclass(frozen=True)
class Picture:
    """A picture of the gallery.

    Attributes:
        number: The order in which they were made.
        id: Its name in the API.
        job: The id of the job.
        position: Which of the job's pictures it is.
        owner: Whose it is.
        seed: Its seed.
        width: In pixels.
        height: In pixels.
        parameters: Those of a job that makes it again.
        created: Seconds since 1970.
    """

    number: int
    id: str
    job: str
    position: int
    owner: str
    seed: int
    width: int
    height: int
    parameters: dict[str, Any]
    created: float


@dataclass(frozen=True)
class Upload:
    """A picture that a client sent.

    Attributes:
        id: Its name in the API.
        owner: Whose it is.
        format: Pillow's name of its format.
        width: In pixels.
        height: In pixels.
        parameters: What made it, if its metadata says so.
    """

    id: str
    owner: str
    format: str
    width: int
    height: int
    parameters: dict[str, Any] | None


class Gallery:
    """Pictures and uploads. Threads may share it."""

    def __init__(self, database: Database, most_pixels: int) -> None:
        """Use a database; uploads have at most `most_pixels`."""
        self._base, self._most_pixels = database, most_pixels
        # One at a time: a decoded picture takes hundreds of megabytes.
        self._decoding = threading.Lock()

    def pictures(self, owner: str, limit: int, before: str | None = None) -> list[Picture]:
        """Return the latest pictures of an owner, the newest first.

        Raises:
            ApiError: `before` is no picture.
        """
        last = LAST
        if before:
            rows = self._base.rows("SELECT number FROM pictures WHERE id=? AND owner=?", before, owner)
            if not rows:
                raise unknown("picture", before)
            last = rows[0][0]
        query = "SELECT * FROM pictures WHERE owner=? AND deleted=0 AND number<? ORDER BY number DESC LIMIT ?"
        return [_picture(row) for row in self._base.rows(query, owner, last, limit)]

    def of_jobs(self, jobs: list[str]) -> dict[str, list[Picture]]:
        """Return the pictures of some jobs, by job."""
        found: dict[str, list[Picture]] = {job: [] for job in jobs}
        marks = ",".join("?" * len(jobs))
        query = f"SELECT * FROM pictures WHERE job IN ({marks}) AND deleted=0 ORDER BY position"
        for row in self._base.rows(query, *jobs):
            found[row["job"]].append(_picture(row))
        return found

    def picture(self, identifier: str, owner: str | None) -> Picture:
        """Return a picture; None as the owner for anybody's.

        Raises:
            ApiError: There is none.
        """
        rows = self._base.rows("SELECT * FROM pictures WHERE id=? AND deleted=0", identifier)
        if not rows or owner not in (None, rows[0]["owner"]):
            raise unknown("picture", identifier)
        return _picture(rows[0])

    def picture_file(self, picture: Picture) -> Path:
        """Return where a picture is."""
        return self._base.folder / "pictures" / f"{picture.id}.png"

    def thumbnail(self, picture: Picture) -> Path:
        """Return a small version of a picture, a WebP, made when it is first asked for.

        Raises:
            FluxonnxError: The picture can't be read, or the small one not be written.
        """
        path = self._base.folder / "thumbnails" / f"{picture.id}.webp"
        if not path.is_file():
            image = load_image(self.picture_file(picture))
            image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
            write_whole(path, encoded(image, "WEBP", quality=85), "the thumbnail")
        return path

    def delete(self, identifier: str, owner: str) -> None:
        """Delete a picture; its place in the job stays taken, so that it is not made again.

        Raises:
            ApiError: There is none.
        """
        picture = self.picture(identifier, owner)
        with self._base.changing():
            self._base.change("UPDATE pictures SET deleted=1, parameters='{}' WHERE id=?", picture.id)
        for path in (self.picture_file(picture), self._base.folder / "thumbnails" / f"{picture.id}.webp"):
            with suppress(OSError):
                path.unlink()

    def add_upload(self, owner: str, data: bytes, param: str | None = None) -> Upload:
        """Keep a picture that a client sent, after decoding all of it.

        Raises:
            ApiError: It is no picture, damaged or too large.
        """
        if not data:
            raise ApiError(400, "there is no picture: send the bytes of a PNG, JPEG or WebP file", param)
        identifier = f"u{secrets.token_hex(8)}"
        path = self._base.folder / "uploads" / identifier
        write_whole(path, data, "the upload")
        try:
            upload = self._examined(path, identifier, owner, param)
        except BaseException:
            with suppress(OSError):
                path.unlink()
            raise
        with self._base.changing():
            self._base.change(
                "INSERT INTO uploads (id, owner, format, width, height, parameters, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                *(upload.id, owner, upload.format, upload.width, upload.height),
                json.dumps(upload.parameters),
                time.time(),
            )
        return upload

    def _examined(self, path: Path, identifier: str, owner: str, param: str | None) -> Upload:
        with self._decoding, silently():
            try:
                with opened(path) as image:
                    format, size = image.format or "", image.size
                    text = image.info.get("parameters")
                if size[0] * size[1] > self._most_pixels:
                    raise wrong(f"the picture has {size[0]}x{size[1]} pixels, more than {self._most_pixels}", param)
                width, height = load_image(path).size
            except ImageError as error:
                message = str(error).replace(str(path), "the picture").replace("file or ", "")
                raise ApiError(422, message, param) from None
            try:
                parameters: dict[str, Any] | None = values_of(read_values(path))
            except FluxonnxError:
                parameters = parse_infotext(text) if isinstance(text, str) else None
        return Upload(identifier, owner, format, width, height, parameters)

    def upload(self, identifier: str, owner: str) -> Upload:
        """Return what is known of an upload.

        Raises:
            ApiError: There is none.
        """
        rows = self._base.rows("SELECT * FROM uploads WHERE id=? AND owner=?", identifier, owner)
        if not rows:
            raise unknown("upload", identifier)
        values = {name: rows[0][name] for name in ("id", "owner", "format", "width", "height")}
        return Upload(**values, parameters=json.loads(rows[0]["parameters"] or "null"))

    def upload_file(self, upload: Upload) -> Path:
        """Return where an upload is."""
        return self._base.folder / "uploads" / upload.id

    def shown(self, upload: Upload) -> tuple[bytes, str]:
        """Return the bytes of an upload and their media type, in a format that browsers show.

        Raises:
            ImageError: It can't be read.
        """
        path = self.upload_file(upload)
        if upload.format in SHOWN:
            return path.read_bytes(), SHOWN[upload.format]
        with self._decoding:
            return encoded(load_image(path), "PNG"), "image/png"

    def find(self, identifier: str, owner: str, param: str) -> Path:
        """Return the file of an upload or of a picture.

        Raises:
            ApiError: There is none.
        """
        try:
            if identifier.startswith("u"):
                path = self.upload_file(self.upload(identifier, owner))
            else:
                path = self.picture_file(self.picture(identifier, owner))
        except ApiError as error:
            raise wrong(f"{error}: give the id of an upload or of a picture", param) from None
        if not path.is_file():
            raise wrong(f"{identifier} is gone: upload it again", param)
        return path

    def remove_strays(self) -> None:
        """Remove files that a killed server wrote but did not enter; those that are still wanted are made again."""
        pictures = {row[0] for row in self._base.rows("SELECT id FROM pictures WHERE deleted=0")}
        uploads = {row[0] for row in self._base.rows("SELECT id FROM uploads")}
        for folder, known in (("pictures", pictures), ("thumbnails", pictures), ("uploads", uploads)):
            for path in (self._base.folder / folder).iterdir():
                if path.stem not in known:
                    with suppress(OSError):
                        path.unlink()

    def forget_uploads(self, used: set[str]) -> None:
        """Remove uploads that are old and that no job waits for."""
        rows = self._base.rows("SELECT id FROM uploads WHERE created<?", time.time() - UPLOADS_KEPT)
        for identifier in {row[0] for row in rows} - used:
            with self._base.changing():
                self._base.change("DELETE FROM uploads WHERE id=?", identifier)
            with suppress(OSError):
                (self._base.folder / "uploads" / identifier).unlink()


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """Return a picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def in_format(path: Path, format: str, quality: int = 95) -> bytes:
    """Return a picture of the gallery in another format, with what made it in its metadata.

    Args:
        path: Its PNG file.
        format: "png", "jpeg" or "webp".
        quality: From 0 to 100.

    Raises:
        ApiError: There is no such format, or the picture is gone.
    """
    if format not in FORMATS:
        raise wrong(f"format must be one of {', '.join(FORMATS)}", "format")
    if not path.is_file():
        raise unknown("picture", path.stem)
    if format == "png":
        return path.read_bytes()
    with opened(path) as image:
        text = image.info.get("fluxonnx")
    facts = embed(FORMATS[format], _parsed(text)) if isinstance(text, str) else {}
    return encoded(load_image(path), FORMATS[format], quality=quality, **facts)


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _picture(row: sqlite3.Row) -> Picture:
    values = {name: row[name] for name in row.keys() if name != "deleted"}  # noqa: SIM118 - a row has no items
    return Picture(**{**values, "seed": int(row["seed"]), "parameters": json.loads(row["parameters"])})
