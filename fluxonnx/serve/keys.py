"""Who may use the server: keys, sessions of browsers, and links to single pictures."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from fluxonnx.errors import FluxonnxError
from fluxonnx.files import describe_os_error

COOKIE = "fluxonnx_session"
# Seconds for which a browser stays logged in, and a link to a picture works.
SESSION, LINK = 30 * 24 * 60 * 60, 60 * 60
SECRET_BYTES = 32


class Keys:
    """The keys of the API. Without any, everybody is the owner ""."""

    def __init__(self, keys: Sequence[str], secret: Path) -> None:
        """Read or make the secret that sessions and links are signed with.

        Args:
            keys: The keys.
            secret: The file of the secret, which keeps sessions over a new start.

        Raises:
            FluxonnxError: The secret can't be read or written.
        """
        # Digests have one length, so that the time of a comparison tells nothing.
        self._owners = {hashlib.sha256(key.encode()).digest(): owner_of(key) for key in keys}
        self._secret = _secret(secret)

    @property
    def required(self) -> bool:
        """Whether a key is needed."""
        return bool(self._owners)

    def owner(self, key: str) -> str | None:
        """Return whose key it is; None if it is nobody's. All keys are compared, each in constant time."""
        digest, found = hashlib.sha256(key.encode("utf-8", "replace")).digest(), None
        for known, owner in self._owners.items():
            if hmac.compare_digest(known, digest):
                found = owner
        return found

    def from_header(self, authorization: str) -> str | None:
        """Return whose key an Authorization header has: Bearer KEY, or Basic with the key as password."""
        kind, _, value = authorization.partition(" ")
        if kind.lower() == "bearer":
            return self.owner(value.strip())
        if kind.lower() == "basic":
            try:
                text = base64.b64decode(value.strip(), validate=True).decode()
            except (binascii.Error, UnicodeDecodeError):
                return None
            return self.owner(text.partition(":")[2])
        return None

    def session(self, owner: str) -> str:
        """Return the value of a cookie that stands for an owner."""
        return self._signed("session", owner, int(time.time()) + SESSION)

    def from_session(self, cookie: str) -> str | None:
        """Return whose session a cookie is; None if it is none, too old, or of a key that is not valid any more."""
        owner = self._checked("session", cookie)
        return owner if owner in self._owners.values() else None

    def link(self, picture: str) -> str:
        """Return the signature that lets anybody see one picture for a while."""
        return self._signed("picture", picture, int(time.time()) + LINK)

    def opens(self, link: str, picture: str) -> bool:
        """Whether a signature is good for a picture."""
        return self._checked("picture", link) == picture

    def _signed(self, purpose: str, name: str, expires: int) -> str:
        body = f"{name}.{expires}"
        return f"{body}.{self._signature(purpose, body)}"

    def _checked(self, purpose: str, value: str) -> str | None:
        body, _, signature = value.rpartition(".")
        name, _, expires = body.rpartition(".")
        good = hmac.compare_digest(self._signature(purpose, body).encode(), signature.encode("utf-8", "replace"))
        if not good or not expires.isdecimal() or int(expires) < time.time():
            return None
        return name

    def _signature(self, purpose: str, body: str) -> str:
        message = f"{purpose}:{body}".encode("utf-8", "replace")
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()


def owner_of(key: str) -> str:
    """Return the name in the database for the owner of a key, from which the key can't be told."""
    return hashlib.sha256(b"fluxonnx owner " + key.encode()).hexdigest()[:16]


def _secret(path: Path) -> bytes:
    try:
        if path.is_file() and len(known := path.read_bytes()) == SECRET_BYTES:
            return known
        made = secrets.token_bytes(SECRET_BYTES)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - of a descriptor
            file.write(made)
    except OSError as error:
        raise FluxonnxError(describe_os_error(error, path, "choose another with --data")) from None
    return made
