"""The description of the API, and requests that schemathesis makes up from it."""

from __future__ import annotations

import os

import pytest

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("starlette")

import hypothesis  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

from fluxonnx.serve import a1111_api, jobs_api, openai_api, system_api  # noqa: E402
from fluxonnx.serve.fields import VALUES  # noqa: E402
from fluxonnx.serve.openapi import describe_api  # noqa: E402
from fluxonnx.serve.parameters import OTHERS  # noqa: E402

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("FLUXONNX_SCHEMA_EXAMPLES", "2"))


def can_be_wrong(operation: dict) -> bool:
    """Whether something that an operation takes has a type: any text may be an id, any bytes a picture."""
    typed = "application/json" in operation.get("requestBody", {}).get("content", {})
    return typed or any(item["in"] == "query" for item in operation.get("parameters", ()))


# Streams don't end.
OPERATIONS = [
    (path, method, mode)
    for path, operations in describe_api()["paths"].items()
    if not path.endswith("/events")
    for method, operation in operations.items()
    for mode in GenerationMode
    if mode == GenerationMode.POSITIVE or can_be_wrong(operation)
]
SCHEMA = schemathesis.openapi.from_dict(describe_api())
# Left out, or thousands of steps at 4096x4096 would be drawn.
WORK = {"steps", "width", "height", "size", "count", "n", "n_iter", "batch_size", "stream", "sigmas", "expand"}
SETTINGS = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_every_answer_is_as_described(server, path, method, mode):
    """No error of ours, no status, type or shape that the description does not have."""
    operation = SCHEMA[path][method]

    @SETTINGS
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            for name in WORK & case.body.keys():
                del case.body[name]
        # a schema can't say that a text is a picture, nor which values go together
        case.call_and_validate(base_url=server.url, timeout=300, excluded_checks=[positive_data_acceptance])

    check()


def test_every_route_is_described():
    routes = [*jobs_api.ROUTES, *system_api.ROUTES, *openai_api.ROUTES, *a1111_api.ROUTES]
    paths = describe_api()["paths"]
    for route in routes:
        if route.path == "/" or route.path.startswith("/static"):  # the page
            continue
        for method in route.methods - {"HEAD"}:
            assert method.lower() in paths[route.path], (method, route.path)
    assert set(paths) == {route.path for route in routes} - {"/", "/static/{path:path}"}


def test_every_value_of_a_job_is_described():
    schema = describe_api()["components"]["schemas"]["JobRequest"]
    assert set(schema["properties"]) == {*VALUES, *OTHERS}
