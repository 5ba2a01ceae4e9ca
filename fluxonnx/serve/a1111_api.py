"""The API of AUTOMATIC1111's web UI, as far as FLUX.2-klein has its meaning.

Source: modules/api/api.py and models.py, AUTOMATIC1111/stable-diffusion-webui. What would change a picture and can't be
done is refused; what clients send unasked is ignored.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fluxonnx.runtime.images import BLACK, load_image
from fluxonnx.runtime.metadata import A1111_NAMES, opened
from fluxonnx.runtime.seeds import random_seed
from fluxonnx.serve.errors import ApiError, wrong
from fluxonnx.serve.gallery import Upload, encoded
from fluxonnx.serve.infotext import OUR_NAMES, split_loras
from fluxonnx.serve.queue import RUNNING, Job
from fluxonnx.serve.service import Service
from fluxonnx.serve.web import made, owner_of, read_json, service_of
from fluxonnx.version import __version__

SAMPLERS = ("euler", "heun", "dpmpp-2m")
SCHEDULES = ("flow", "linear")
# "Euler a" is what some clients send unasked.
ALIASES = {"euler": ["k_euler", "Euler a", "euler_a", "k_euler_a"], "heun": ["k_heun"], "dpmpp-2m": ["k_dpmpp_2m"]}
# What can't be done, and the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "enable_hr": (False, None),
    "tiling": (False, None),
    "restore_faces": (False, None),
    "script_name": ("", None, "None"),
    "styles": ([], None),
    "subseed_strength": (0, None),
    "firstpass_image": ("", None),
    "include_init_images": (False, None),
}


async def txt2img(request: Request) -> Response:
    """Make pictures of a prompt."""
    given = await _read(request)
    owner, service = owner_of(request), service_of(request)
    body = await run_in_threadpool(_job, service, owner, given)
    job = await made(request, owner, body)
    return JSONResponse(await run_in_threadpool(_result, service, job, given))


async def img2img(request: Request) -> Response:
    """Paint over a picture."""
    given = await _read(request)
    owner, service = owner_of(request), service_of(request)

    def prepare() -> dict[str, Any]:
        images = given.get("init_images")
        if not isinstance(images, list) or not images:
            raise ApiError(404, "Init image not found")  # their words
        body = _job(service, owner, given)
        body["strength"] = _number(given, "denoising_strength", 0.75)
        names = [_upload(service, owner, image, "init_images").id for image in images]
        body["input"] = names[0]
        if len(names) > 1:
            body["references"] = names[1:]
        if given.get("mask"):
            body |= _mask(service, owner, given)
        return body

    job = await made(request, owner, await run_in_threadpool(prepare))
    return JSONResponse(await run_in_threadpool(_result, service, job, given))


async def _read(request: Request) -> dict[str, Any]:
    given = await read_json(request)
    if not isinstance(given, dict):
        raise wrong("the body has to be a JSON object")
    return given


def _job(service: Service, owner: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a job of our API."""
    for name, nothing in REFUSED.items():
        if given.get(name) not in nothing:
            raise wrong(f"{name} is not supported: leave it out", name)
    scripts = given.get("alwayson_scripts") or {}
    if isinstance(scripts, Mapping) and any(_asks(script) for script in scripts.values()):
        raise wrong("alwayson_scripts are not supported: leave them out", "alwayson_scripts")
    prompt = given.get("prompt", "")
    if not isinstance(prompt, str):
        raise wrong("prompt has to be a string", "prompt")
    try:
        prompt, loras = split_loras(prompt)
    except ValueError:
        raise wrong("a LoRA in the prompt has a scale that is no number: write <lora:NAME:0.8>", "prompt") from None
    settings = given.get("override_settings") or {}
    wanted = settings.get("sd_model_checkpoint") if isinstance(settings, Mapping) else None
    held = service.models.find(_model_name(service, owner, wanted))
    seed = _integer(given, "seed", -1)
    body: dict[str, Any] = {
        "prompt": prompt,
        "model": held.id,
        "seed": random_seed() if seed < 0 else seed,
        "count": _integer(given, "batch_size", 1) * _integer(given, "n_iter", 1),
        "width": _integer(given, "width", 512),
        "height": _integer(given, "height", 512),
        "steps": _integer(given, "steps", 50 if not held.flux.is_distilled else 4),
        "sampler": _sampler(given),
        "schedule": _schedule(given),
    }
    if loras:
        body["lora"] = loras
    if not held.flux.is_distilled:  # distilled models were made to need no guidance, whatever a client sends unasked
        body["guidance"] = _number(given, "cfg_scale", 4.0)
        body["negative_prompt"] = given.get("negative_prompt") or ""
    return body


