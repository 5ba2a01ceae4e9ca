"""Who may use a server: keys, sessions, names, origins and limits; and what no answer tells."""

from __future__ import annotations

import io
import json
import sqlite3

import pytest
from PIL import Image

pytest.importorskip("starlette")

from tests.serving import Server, serving

pytestmark = pytest.mark.slow

FIRST, SECOND = "the-first-key", "the-second-key"
SMALL = {"prompt": "a red circle", "width": 64, "height": 64, "steps": 1}
LONG = {**SMALL, "prompt": "x", "steps": 900}


@pytest.fixture(scope="module")
def guarded(model, tmp_path_factory):
    flags = ["--api-key", FIRST, "--max-queue", "3", "--max-body", "1", "--max-pixels", "10000", "--max-count", "2"]
    flags += ["--allowed-host", "pictures.example", "--cors-origin", "https://page.example"]
    environment = {"FLUXONNX_API_KEY": SECOND}
    with serving(model, tmp_path_factory.mktemp("guarded"), *flags, environment=environment) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def status(server: Server, method: str, path: str, body: object = None, **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.request(method, path, body, named)[0]


def test_keys(guarded):
    assert guarded.json("GET", "/info") == {
        "name": "fluxonnx",
        "version": guarded.json("GET", "/info")["version"],
        "auth_required": True,
    }
    assert guarded.json("GET", "/info", None, bearer(FIRST))["models"][0]["id"] == "tiny-klein"
    for path in ("/jobs", "/pictures", "/metrics", "/v1/models", "/sdapi/v1/options", "/events", "/uploads/u1"):
        found, headers, data = guarded.request("GET", path)
        assert (found, headers["www-authenticate"]) == (401, "Bearer"), path
        assert b"key" in data
        assert guarded.request("GET", path, None, bearer("another-key"))[0] == 401
        assert guarded.request("GET", path, None, {"Authorization": "Basic !"})[0] == 401
        assert guarded.request("GET", f"{path}?key={FIRST}")[0] == 401
    for path in ("/health", "/ready", "/openapi.json"):
        assert guarded.request("GET", path)[0] == 200, path


def test_a_session_stands_for_a_key(guarded):
    assert guarded.request("POST", "/session", {"key": "another-key"})[0] == 401
    assert guarded.request("POST", "/session", {"key": 7})[0] == 422
    found, headers, _ = guarded.request("POST", "/session", {"key": FIRST})
    cookie = headers["set-cookie"]
    assert found == 204
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    value = cookie.partition(";")[0]
    assert FIRST not in cookie
    assert guarded.json("GET", "/pictures", None, {"Cookie": value}) is not None
    name, _, rest = value.partition("=")
    for wrong in (rest[:-1], rest[:-1] + "0" * (rest[-1] != "0") + "1" * (rest[-1] == "0"), "", "a.b", "....", "ü"):
        assert (
            guarded.request("GET", "/pictures", None, {"Cookie": f"{name}={wrong}".encode().decode("latin1")})[0] == 401
        )
    assert guarded.request("DELETE", "/session", None, {"Cookie": value})[0] == 204


def test_each_key_has_its_own_jobs_and_pictures(guarded):
    mine, theirs = bearer(FIRST), bearer(SECOND)
    job = guarded.json("POST", "/jobs", SMALL, mine)["id"]
    list(guarded.events(f"/jobs/{job}/events", mine))
    (made,) = guarded.json("GET", f"/jobs/{job}", None, mine)["pictures"]
    assert [guarded.json("GET", f"/{name}", None, theirs)[name] for name in ("jobs", "pictures")] == [[], []]
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    upload = guarded.json("POST", "/uploads", buffer.getvalue(), mine)
    for method, path in (
        ("GET", f"/jobs/{job}"),
        ("DELETE", f"/jobs/{job}"),
        ("GET", f"/jobs/{job}/events"),
        ("GET", made["url"]),
        ("GET", made["thumbnail_url"]),
        ("DELETE", made["url"]),
        ("GET", upload["url"]),
    ):
        assert guarded.request(method, path, None, theirs)[0] == 404
    for identifier in (upload["id"], made["id"]):
        assert guarded.request("POST", "/jobs", {**SMALL, "input": identifier}, theirs)[0] == 422
    assert guarded.request("GET", made["url"], None, mine)[0] == 200


def test_a_link_opens_one_picture_and_nothing_else(guarded):
    mine = bearer(FIRST)
    body = {"prompt": "a red circle", "size": "64x64", "steps": 1, "response_format": "url", "n": 2}
    urls = [item["url"] for item in guarded.json("POST", "/v1/images/generations", body, mine)["data"]]
    paths = [url.removeprefix(guarded.url) for url in urls]
    assert [guarded.request("GET", path)[0] for path in paths] == [200, 200]
    first, link = paths[0].split("?")
    other = paths[1].partition("?")[0]
    assert guarded.request("GET", f"{other}?{link}")[0] == 401
    assert guarded.request("GET", f"{first}/thumbnail?{link}")[0] == 401
    assert guarded.request("DELETE", f"{first}?{link}")[0] == 401
    assert guarded.request("GET", f"{first}?link=")[0] == 401


def test_limits(guarded):
    mine = bearer(FIRST)
    assert guarded.request("POST", "/uploads", b"x" * ((1 << 20) + 1), mine)[0] == 413
    found, _, data = guarded.request("POST", "/jobs", {**SMALL, "width": 128, "height": 128}, mine)
    assert (found, b"more than the 10000" in data) == (422, True)
    assert guarded.request("POST", "/jobs", {**SMALL, "count": 3}, mine)[0] == 422
    jobs = [guarded.json("POST", "/jobs", LONG, mine)["id"]]
    next(told for name, told in guarded.events("/events", mine) if name == "preview")  # it does not wait any more
    for seed in range(3):
        jobs.append(guarded.json("POST", "/jobs", {**LONG, "seed": seed, "prompt": "y"}, mine)["id"])
    found, headers, data = guarded.request("POST", "/jobs", LONG, mine)
    assert (found, headers["retry-after"], json.loads(data)["error"]["code"]) == (429, "5", "queue_full")
    assert guarded.request("POST", "/v1/images/generations", {"prompt": "x", "size": "64x64"}, mine)[0] == 429
    other = guarded.json("POST", "/jobs", LONG, bearer(SECOND))["id"]  # another key has a queue of its own
    for job in jobs:
        guarded.json("DELETE", f"/jobs/{job}", None, mine)
    guarded.json("DELETE", f"/jobs/{other}", None, bearer(SECOND))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", 200),
        ("localhost:7860", 200),
        ("LOCALHOST", 200),
        ("[::1]:80", 200),
        ("192.168.1.5", 200),
        ("app.localhost", 200),
        ("pictures.example", 200),
        ("evil.example", 400),
        ("localhost.evil.example", 400),
        ("127.0.0.1.evil.example", 400),
        ("evil.example:7860", 400),
        ("", 400),
        ("a@b", 400),
    ],
)
def test_names_of_strangers_are_refused(guarded, host, expected):
    """A page at a name that points to this machine could otherwise use the server: DNS rebinding."""
    assert status(guarded, "GET", "/health", Host=host) == expected


