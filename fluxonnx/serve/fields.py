"""The values of a job by their names in the API, from the table of fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fluxonnx.runtime.fields import FIELDS

# The names in the API that differ from the attributes of `Request`.
RENAMED = {"guidance_scale": "guidance"}
# The values of a request that are no pictures, by their names in the API.
VALUES = {RENAMED.get(field.name, field.name): field for field in FIELDS if "request" in field.places}


def values_of(facts: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what the metadata of a picture says, by the names of the API, as far as a job can ask for it again."""
    found = {name: facts[field.name] for name, field in VALUES.items() if field.name in facts}
    return {**found, "seed": facts["seed"]} if "seed" in facts else found
