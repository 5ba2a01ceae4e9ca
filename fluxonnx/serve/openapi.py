"""The description of the API."""

from __future__ import annotations

from typing import Any


def describe_api() -> dict[str, Any]:
    """Return the description of the API by the OpenAPI specification 3.1."""
    return {"openapi": "3.1.0", "info": {"title": "fluxonnx", "version": "1"}, "paths": {}}
