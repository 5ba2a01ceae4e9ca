"""The description of the API, by the OpenAPI specification 3.1; values of jobs come from the table of fields."""

from __future__ import annotations

from functools import cache
from typing import Any

from fluxonnx.runtime.adapters import MOST_SCALE
from fluxonnx.runtime.field import Field
from fluxonnx.runtime.fields import FIELD, MAX_REFERENCES
from fluxonnx.serve.fields import VALUES
from fluxonnx.serve.parameters import MOST_LORAS, UNIT
from fluxonnx.serve.queue import CANCELLED, DONE, FAILED, QUEUED, RUNNING
from fluxonnx.version import __version__

Schema = dict[str, Any]
TYPES: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}
MOST_LISTED = 500
# Addresses that need no key.
OPEN = ("/health", "/ready", "/info", "/session", "/openapi.json")


def field_schema(field: Field) -> Schema:
    """Return the schema of a value of a job."""
    one: Schema = {"type": TYPES[field.kind]}
    if field.choices:
        one["enum"] = list(field.choices)
    for name, value in (("minimum", field.low), ("maximum", field.high), ("exclusiveMinimum", field.above)):
        if value is not None:
            one[name] = value
    multiple = UNIT if field.whole_tokens else field.multiple
    if multiple:
        one["multipleOf"] = multiple
    found: Schema = {"type": "array", "items": one} if field.many else one
    if field.name == "expand":
        found |= {"minItems": 4, "maxItems": 4}
    if field.help:
        found["description"] = field.help.format_map(vars(field))
    return found


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: str = "", **properties: Schema) -> Schema:
    return {"type": "object", "required": required.split(), "properties": properties}


def _list_of(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


TEXT, WHOLE, NUMBER, TRUTH = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))
MAYBE_TEXT, MAYBE_NUMBER = {"type": ["string", "null"]}, {"type": ["number", "null"]}


def _job_request() -> Schema:
    properties = {name: field_schema(field) for name, field in VALUES.items()}
    properties["prompt"] |= {"minLength": 1}
    picture = {"type": "string", "description": "the id of an upload or of a picture"}
    lora = _object("name", name=TEXT, scale={"type": "number", "minimum": -MOST_SCALE, "maximum": MOST_SCALE})
    properties |= {
        "input": picture,
        "references": {**_list_of(picture), "maxItems": MAX_REFERENCES},
        "mask": picture,
        "lora": {**_list_of({**lora, "additionalProperties": False}), "maxItems": MOST_LORAS},
        "model": TEXT,
        "precision": TEXT,
        "count": {"type": "integer", "minimum": 1, "maximum": int(FIELD["count"].high or 1)},
        "seed": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
    }
    return {**_object("prompt", **properties), "additionalProperties": False}


def _schemas() -> dict[str, Schema]:
    brief = {"id": TEXT, "job": TEXT, "seed": WHOLE, "width": WHOLE, "height": WHOLE, "url": TEXT}
    brief |= {"thumbnail_url": TEXT, "created": NUMBER}
    names = " ".join(brief)
    error = _object("message type param code", message=TEXT, type=TEXT, param=MAYBE_TEXT, code=MAYBE_TEXT)
    progress = _object(
        "phase step steps pictures count", phase=TEXT, step=WHOLE, steps=WHOLE, pictures=WHOLE, count=WHOLE
    )
    return {
        "Error": _object("error", error=error),
        "JobRequest": _job_request(),
        "Brief": _object(names, **brief),
        "Picture": _object(f"{names} parameters", **brief, parameters={"type": "object"}),
        "Job": _object(
            "id state position progress parameters pictures warnings error created started finished",
            id=TEXT,
            state={"type": "string", "enum": [QUEUED, RUNNING, DONE, FAILED, CANCELLED]},
            position={"type": ["integer", "null"]},
            progress=progress,
            parameters={"type": "object"},
            pictures=_list_of(_ref("Brief")),
            warnings=_list_of(TEXT),
            error=MAYBE_TEXT,
            created=NUMBER,
            started=MAYBE_NUMBER,
            finished=MAYBE_NUMBER,
        ),
        "Upload": _object(
            "id width height url parameters",
            id=TEXT,
            width=WHOLE,
            height=WHOLE,
            url=TEXT,
            parameters={"type": ["object", "null"]},
        ),
        "Images": _object(
            "created data",
            created=WHOLE,
            data=_list_of(_object(b64_json=TEXT, url=TEXT)),
            output_format=TEXT,
            size=TEXT,
        ),
        "Model": _object("id object", id=TEXT, object=TEXT, created=WHOLE, owned_by=TEXT),
        "OtherError": _object("detail", detail=TEXT, error=TEXT),
    }


