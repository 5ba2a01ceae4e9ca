"""Jobs, pictures and uploads: from the request to the picture, with progress, previews and cancellation."""

from __future__ import annotations

import io
import json
import socket

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette")

import fluxonnx
from fluxonnx.runtime.metadata import read_parameters
from tests.serving import Server

pytestmark = pytest.mark.slow

SMALL = {"prompt": "a red circle", "width": 64, "height": 64}


def picture(server: Server, path: str) -> Image.Image:
    status, _, data = server.request("GET", path)
    assert status == 200
    return Image.open(io.BytesIO(data))


def png(colour: tuple[int, int, int] = (200, 30, 30), size: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_is_bit_for_bit_that_of_the_library(server, model, tmp_path):
    job = server.draw(steps=4, seed=7, count=2)
    assert (job["state"], job["position"], job["error"]) == ("done", None, None)
    assert [told["seed"] for told in job["pictures"]] == [7, 8]
    with fluxonnx.load(model) as flux:
        for told in job["pictures"]:
            alone = flux.generate("a red circle", 64, 64, 4, told["seed"])
            assert picture(server, told["url"]).tobytes() == alone.tobytes()
    (tmp_path / "a.png").write_bytes(server.request("GET", job["pictures"][0]["url"])[2])
    assert read_parameters(tmp_path / "a.png")["seed"] == 7
    assert picture(server, job["pictures"][0]["thumbnail_url"]).format == "WEBP"


def test_jobs_that_differ_in_the_seed_are_drawn_together_as_alone(server):
    """While a long job runs, others gather; those are taken in one batch."""
    first = server.json("POST", "/jobs", {**SMALL, "steps": 200})["id"]
    others = [server.json("POST", "/jobs", {**SMALL, "steps": 2, "seed": seed})["id"] for seed in (1, 2, 3)]
    between = server.json("POST", "/jobs", {**SMALL, "prompt": "a blue square", "steps": 2, "seed": 1})["id"]
    last = server.json("POST", "/jobs", {**SMALL, "steps": 2, "seed": 4})["id"]
    positions = [server.json("GET", f"/jobs/{job}")["position"] for job in (*others, between, last)]
    assert positions == sorted(positions)
    server.json("DELETE", f"/jobs/{first}")
    together = [server.finished(job) for job in (*others, last)]
    assert (
        len({told["started"] for told in together}) == 1
        or max(told["started"] for told in together) < (server.finished(between)["started"])
    )
    for told in together:
        alone = server.draw(steps=2, seed=told["pictures"][0]["seed"])
        assert (
            picture(server, alone["pictures"][0]["url"]).tobytes()
            == picture(server, told["pictures"][0]["url"]).tobytes()
        )


def test_events_tell_of_each_step(server):
    job = server.json("POST", "/jobs", {**SMALL, "steps": 4})
    assert (job["state"] in ("queued", "running"), job["parameters"]["prompt"]) == (True, "a red circle")
    events = list(server.events(f"/jobs/{job['id']}/events"))
    assert events[-1][0] == "job"
    assert events[-1][1]["state"] == "done"
    assert len(events[-1][1]["pictures"]) == 1
    previews = [told for name, told in events if name == "preview"]
    assert all(told["image"].startswith("data:image/jpeg;base64,") for told in previews)
    assert [told["step"] for told in previews] == sorted(told["step"] for told in previews)
    assert {told["steps"] for told in previews} <= {4}


def test_the_newest_preview(server):
    job = server.json("POST", "/jobs", {**SMALL, "steps": 300})["id"]
    for name, _ in server.events(f"/jobs/{job}/events"):
        if name == "preview":
            assert picture(server, f"/jobs/{job}/preview").size == (32, 32)
            break
    assert server.json("DELETE", f"/jobs/{job}")["state"] == "cancelled"
    server.draw()  # the worker has left it
    assert server.request("GET", f"/jobs/{job}/preview")[0] == 404


def test_cancelling_one_job_of_a_batch_leaves_the_others(server):
    long = server.json("POST", "/jobs", {**SMALL, "prompt": "x", "steps": 300})["id"]
    next(told for name, told in server.events("/events") if name == "preview")
    first, second, third = (server.json("POST", "/jobs", {**SMALL, "steps": 30, "seed": i})["id"] for i in range(3))
    server.json("DELETE", f"/jobs/{long}")
    for name, told in server.events("/events"):
        if name == "preview" and told["job"] == first:
            break
    for job in (first, third):
        assert server.json("DELETE", f"/jobs/{job}")["state"] == "cancelled"
    assert server.finished(second)["state"] == "done"
    assert [len(server.json("GET", f"/jobs/{job}")["pictures"]) for job in (first, second, third)] == [0, 1, 0]


def test_cancelling_a_job_that_waits_or_has_ended(server):
    first = server.json("POST", "/jobs", {**SMALL, "steps": 300})["id"]
    second = server.json("POST", "/jobs", {**SMALL, "prompt": "x"})["id"]
    assert server.json("DELETE", f"/jobs/{second}")["state"] == "cancelled"
    assert server.json("DELETE", f"/jobs/{first}")["state"] == "cancelled"
    assert server.json("DELETE", f"/jobs/{first}")["state"] == "cancelled"
    assert server.finished(second)["pictures"] == []


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("/sdapi/v1/txt2img", {"width": 64, "height": 64}),
        ("/v1/images/generations", {"size": "64x64"}),
        ("/v1/images/generations", {"size": "64x64", "stream": True}),
    ],
)
def test_a_client_that_goes_away_cancels_its_job(server, path, values):
    body = json.dumps({"prompt": "gone", "steps": 900, **values}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + body)
        for name, told in server.events("/events"):
            if name == "preview":
                job = told["job"]
                break
    assert server.finished(job)["state"] == "cancelled"