def _asks(script: Any) -> bool:
    """Whether a script is to do something: clients send [False] for those that are not."""
    arguments = script.get("args") if isinstance(script, Mapping) else script
    return bool(arguments) and arguments != [False]


def _mask(service: Service, owner: str, given: Mapping[str, Any]) -> dict[str, Any]:
    upload = _upload(service, owner, given["mask"], "mask")
    found: dict[str, Any] = {"mask": upload.id, "mask_blur": _number(given, "mask_blur", 4)}
    if given.get("inpainting_mask_invert") in (1, True):
        mask = load_image(service.gallery.upload_file(upload), behind=BLACK).convert("L")
        data = encoded(ImageOps.invert(mask), "PNG")
        found["mask"] = service.gallery.add_upload(owner, data, "mask").id
    if given.get("inpaint_full_res"):
        found["mask_crop"] = _integer(given, "inpaint_full_res_padding", 32)
    return found


def _upload(service: Service, owner: str, value: Any, param: str) -> Upload:
    """Keep a picture in base64, maybe as a data URL."""
    if not isinstance(value, str):
        raise wrong(f"{param} has to hold pictures in base64", param)
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise wrong("Invalid encoded image", param) from None  # their words
    return service.gallery.add_upload(owner, data, param)


def _integer(given: Mapping[str, Any], name: str, default: int) -> int:
    value = given.get(name)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(f"{name} has to be an integer", name)
    return value


def _number(given: Mapping[str, Any], name: str, default: float) -> float:
    value = given.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e9:
        raise wrong(f"{name} has to be a number", name)
    return float(value)


def _sampler(given: Mapping[str, Any]) -> str:
    name = given.get("sampler_name") or given.get("sampler_index") or "Euler"
    for ours in SAMPLERS:
        if isinstance(name, str) and name in (ours, A1111_NAMES[ours], *ALIASES[ours]):
            return ours
    raise ApiError(404, "Sampler not found", "sampler_name")  # their words


def _schedule(given: Mapping[str, Any]) -> str:
    name = given.get("scheduler") or "automatic"
    if isinstance(name, str):
        if name.lower() == "automatic":
            return "flow"
        for ours in SCHEDULES:
            if name.lower() in (ours, A1111_NAMES[ours].lower()) or OUR_NAMES.get(name) == ours:
                return ours
    raise ApiError(404, "Scheduler not found", "scheduler")


def _model_name(service: Service, owner: str, name: Any) -> str | None:
    if name is None:
        return service.chosen.get(owner)
    if not isinstance(name, str):
        raise wrong("sd_model_checkpoint has to be the name of a model", "sd_model_checkpoint")
    return name


def _result(service: Service, job: Job, given: Mapping[str, Any]) -> dict[str, Any]:
    pictures = service.gallery.of_jobs([job.id])[job.id]
    images, texts = [], []
    for picture in pictures:
        path = service.gallery.picture_file(picture)
        with opened(path) as image:
            texts.append(image.info.get("parameters", ""))
        images.append(base64.b64encode(path.read_bytes()).decode())
    first = pictures[0].parameters if pictures else job.parameters
    info = {
        "prompt": first.get("prompt", ""),
        "all_prompts": [first.get("prompt", "")] * len(pictures),
        "negative_prompt": first.get("negative_prompt", ""),
        "seed": job.seeds[0],
        "all_seeds": job.seeds,
        "width": pictures[0].width if pictures else None,
        "height": pictures[0].height if pictures else None,
        "sampler_name": A1111_NAMES.get(first.get("sampler", ""), first.get("sampler")),
        "cfg_scale": first.get("guidance"),
        "steps": first.get("steps"),
        "batch_size": len(pictures),
        "denoising_strength": first.get("strength"),
        "sd_model_name": first.get("model"),
        "infotexts": texts,
        "index_of_first_image": 0,
        "version": f"fluxonnx {__version__}",
        "warnings": job.warnings,
    }
    big = ("init_images", "mask", "script_args")
    return {
        "images": images if given.get("send_images") is not False else [],
        "parameters": {name: value for name, value in given.items() if name not in big},
        "info": json.dumps(info),
    }


def _running(service: Service, owner: str) -> Job | None:
    return next((job for job in service.queue.active(owner) if job.state == RUNNING), None)


