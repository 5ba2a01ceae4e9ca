"""Errors of the API: a status, one line, and the parameter that is wrong, in the shape that each client reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

from starlette.responses import JSONResponse

from fluxonnx.errors import FluxonnxError, ImageError, UsageError

# A path of two parts or more, or of Windows: only the last part is told.
PATH = re.compile(r"(?<![\w:/.])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\:,;'\"()]+)*[/\\]([^\s/\\:,;'\"()]+)[/\\]?")

# Flags of the command line that a message offers.
FLAGS = re.compile(r" \(--?\w[^()]*\)")

# The types of OpenAI's errors, by status.
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(FluxonnxError):
    """A request that can't be served.

    Attributes:
        status: The HTTP status.
        param: The parameter that is wrong.
        code: A word for programs.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the error."""
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def type(self) -> str:
        """The kind of error, by the words of OpenAI's API."""
        if self.status >= 500:
            return "server_error"
        return TYPES.get(self.status, "invalid_request_error")


def unknown(what: str, name: str) -> ApiError:
    """Return the error about something that does not exist, or belongs to somebody else."""
    return ApiError(404, f"there is no {what} {_short(name)}", code=f"{what}_not_found")


def wrong(message: str, param: str | None = None) -> ApiError:
    """Return the error about a value that can't be used."""
    return ApiError(422, message, param)


def from_ours(error: FluxonnxError, private: Mapping[Path, str], param: str | None = None) -> ApiError:
    """Turn an error of fluxonnx into one of the API, without the places of files.

    Args:
        error: The error.
        private: Folders and what they are called instead.
        param: The parameter that is wrong.
    """
    if isinstance(error, ApiError):
        return error
    status = 422 if isinstance(error, (UsageError, ImageError)) else 500
    return ApiError(status, without_paths(str(error), private), param or _field_of(str(error)))


def without_paths(message: str, private: Mapping[Path, str]) -> str:
    """Return a message without paths of the machine: folders by what they are called, files by their names."""
    for folder, name in sorted(private.items(), key=lambda item: -len(str(item[0]))):
        for form in dict.fromkeys((str(folder.absolute()), str(folder))):
            if len(form) > 1:
                message = message.replace(form, name)
    return PATH.sub(lambda found: found[1], FLAGS.sub("", message))


def _field_of(message: str) -> str | None:
    """Return the field that a message of the table of fields is about: it begins with the name."""
    from fluxonnx.runtime.fields import FIELD

    word = message.split(" ", 1)[0].strip('"')
    return word if word in FIELD else None


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def response(path: str, error: ApiError) -> JSONResponse:
    """Return the answer about an error in the shape that the clients of a path expect."""
    message = str(error)
    if path.startswith("/sdapi/"):
        # raise_exception and HTTPException of modules/api/api.py, AUTOMATIC1111/stable-diffusion-webui
        phrase = HTTPStatus(error.status).phrase
        content: dict = {"error": phrase, "detail": message, "body": "", "errors": message}
        return JSONResponse(content, error.status, headers=error.headers)
    status, headers = error.status, error.headers
    if path.startswith("/v1/"):
        status = 400 if status == 422 else status
        if status in (409, 500):  # their client would try these again, which makes the pictures again
            headers = {**headers, "x-should-retry": "false"}
    fields = {"message": message, "type": error.type, "param": error.param, "code": error.code}
    return JSONResponse({"error": fields}, status, headers=headers)
