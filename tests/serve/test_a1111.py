"""The API of AUTOMATIC1111's web UI, with a client of it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

webuiapi = pytest.importorskip("webuiapi")
pytest.importorskip("starlette")

from tests.serving import serving  # noqa: E402

pytestmark = pytest.mark.slow

RED = Image.fromarray(np.full((64, 64, 3), (200, 30, 30), np.uint8))
SMALL = {"prompt": "a red circle", "width": 64, "height": 64, "steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def client(server):
    return webuiapi.WebUIApi(port=server.port)


def test_txt2img(client):
    found = client.txt2img(**SMALL, batch_size=2)
    assert [image.size for image in found.images] == [(64, 64)] * 2
    assert found.info["all_seeds"] == [5, 6]
    assert found.info["infotexts"][0].startswith("a red circle\nSteps: 2, Sampler: Euler")
    assert found.images[0].text["parameters"] == found.info["infotexts"][0]
    assert found.parameters["prompt"] == "a red circle"


def test_a_random_seed_is_told(client):
    values = {**SMALL, "seed": -1}
    first, second = client.txt2img(**values), client.txt2img(**values)
    assert first.info["seed"] != second.info["seed"]


def test_img2img(client):
    start = client.img2img(images=[RED], denoising_strength=0, **SMALL)
    assert start.image.convert("RGB").tobytes() == RED.tobytes()
    other = client.img2img(images=[RED], denoising_strength=0.9, **SMALL)
    assert other.image.tobytes() != RED.tobytes()


@pytest.mark.parametrize("invert", [0, 1])
def test_mask(client, invert):
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    values = {"mask_blur": 0, "inpaint_full_res": False, "inpainting_mask_invert": invert}
    found = client.img2img(images=[RED], mask_image=Image.fromarray(mask), denoising_strength=1.0, **SMALL, **values)
    kept = (mask == 255) == bool(invert)
    assert (np.asarray(found.image.convert("RGB"))[kept] == np.asarray(RED)[kept]).all()


def test_what_there_is(client):
    assert client.util_get_sampler_names() == ["DPM++ 2M", "Euler", "Heun"]
    assert client.util_get_scheduler_names() == ["normal", "simple"]
    assert client.util_get_model_names() == ["tiny-klein"]
    assert client.util_get_current_model() == "tiny-klein"
    assert [lora["path"] for lora in client.get_loras()] == ["stripes.safetensors"]
    assert client.get_sd_models()[0]["filename"] == "tiny-klein"
    client.set_options({"sd_model_checkpoint": "tiny-klein"})
    for sampler in ("Euler", "Heun", "DPM++ 2M"):
        assert client.txt2img(**SMALL, sampler_name=sampler).info["sampler_name"] == sampler


def test_progress_of_nothing(client):
    told = client.get_progress()
    assert (told["progress"], told["state"]["job_count"], told["current_image"]) == (0.0, 0, None)
    client.util_wait_for_ready()


def test_progress_and_interrupt(client, server):
    job = server.json("POST", "/jobs", {**SMALL, "steps": 500})["id"]
    told = None
    for name, _ in server.events(f"/jobs/{job}/events"):
        if name == "preview" and told is None:
            told = client.get_progress()
            assert 0 < told["progress"] < 1
            assert told["state"]["sampling_steps"] == 500
            assert told["current_image"]
            client.interrupt()
    assert server.json("GET", f"/jobs/{job}")["state"] == "cancelled"


def test_png_info(client):
    made = client.txt2img(**SMALL).image
    found = client.png_info(made)
    assert found.info == made.text["parameters"]
    assert "Steps: 2" in found.info
    assert found.parameters["prompt"] == "a red circle"
    assert client.png_info(RED).info == ""


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"width": 65}, "65x64 can.*t be drawn"),
        ({"steps": 0}, "steps is 0"),
        ({"enable_hr": True}, "enable_hr is not supported"),
        ({"sampler_name": "DDIM"}, "Sampler not found"),
        ({"scheduler": "Karras"}, "Scheduler not found"),
        ({"prompt": "a <lora:none:1>"}, "there is no LoRA .*none"),
        ({"prompt": "a <lora:none:x>"}, "scale that is no number"),
        ({"batch_size": 0}, "count is 0"),
        ({"override_settings": {"sd_model_checkpoint": "other"}}, "there is no model .*other"),
        ({"alwayson_scripts": {"x": {"args": [1]}}}, "alwayson_scripts are not supported"),
    ],
)
def test_bad_values(client, values, pattern):
    with pytest.raises(RuntimeError, match=pattern) as caught:
        client.txt2img(**{**SMALL, **values})
    assert caught.value.args[0] in (404, 422)


@pytest.mark.parametrize("images", [[], ["no base64"], ["bm8gcGljdHVyZQ=="], [7], "x", None])
def test_bad_pictures(server, images):
    status, _, data = server.request("POST", "/sdapi/v1/img2img", {**SMALL, "init_images": images})
    assert status in (404, 422, 500)
    assert b"detail" in data
    assert b"Traceback" not in data


def test_password(model, tmp_path):
    with serving(model, tmp_path, "--api-key", "a-long-key") as server:
        known = webuiapi.WebUIApi(port=server.port, username="anybody", password="a-long-key")
        assert known.get_sd_models()[0]["title"] == "tiny-klein"
        stranger = webuiapi.WebUIApi(port=server.port, username="anybody", password="another-key")
        with pytest.raises(RuntimeError, match="401"):
            stranger.txt2img(**SMALL)