def _json(schema: Schema, description: str = "as asked") -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _file(*types: str) -> Schema:
    return {
        "description": "a file",
        "content": {name: {"schema": {"type": "string", "format": "binary"}} for name in types},
    }


NOTHING = {"description": "done"}
STREAM = {"description": "server-sent events", "content": {"text/event-stream": {"schema": TEXT}}}
IDENTIFIER = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
BEFORE = {"name": "before", "in": "query", "schema": TEXT, "description": "the id of the last one that is known"}
LIMIT = {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": MOST_LISTED}}
FORMAT = {"name": "format", "in": "query", "schema": {"type": "string", "enum": ["png", "jpeg", "webp"]}}
NAMED = {"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "minLength": 1, "maxLength": 200}}


def _body(schema: Schema, kind: str = "application/json") -> Schema:
    return {"required": True, "content": {kind: {"schema": schema}}}


def _operation(
    summary: str,
    answers: dict[int, Schema],
    *,
    parameters: list[Schema] | None = None,
    body: Schema | None = None,
    error: str = "Error",
) -> Schema:
    codes = [400, 401, 403, 404, 408, 409, 413, 422, 429, 500, 503]
    errors = {str(code): _json(_ref(error), "an error") for code in codes if code not in answers}
    found: Schema = {
        "summary": summary,
        "responses": {**{str(code): answer for code, answer in answers.items()}, **errors},
    }
    if parameters:
        found["parameters"] = parameters
    if body:
        found["requestBody"] = body
    return found


def _jobs() -> dict[str, Schema]:
    job, listed = _json(_ref("Job")), [LIMIT, BEFORE]
    upload = {"required": True, "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}
    pictures = _json(_object("pictures", pictures=_list_of(_ref("Picture"))))
    image = _file("image/png", "image/jpeg", "image/webp", "image/gif")
    return {
        "/jobs": {
            "get": _operation(
                "List jobs", {200: _json(_object("jobs", jobs=_list_of(_ref("Job"))))}, parameters=listed
            ),
            "post": _operation("Add a job", {202: job, 200: job}, parameters=[NAMED], body=_body(_ref("JobRequest"))),
        },
        "/jobs/{id}": {
            "get": _operation("Show a job", {200: job}, parameters=[IDENTIFIER]),
            "delete": _operation("Cancel a job", {200: job}, parameters=[IDENTIFIER]),
        },
        "/jobs/{id}/preview": {
            "get": _operation("The latest preview", {200: _file("image/jpeg")}, parameters=[IDENTIFIER])
        },
        "/jobs/{id}/events": {"get": _operation("News of a job", {200: STREAM}, parameters=[IDENTIFIER])},
        "/events": {"get": _operation("News of all jobs", {200: STREAM})},
        "/pictures": {"get": _operation("List pictures", {200: pictures}, parameters=listed)},
        "/pictures/{id}": {
            "get": _operation("A picture", {200: image}, parameters=[IDENTIFIER, FORMAT]),
            "delete": _operation("Delete a picture", {204: NOTHING}, parameters=[IDENTIFIER]),
        },
        "/pictures/{id}/thumbnail": {
            "get": _operation("A small version", {200: _file("image/webp")}, parameters=[IDENTIFIER])
        },
        "/uploads": {"post": _operation("Send a picture", {201: _json(_ref("Upload"))}, body=upload)},
        "/uploads/{id}": {"get": _operation("A picture that was sent", {200: image}, parameters=[IDENTIFIER])},
    }


def _system() -> dict[str, Schema]:
    status = _json(_object("status", status=TEXT))
    told = _json(_object("name version auth_required", name=TEXT, version=TEXT, auth_required=TRUTH))
    key = _body(_object("key", key=TEXT))
    prometheus = {"description": "metrics", "content": {"text/plain": {"schema": TEXT}}}
    return {
        "/info": {"get": _operation("What the server can do", {200: told})},
        "/health": {"get": _operation("Whether the process answers", {200: status})},
        "/ready": {"get": _operation("Whether jobs are drawn", {200: status, 503: status})},
        "/metrics": {"get": _operation("Metrics for Prometheus", {200: prometheus})},
        "/session": {
            "post": _operation("Exchange a key for a cookie", {204: NOTHING}, body=key),
            "delete": _operation("Forget the cookie", {204: NOTHING}),
        },
        "/openapi.json": {"get": _operation("This description", {200: _json({"type": "object"})})},
    }


def _openai() -> dict[str, Schema]:
    wish = _object(
        "prompt",
        prompt=TEXT,
        model=TEXT,
        n={"type": "integer", "minimum": 1, "maximum": 10},
        size={"type": "string", "pattern": r"^(auto|\d{2,4}x\d{2,4})$"},
        response_format={"type": "string", "enum": ["url", "b64_json"]},
        output_format={"type": "string", "enum": ["png", "jpeg", "webp"]},
        output_compression={"type": "integer", "minimum": 0, "maximum": 100},
        partial_images={"type": "integer", "minimum": 0, "maximum": 3},
        stream=TRUTH,
    )
    one = {"type": "string", "format": "binary"}
    form = _object("prompt image", **wish["properties"], image=_list_of(one), mask=one)
    images = {
        "description": "pictures",
        "content": {"application/json": {"schema": _ref("Images")}, "text/event-stream": {"schema": TEXT}},
    }
    models = _json(_object("object data", object=TEXT, data=_list_of(_ref("Model"))))
    return {
        "/v1/images/generations": {"post": _operation("Make pictures", {200: images}, body=_body(wish))},
        "/v1/images/edits": {
            "post": _operation("Edit pictures", {200: images}, body=_body(form, "multipart/form-data"))
        },
        "/v1/models": {"get": _operation("List models", {200: models})},
        "/v1/models/{id}": {"get": _operation("Show a model", {200: _json(_ref("Model"))}, parameters=[IDENTIFIER])},
    }


def _a1111() -> dict[str, Schema]:
    values = {
        "prompt": TEXT,
        "negative_prompt": TEXT,
        "seed": WHOLE,
        "steps": WHOLE,
        "width": WHOLE,
        "height": WHOLE,
        "cfg_scale": NUMBER,
        "batch_size": WHOLE,
        "n_iter": WHOLE,
        "sampler_name": TEXT,
        "scheduler": TEXT,
    }
    pictures = _json(_object("images parameters info", images=_list_of(TEXT), parameters={"type": "object"}, info=TEXT))
    from_picture = _object(
        "init_images", **values, init_images=_list_of(TEXT), denoising_strength=NUMBER, mask=TEXT, mask_blur=NUMBER
    )
    found: dict[str, Schema] = {}

    def add(method: str, name: str, summary: str, answer: Schema, body: Schema | None = None) -> None:
        operation = _operation(summary, {200: answer}, body=body, error="OtherError")
        found.setdefault(f"/sdapi/v1/{name}", {})[method] = operation

    add("post", "txt2img", "Make pictures", pictures, _body(_object("", **values)))
    add("post", "img2img", "Paint over a picture", pictures, _body(from_picture))
    add("post", "png-info", "What made a picture", _json({"type": "object"}), _body(_object("image", image=TEXT)))
    add("post", "options", "Choose the model", _json({}), _body(_object("", sd_model_checkpoint=TEXT)))
    add("get", "options", "The settings", _json({"type": "object"}))
    add("post", "interrupt", "Cancel the running job", _json({}))
    add("get", "progress", "How far the running job is", _json(_object("progress state", progress=NUMBER)))
    for name in ("samplers", "schedulers", "sd-models", "loras"):
        add("get", name, f"List the {name}", _json(_list_of({"type": "object"})))
    add("get", "scripts", "List the scripts", _json({"type": "object"}))
    return found


@cache
def describe_api(needs_key: bool = False) -> dict[str, Any]:
    """Return the description of the API of a server, which needs a key or does not."""
    paths = {**_jobs(), **_system(), **_openai(), **_a1111()}
    for name, operations in paths.items():
        if name in OPEN:
            for operation in operations.values():
                operation["security"] = []
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "fluxonnx",
            "version": __version__,
            "description": "FLUX.2-klein: jobs, pictures, and the APIs of OpenAI and AUTOMATIC1111 (docs/serve.md)",
        },
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "cookie": {"type": "apiKey", "in": "cookie", "name": "fluxonnx_session"},
            },
        },
        "security": [{"bearer": []}, {"cookie": []}] if needs_key else [],
    }