def test_pages_of_other_origins(guarded):
    mine = bearer(FIRST)
    ours = f"127.0.0.1:{guarded.port}"
    own = {"Origin": f"http://{ours}", "Host": ours}
    assert guarded.request("GET", "/jobs", None, {**mine, **own})[0] == 200
    for origin in ("https://evil.example", "null", "https://page.example.evil.example", f"https://evil.example/{ours}"):
        for method, path in (("POST", "/jobs"), ("GET", "/jobs"), ("OPTIONS", "/jobs")):
            found, headers, _ = guarded.request(
                method, path, SMALL if method == "POST" else None, {**mine, "Origin": origin}
            )
            assert found == 403
            assert "access-control-allow-origin" not in headers
    assert guarded.request("GET", "/pictures", None, {**mine, "Sec-Fetch-Site": "cross-site"})[0] == 403
    followed = {**mine, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert guarded.request("GET", "/pictures", None, followed)[0] == 200
    assert guarded.request("POST", "/jobs", SMALL, followed)[0] == 403
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    found, headers, _ = guarded.request("OPTIONS", "/jobs", None, asked)
    assert (found, headers["access-control-allow-origin"]) == (204, "https://page.example")
    assert "DELETE" in headers["access-control-allow-methods"]
    found, headers, _ = guarded.request("GET", "/jobs", None, {**mine, "Origin": "https://page.example"})
    assert (found, headers["access-control-allow-origin"]) == (200, "https://page.example")


def test_headers_of_every_answer(guarded):
    for path in ("/", "/info", "/nothing", "/jobs"):
        headers = guarded.request("GET", path)[1]
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert "server" not in headers


def test_metrics(guarded):
    text = guarded.request("GET", "/metrics", None, bearer(FIRST))[2].decode()
    for name in (
        'fluxonnx_phase_seconds_bucket{le="0.1",phase="denoise"}',
        "fluxonnx_jobs_queued 0.0",
        "fluxonnx_jobs_running",
        'fluxonnx_jobs_total{state="done"}',
        'fluxonnx_http_requests_total{method="GET",route="/health",status="200"}',
        "process_resident_memory_bytes",
    ):
        assert name in text
    assert "/jobs/{id}" in text


def test_no_answer_and_no_label_tells_a_path(model, tmp_path):
    """Damaged files, so that what fails is inside."""
    import shutil

    copy = shutil.copytree(model, tmp_path / "somewhere" / "tiny-klein")
    with serving(copy, tmp_path / "data", "--low-memory") as server:  # which loads graphs for each picture
        job = server.draw()
        name = job["pictures"][0]["id"]
        for graph in copy.glob("transformer*.onnx"):
            graph.write_bytes(b"no graph")
        (tmp_path / "data/pictures" / f"{name}.png").write_bytes(b"no picture")
        told = [server.request("GET", f"/pictures/{name}/thumbnail")[2].decode(), json.dumps(server.draw(seed=2))]
        told.append(server.request("POST", "/jobs", {**SMALL, "input": name})[2].decode())
        told.append(server.request("POST", "/v1/images/generations", {"prompt": "x"})[2].decode())
        told.append(server.request("POST", "/sdapi/v1/txt2img", {"prompt": "x", "width": 64, "height": 64})[2].decode())
        told.append(server.request("GET", "/info")[2].decode())
        told.append(server.request("GET", "/metrics")[2].decode())
    assert json.loads(told[1])["state"] == "failed"
    for text in told:
        assert str(tmp_path) not in text
        assert "somewhere" not in text
        assert "Traceback" not in text


def test_data_that_can_not_be_read(model, tmp_path):
    """As with a full disk: an answer for each client, no traceback, and the server says that it is not well."""
    with serving(model, tmp_path) as server:
        server.draw()
        with sqlite3.connect(tmp_path / "queue.sqlite3") as base:
            base.execute("ALTER TABLE jobs RENAME TO gone")
        for method, path, body in (
            ("POST", "/jobs", SMALL),
            ("GET", "/jobs", None),
            ("POST", "/v1/images/generations", {"prompt": "x", "size": "64x64"}),
            ("POST", "/sdapi/v1/txt2img", {"prompt": "x", "width": 64, "height": 64}),
        ):
            found, headers, data = server.request(method, path, body)
            assert (found, headers["retry-after"]) == (503, "5")
            assert b"disk may be full" in data
        with sqlite3.connect(tmp_path / "queue.sqlite3") as base:
            base.execute("ALTER TABLE gone RENAME TO jobs")
        assert server.draw()["state"] == "done"  # it goes on by itself
        assert server.json("GET", "/ready")["status"] == "ready"
        assert "Traceback" not in server.stop()


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (["--host", "0.0.0.0"], "other machines reach 0.0.0.0: set a key"),
        (["--host", "::"], "other machines reach ::"),
        (["--host", "nowhere.invalid", "--insecure"], "can't listen at nowhere.invalid"),
        (["--host", "192.0.2.1", "--insecure"], "can't listen at 192.0.2.1"),
        (["--api-key", "short"], "at least 8"),
        (["--api-key", "with a space"], "no space"),
        (["--max-queue", "0"], "the limit queue is 0"),
        (["--max-pixels", "-1"], "the limit pixels is -1"),
        (["--drain", "-1"], "--drain is -1"),
        (["--lora-dir", "nothing"], "nothing is no folder"),
        (["--precision", "int2"], "int2"),
        (["--data", "/proc/none"], "can't write /proc/none"),
    ],
)
def test_bad_flags(model, tmp_path, monkeypatch, fails, flags, pattern):
    monkeypatch.chdir(tmp_path)
    words = flags if "--data" in flags else [*flags, "--data", "data"]
    fails(2, pattern, "serve", "-d", model, "--port", "0", *words)


def test_a_port_that_is_taken(server, model, tmp_path, fails):
    fails(
        2,
        f"can't listen at 127.0.0.1 port {server.port}",
        "serve",
        "-d",
        model,
        "--port",
        server.port,
        "--data",
        tmp_path,
    )


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "sse_starlette", "python_multipart", "prometheus_client"])
def test_a_package_that_is_missing(monkeypatch, tmp_path, fails, package):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    fails(2, rf'needs {package}: pip install "fluxonnx\[serve\]"', "serve", "-d", tmp_path, "--port", "0")