def test_uploads_inputs_and_masks(server):
    upload = server.json("POST", "/uploads", png())
    assert (upload["width"], upload["height"], upload["parameters"]) == (64, 64, None)
    assert picture(server, upload["url"]).size == (64, 64)
    same = server.draw(input=upload["id"], strength=0)
    assert picture(server, same["pictures"][0]["url"]).tobytes() == Image.open(io.BytesIO(png())).tobytes()
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    painted = server.json("POST", "/uploads", buffer.getvalue())["id"]
    job = server.draw(input=upload["id"], mask=painted, seed=1)
    found = np.asarray(picture(server, job["pictures"][0]["url"]))
    assert (found[32:] == (200, 30, 30)).all()
    edited = server.draw(input=upload["id"], seed=1)
    referenced = server.draw(references=[upload["id"]], seed=1)
    one, two = (picture(server, told["pictures"][0]["url"]).tobytes() for told in (edited, referenced))
    assert one == two
    again = server.draw(input=job["pictures"][0]["id"], strength=0)
    assert (np.asarray(picture(server, again["pictures"][0]["url"])) == found).all()


def test_the_parameters_of_a_picture_make_it_again(server):
    upload = server.json("POST", "/uploads", png((9, 90, 9)))["id"]
    first = server.draw(input=upload, strength=0.6, steps=3, sampler="heun", seed=11)["pictures"][0]
    told = next(item for item in server.json("GET", "/pictures")["pictures"] if item["id"] == first["id"])
    again = server.finished(server.json("POST", "/jobs", told["parameters"])["id"])["pictures"][0]
    assert server.request("GET", again["url"])[2] == server.request("GET", first["url"])[2]


def test_an_upload_tells_what_made_it(server):
    made = server.draw(seed=21)["pictures"][0]
    data = server.request("GET", made["url"])[2]
    told = server.json("POST", "/uploads", data)["parameters"]
    assert (told["prompt"], told["seed"], told["steps"]) == ("a red circle", 21, 1)
    jpeg = server.request("GET", f"{made['url']}?format=jpeg")[2]
    assert server.json("POST", "/uploads", jpeg)["parameters"]["seed"] == 21


def test_lists_go_on_where_they_ended(server):
    for _ in range(3):
        server.draw()
    for name in ("jobs", "pictures"):
        whole = [told["id"] for told in server.json("GET", f"/{name}?limit=500")[name]]
        first = [told["id"] for told in server.json("GET", f"/{name}?limit=2")[name]]
        rest = [told["id"] for told in server.json("GET", f"/{name}?limit=500&before={first[-1]}")[name]]
        assert first + rest == whole


def test_a_deleted_picture_is_gone(server, data):
    made = server.draw()["pictures"][0]
    server.request("GET", made["thumbnail_url"])
    assert server.request("DELETE", made["url"])[0] == 204
    assert [server.request("GET", made[name])[0] for name in ("url", "thumbnail_url")] == [404, 404]
    assert server.request("DELETE", made["url"])[0] == 404
    assert [path for path in data.rglob("*") if made["id"] in path.name] == []


