"""The images API of OpenAI, with OpenAI's own client."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")

from fluxonnx.runtime.metadata import read_parameters  # noqa: E402

pytestmark = pytest.mark.slow

ANY = {"seed": 3, "steps": 1}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def png(size: int = 64, alpha: np.ndarray | None = None) -> bytes:
    pixels = np.full((size, size, 3), (200, 30, 30), np.uint8)
    image = Image.fromarray(pixels)
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_generate(client, tmp_path):
    answer = client.images.generate(prompt="a red circle", n=2, size="64x128", model="tiny-klein", extra_body=ANY)
    assert len(answer.data) == 2
    assert (answer.output_format, answer.size, answer.background) == ("png", "64x128", "opaque")
    found = [picture(item.b64_json) for item in answer.data]
    assert [image.size for image in found] == [(64, 128)] * 2
    assert found[0].tobytes() != found[1].tobytes()
    (tmp_path / "a.png").write_bytes(base64.b64decode(answer.data[0].b64_json))
    assert read_parameters(tmp_path / "a.png")["seed"] == 3


@pytest.mark.parametrize(("format", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(client, format, kind, tmp_path):
    options = {"output_format": format, "output_compression": 50}
    answer = client.images.generate(prompt="a red circle", size="64x64", extra_body=ANY, **options)
    assert picture(answer.data[0].b64_json).format == kind
    (tmp_path / "a").write_bytes(base64.b64decode(answer.data[0].b64_json))
    assert read_parameters(tmp_path / "a")["prompt"] == "a red circle"


def test_url(client, server):
    answer = client.images.generate(prompt="a red circle", size="64x64", response_format="url", extra_body=ANY)
    path = answer.data[0].url.removeprefix(server.url)
    status, headers, data = server.request("GET", path)
    assert (status, headers["content-type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(data)).size == (64, 64)


def test_stream(client):
    options = {"stream": True, "partial_images": 2, "extra_body": {"seed": 3, "steps": 4}}
    events = list(client.images.generate(prompt="a red circle", size="64x64", **options))
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 2,
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1]
    whole = client.images.generate(prompt="a red circle", size="64x64", extra_body={"seed": 3, "steps": 4})
    assert events[-1].b64_json == whole.data[0].b64_json
    assert picture(events[0].b64_json).size == (32, 32)


def test_edit_with_several_pictures(client):
    files = [("a.png", png()), ("b.png", png(96))]
    answer = client.images.edit(image=files, prompt="a blue square", size="64x64", extra_body=ANY)
    assert picture(answer.data[0].b64_json).size == (64, 64)
    one = client.images.edit(image=files[0], prompt="a blue square", size="64x64", extra_body=ANY)
    assert picture(one.data[0].b64_json).tobytes() != picture(answer.data[0].b64_json).tobytes()


def test_edit_with_a_mask_keeps_the_rest(client):
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[16:48, 16:48] = 0  # clear where to draw
    answer = client.images.edit(
        image=("a.png", png()), mask=("m.png", png(64, alpha)), prompt="a blue square", extra_body={"seed": "1"}
    )
    found = np.asarray(picture(answer.data[0].b64_json))
    expected = np.asarray(Image.open(io.BytesIO(png())))
    kept = alpha == 255
    assert (found[kept] == expected[kept]).all()
    assert (found[~kept] != expected[~kept]).any()


def test_edit_as_a_stream(client):
    events = list(client.images.edit(image=("a.png", png()), prompt="a circle", stream=True, size="64x64"))
    assert events[-1].type == "image_edit.completed"
    assert picture(events[-1].b64_json).size == (64, 64)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny-klein"]
    assert client.models.retrieve("tiny-klein").owned_by == "fluxonnx"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-image-1")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"size": "65x64"}, None),
        ({"size": "huge"}, "size"),
        ({"n": 0}, "n"),
        ({"n": 900}, "count"),
        ({"model": "gpt-image-1"}, "model"),
        ({"background": "transparent"}, "background"),
        ({"output_format": "bmp"}, "output_format"),
        ({"extra_body": {"steps": 0}}, "steps"),
        ({"extra_body": {"steps": "many"}}, "steps"),
        ({"extra_body": {"colour": "red"}}, "colour"),
        ({"extra_body": {"strength": 0.5}}, "input"),
        ({"stream": True, "response_format": "url"}, "response_format"),
    ],
)
def test_bad_values(client, values, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "x", "size": "64x64", **values})
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == param
    assert caught.value.body["message"]


@pytest.mark.parametrize(
    ("files", "pattern"),
    [
        ({"image": ("a.png", b"no picture")}, "not an image"),
        ({"image": ("a.png", png()[:60])}, "damaged|truncated|not an image"),
        ({"image": ("a.png", png()), "mask": ("m.png", png())}, "no transparent part"),
        ({"image": [("a.png", png())] * 18}, "too many|Too many"),
        ({"image": ("a.png", b"")}, "no picture"),
    ],
)
def test_bad_pictures(client, files, pattern):
    with pytest.raises(openai.BadRequestError, match=pattern):
        client.images.edit(prompt="x", **files)