def progress(request: Request) -> Response:
    """Return how far the running job is."""
    service, owner = service_of(request), owner_of(request)
    active = service.queue.active(owner)
    job = next((job for job in active if job.state == RUNNING), None)
    state: dict[str, Any] = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": len(active),
        "job_timestamp": "0",
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    }
    part, left, image = 0.0, 0.0, None
    now = service.worker.progress.get(job.id) if job else None
    if job is not None and now is not None:
        done = len(service.gallery.of_jobs([job.id])[job.id])
        part = min(0.99, (done + (now.step / now.steps if now.steps else 0)) / len(job.seeds))
        seconds = time.time() - (job.started or time.time())
        left = seconds / part - seconds if part else 0.0
        image = base64.b64encode(now.preview).decode() if now.preview else None
        moment = time.strftime("%Y%m%d%H%M%S", time.localtime(job.started))
        state |= {"job": job.id, "job_no": done, "job_timestamp": moment}
        state |= {"sampling_step": now.step, "sampling_steps": now.steps}
    if request.query_params.get("skip_current_image", "").lower() in ("true", "1"):
        image = None
    told = {"progress": part, "eta_relative": left, "state": state, "current_image": image, "textinfo": None}
    return JSONResponse(told, headers={"Cache-Control": "no-store"})


def interrupt(request: Request) -> Response:
    """Cancel the running job."""
    service, owner = service_of(request), owner_of(request)
    job = _running(service, owner)
    if job is not None:
        service.cancel(job.id, owner)
    return JSONResponse({})


def show_options(request: Request) -> Response:
    """Return the settings that clients read."""
    service = service_of(request)
    held = service.models.find(service.chosen.get(owner_of(request)))
    return JSONResponse({"sd_model_checkpoint": held.id, "sd_checkpoint_hash": "", "samples_format": "png"})


async def set_options(request: Request) -> Response:
    """Choose the model for requests that name none; other settings are ignored."""
    service, owner, given = service_of(request), owner_of(request), await _read(request)
    if "sd_model_checkpoint" in given:
        name = _model_name(service, owner, given["sd_model_checkpoint"])
        service.chosen[owner] = service.models.find(name).id
    return JSONResponse({})


def samplers(request: Request) -> Response:
    """List the samplers."""
    owner_of(request)
    return JSONResponse([{"name": A1111_NAMES[s], "aliases": [s, *ALIASES[s]], "options": {}} for s in SAMPLERS])


def schedulers(request: Request) -> Response:
    """List the schedules."""
    owner_of(request)
    found = []
    for ours in SCHEDULES:
        label = A1111_NAMES[ours]
        told: dict[str, Any] = {"name": label.lower(), "label": label, "aliases": [ours]}
        found.append(told | {"default_rho": -1.0, "need_inner_model": False})
    return JSONResponse(found)


def sd_models(request: Request) -> Response:
    """List the models; places of files are not told."""
    owner_of(request)
    models = service_of(request).models.all
    return JSONResponse(
        [
            {"title": m.id, "model_name": m.id, "hash": None, "sha256": None, "filename": m.id, "config": None}
            for m in models
        ]
    )


def loras(request: Request) -> Response:
    """List the LoRA files; places of files are not told."""
    owner_of(request)
    files = service_of(request).models.lora_files()
    return JSONResponse([{"name": n, "alias": n, "path": file.name, "metadata": {}} for n, file in files.items()])


def scripts(request: Request) -> Response:
    """List the scripts, of which there are none: clients look for extensions here."""
    owner_of(request)
    return JSONResponse({"txt2img": [], "img2img": []})


async def png_info(request: Request) -> Response:
    """Return what a picture says of how it was made."""
    given, owner, service = await _read(request), owner_of(request), service_of(request)

    def read() -> dict[str, Any]:
        upload = _upload(service, owner, given.get("image"), "image")
        with opened(service.gallery.upload_file(upload)) as image:
            items = {name: value for name, value in _texts(image).items() if isinstance(value, str)}
        return {"info": items.pop("parameters", ""), "items": items, "parameters": upload.parameters or {}}

    return JSONResponse(await run_in_threadpool(read))


def _texts(image: Image.Image) -> dict[Any, Any]:
    return dict(image.info)


ROUTES = [
    Route(f"/sdapi/v1/{name}", endpoint, methods=[method])
    for method, name, endpoint in (
        ("POST", "txt2img", txt2img),
        ("POST", "img2img", img2img),
        ("GET", "progress", progress),
        ("POST", "interrupt", interrupt),
        ("GET", "options", show_options),
        ("POST", "options", set_options),
        ("GET", "samplers", samplers),
        ("GET", "schedulers", schedulers),
        ("GET", "sd-models", sd_models),
        ("GET", "loras", loras),
        ("GET", "scripts", scripts),
        ("POST", "png-info", png_info),
    )
]