def test_the_same_idempotency_key_is_the_same_job(server):
    headers = {"Idempotency-Key": "abc"}
    first = server.json("POST", "/jobs", SMALL, headers)
    assert server.json("POST", "/jobs", SMALL, headers)["id"] == first["id"]
    assert server.json("POST", "/jobs", SMALL)["id"] != first["id"]


def test_warnings_belong_to_their_job(server):
    long = server.draw(prompt="a red circle " * 100)
    assert any("longer than" in text for text in long["warnings"])
    assert server.draw()["warnings"] == []


def test_lora_files(server):
    assert server.json("GET", "/info")["loras"] == ["stripes"]
    wanted = ([], [{"name": "stripes", "scale": 1.5}], [])
    urls = [server.draw(seed=1, steps=2, lora=lora)["pictures"][0]["url"] for lora in wanted]
    found = [server.request("GET", url)[2] for url in urls]
    assert found[0] == found[2] != found[1]
    for name in ("../models/stripes", "none", "/etc/passwd", ""):
        status, _, text = server.request("POST", "/jobs", {**SMALL, "lora": [{"name": name}]})
        assert (status, b"lora" in text) == (422, True)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"width": 63}, None),
        ({"width": "64"}, "width"),
        ({"steps": 0}, "steps"),
        ({"steps": 10**30}, "steps"),
        ({"steps": True}, "steps"),
        ({"guidance": 0.5}, "guidance"),
        ({"guidance_scale": 0.5}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 2**64 - 1, "count": 2}, "seed"),
        ({"count": 0}, "count"),
        ({"count": 101}, "count"),
        ({"count": "1"}, "count"),
        ({"sampler": "ddim"}, "sampler"),
        ({"schedule": "custom"}, None),
        ({"sigmas": [1, "x"]}, "sigmas"),
        ({"input": "none"}, "input"),
        ({"input": "../../etc/passwd"}, "input"),
        ({"input": 3}, "input"),
        ({"strength": 0.5}, "input"),
        ({"mask": "none", "input": "none"}, "input"),
        ({"references": "none"}, "references"),
        ({"references": ["none"]}, "references"),
        ({"references": ["none"] * 17}, "references"),
        ({"lora": "x"}, "lora"),
        ({"lora": [{"name": "x", "scale": "1"}]}, "lora"),
        ({"model": "other"}, "model"),
        ({"model": 1}, "model"),
        ({"precision": "int2"}, "precision"),
        ({"colour": "red"}, "colour"),
        ({"expand": [1, 2]}, "input"),
    ],
)
def test_bad_jobs(server, body, param):
    known = {} if "prompt" in body or not body else SMALL
    status, headers, data = server.request("POST", "/jobs", {**known, **body})
    assert (status, headers["content-type"]) == (422, "application/json")
    error = json.loads(data)["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b"\xff", b'{"prompt": NaN}', b'{"steps": 1e999}', b"[1" + b"0" * 5000 + b"]"]
)
def test_bodies_that_are_no_json(server, body):
    status, _, data = server.request("POST", "/jobs", body)
    assert status == 400
    assert b"the body is" in data


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"7", b"null"])
def test_json_that_is_no_job(server, body):
    assert server.request("POST", "/jobs", body)[0] == 422


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/jobs/none", 404),
        ("DELETE", "/jobs/none", 404),
        ("GET", "/jobs/none/events", 404),
        ("GET", "/jobs?limit=0", 422),
        ("GET", "/jobs?limit=x", 422),
        ("GET", "/jobs?before=none", 404),
        ("GET", "/pictures?before=none", 404),
        ("GET", "/pictures/none", 404),
        ("GET", "/pictures/..%2f..%2fqueue.sqlite3", 404),
        ("GET", "/pictures/%2e%2e/secret", 404),
        ("GET", "/uploads/../secret", 404),
        ("GET", "/static/../settings.py", 404),
        ("GET", "/static/%2e%2e/app.py", 404),
        ("GET", "/static//etc/passwd", 404),
        ("GET", "/static/__init__.py", 404),
        ("PUT", "/jobs", 405),
        ("GET", "/nothing", 404),
        ("POST", "/uploads", 400),
    ],
)
def test_addresses_that_are_wrong(server, method, path, status):
    found, _, data = server.request(method, path)
    assert found == status
    assert b'"error"' in data


@pytest.mark.parametrize("body", [b"x", b"GIF89a", png()[:70], b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_uploads_that_are_no_pictures(server, data, body):
    before = len(list((data / "uploads").iterdir()))
    status, _, text = server.request("POST", "/uploads", body)
    assert status == 422
    assert str(data).encode() not in text
    assert len(list((data / "uploads").iterdir())) == before
