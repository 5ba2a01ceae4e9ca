"""The images API of OpenAI (platform.openai.com/docs/api-reference/images), as far as FLUX.2-klein has its meaning."""

from __future__ import annotations

import asyncio
import base64
import io
import math
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from PIL import Image
from sse_starlette import ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fluxonnx.errors import ImageError
from fluxonnx.runtime.metadata import opened
from fluxonnx.serve.errors import ApiError, wrong
from fluxonnx.serve.fields import VALUES
from fluxonnx.serve.gallery import FORMATS, Picture, encoded, in_format
from fluxonnx.serve.hub import JOB, PREVIEW
from fluxonnx.serve.models import Held
from fluxonnx.serve.queue import ENDED, Job
from fluxonnx.serve.service import Service
from fluxonnx.serve.web import check_done, event, event_stream, made, owner_of, read_form, read_json, service_of

SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
# Values without a meaning here; those that would change the picture are refused below.
IGNORED = {"quality", "background", "moderation", "style", "user", "input_fidelity"}
OURS = {*VALUES, "guidance_scale", "seed", "lora", "precision"} - {"width", "height", "size"}
THEIRS = {"n", "size", "model", "prompt", "stream", "partial_images", *IGNORED}
THEIRS |= {"response_format", "output_format", "output_compression"}
MOST_PARTIAL = 3
TRUTHS = {"true": True, "1": True, "false": False, "0": False}


class Wish:
    """What a request says besides the job.

    Attributes:
        job: The job, by the names of our API.
        count: How many pictures.
        size: As it was asked for.
        format: Of the pictures: "png", "jpeg" or "webp".
        quality: Of JPEG and WebP, from 0 to 100.
        by_url: Whether pictures are sent as links.
        stream: Whether steps are sent as they end.
        partial: How many of them, at most.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        """Check the values that are not those of our own API; raises ApiError."""
        for name in given:
            if name not in THEIRS and name not in OURS:
                raise wrong(f"Unknown parameter: {name[:60]!r}", name[:60])
        if given.get("background") == "transparent":
            raise wrong("background transparent is not possible: the pictures are opaque", "background")
        self.count = _integer(given, "n", 1, 1, 1000)
        self.size = _one_of(given, "size", None) or "auto"
        self.format = str(_one_of(given, "output_format", tuple(FORMATS)) or "png")
        self.quality = _integer(given, "output_compression", 100, 0, 100)
        self.by_url = _one_of(given, "response_format", ("url", "b64_json")) == "url"
        self.stream = _truth(given, "stream")
        self.partial = _integer(given, "partial_images", 0, 0, MOST_PARTIAL)
        if self.by_url and self.stream:
            raise wrong("a stream has the pictures in it: leave response_format out", "response_format")
        self.job: dict[str, Any] = {name: value for name, value in given.items() if name in OURS}
        self.job["count"] = self.count
        if given.get("model") is not None:
            self.job["model"] = given["model"]
        if self.size != "auto":
            found = SIZE.fullmatch(self.size)
            if not found:
                raise wrong(f"size is {self.size[:40]!r}, but must be auto, or WIDTHxHEIGHT such as 512x512", "size")
            self.job["width"], self.job["height"] = int(found[1]), int(found[2])


def _integer(given: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = given.get(name)
    if value is None:
        return default
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10:  # of a form
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise wrong(f"{name} must be an integer from {low} to {high}", name)
    return value


def _one_of(given: Mapping[str, Any], name: str, choices: tuple[str, ...] | None) -> str | None:
    value = given.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or (choices is not None and value not in choices):
        raise wrong(f"{name} must be {'a string' if choices is None else 'one of ' + ', '.join(choices)}", name)
    return value


def _truth(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    found = TRUTHS.get(value.lower()) if isinstance(value, str) else value
    if found is None:
        return False
    if not isinstance(found, bool):
        raise wrong(f"{name} must be true or false", name)
    return found


async def generate(request: Request) -> Response:
    """Make pictures of a prompt."""
    given = await read_json(request)
    if not isinstance(given, Mapping):
        raise wrong("the body has to be a JSON object with a prompt")
    return await _answer(request, Wish(given), "image_generation")


async def edit(request: Request) -> Response:
    """Make pictures of a prompt and of pictures: with a mask, the first one is painted where the mask is clear."""
    form = await read_form(request)
    try:
        given, pictures, mask = await _fields(form)
        wish = Wish(given)
        service, owner = service_of(request), owner_of(request)
        if not pictures:
            raise wrong("there is no image: send at least one", "image")
        found = [await run_in_threadpool(service.gallery.add_upload, owner, data, "image") for data in pictures]
        names = [upload.id for upload in found]
        if mask is not None:
            data = await run_in_threadpool(_white_where_clear, service, owner, mask)
            wish.job["mask"] = (await run_in_threadpool(service.gallery.add_upload, owner, data, "mask")).id
        if mask is not None or "strength" in wish.job or "expand" in wish.job:
            wish.job["input"] = names.pop(0)
        if names:
            wish.job["references"] = names
    finally:
        await form.close()
    return await _answer(request, wish, "image_edit")


async def _fields(form: FormData) -> tuple[dict[str, Any], list[bytes], bytes | None]:
    """Return the values, the pictures and the mask of a form."""
    given: dict[str, Any] = {}
    pictures: list[bytes] = []
    mask: bytes | None = None
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            data = await value.read()
            if name in ("image", "image[]"):
                pictures.append(data)
            elif name == "mask":
                mask = data
            else:
                raise wrong(f"Unknown file: {name[:60]!r}", name[:60])
        elif name in ("image", "image[]", "mask"):
            raise wrong(f"{name} has to be a file", name)
        else:
            given[name] = _typed(name, value)
    return given, pictures, mask


def _typed(name: str, text: str) -> Any:
    """Return the value of a form's field as JSON would have it."""
    field = VALUES.get("guidance" if name == "guidance_scale" else name)
    kind = int if name == "seed" else field.kind if field and not field.many else str
    if kind is bool:
        return TRUTHS.get(text.lower(), text)
    try:
        if kind is int and len(text) < 40:
            return int(text)
        if kind is float:
            number = float(text)
            return number if math.isfinite(number) else text
    except ValueError:
        pass
    return text


def _white_where_clear(service: Service, owner: str, data: bytes) -> bytes:
    """Turn a mask of theirs, which is transparent where to draw, into one of ours, which is white there."""
    upload = service.gallery.add_upload(owner, data, "mask")
    try:
        with opened(service.gallery.upload_file(upload)) as image:
            alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    except ImageError:
        raise wrong("the mask can't be read", "mask") from None
    if alpha is None:
        raise wrong("the mask has no transparent part: it has to be transparent where to draw", "mask")
    return encoded(alpha.point([255 - value for value in range(256)]), "PNG")


async def _answer(request: Request, wish: Wish, kind: str) -> Response:
    owner = owner_of(request)
    if wish.stream:
        service = service_of(request)
        job, _ = await run_in_threadpool(lambda: service.submit(owner, wish.job, attached=True))
        return event_stream(request, _events(service, job, wish, kind))
    job = await made(request, owner, wish.job)
    return JSONResponse(await run_in_threadpool(_result, request, job, wish))


def _result(request: Request, job: Job, wish: Wish) -> dict[str, Any]:
    service, data = service_of(request), []
    for picture in service.gallery.of_jobs([job.id])[job.id]:
        if wish.by_url:
            data.append({"url": _link(request, picture, wish)})
        else:
            data.append({"b64_json": _base64(service, picture, wish)})
    return {"created": int(time.time()), "data": data, **_about(service, job, wish)}


def _about(service: Service, job: Job, wish: Wish) -> dict[str, Any]:
    pictures = service.gallery.of_jobs([job.id])[job.id]
    size = f"{pictures[0].width}x{pictures[0].height}" if pictures else wish.size
    return {"background": "opaque", "output_format": wish.format, "quality": "auto", "size": size}


def _link(request: Request, picture: Picture, wish: Wish) -> str:
    keys = service_of(request).keys
    query = [f"format={wish.format}"] if wish.format != "png" else []
    query += [f"link={keys.link(picture.id)}"] if keys.required else []
    return f"{str(request.base_url).rstrip('/')}/pictures/{picture.id}{'?' if query else ''}{'&'.join(query)}"


def _base64(service: Service, picture: Picture, wish: Wish) -> str:
    path = service.gallery.picture_file(picture)
    return base64.b64encode(in_format(path, wish.format, wish.quality)).decode()


async def _events(service: Service, job: Job, wish: Wish, kind: str) -> AsyncIterator[ServerSentEvent]:
    """Send previews of some steps, and the pictures. A client that goes away cancels the job."""
    subscription, sent = service.hub.subscribe(job.owner, job.id), 0
    try:
        current = await asyncio.to_thread(service.queue.job, job.id)
        if current.state not in ENDED:
            async for news in subscription:
                if news.event == JOB and news.data["state"] in ENDED:
                    break
                if news.event != PREVIEW or sent == wish.partial:
                    continue
                if news.data["step"] * (wish.partial + 1) >= news.data["steps"] * (sent + 1):  # evenly spread
                    yield event(f"{kind}.partial_image", _partial(news.data, wish, kind, sent))
                    sent += 1
        current = await asyncio.to_thread(service.queue.job, job.id)
        try:
            if current.state not in ENDED:
                raise ApiError(503, "the server is shutting down: try again soon", code="draining")
            check_done(current)
        except ApiError as error:
            fields = {"message": str(error), "type": error.type, "param": error.param, "code": error.code}
            yield event("error", {"type": "error", "error": fields})
            return
        about = _about(service, current, wish)
        for picture in service.gallery.of_jobs([job.id])[job.id]:
            image = await asyncio.to_thread(_base64, service, picture, wish)
            name = f"{kind}.completed"
            yield event(name, {"type": name, "b64_json": image, "created_at": int(time.time()), **about})
    finally:
        service.hub.leave(subscription)
        if service.queue.job(job.id).state not in ENDED:
            service.cancel(job.id, job.owner)


def _partial(news: Mapping[str, Any], wish: Wish, kind: str, index: int) -> dict[str, Any]:
    data = base64.b64decode(str(news["image"]).partition(",")[2])
    if wish.format != "jpeg":
        data = encoded(Image.open(io.BytesIO(data)), FORMATS[wish.format])
    return {
        "type": f"{kind}.partial_image",
        "b64_json": base64.b64encode(data).decode(),
        "created_at": int(time.time()),
        "partial_image_index": index,
        "background": "opaque",
        "output_format": wish.format,
        "quality": "auto",
        "size": wish.size,
    }


def models(request: Request) -> Response:
    """List the models."""
    owner_of(request)
    return JSONResponse({"object": "list", "data": [_model(held) for held in service_of(request).models.all]})


def model(request: Request) -> Response:
    """Return one model."""
    owner_of(request)
    name = request.path_params["id"]
    for held in service_of(request).models.all:
        if held.id == name:
            return JSONResponse(_model(held))
    raise ApiError(404, f"The model {name[:80]!r} does not exist", "model", code="model_not_found")


def _model(held: Held) -> dict[str, Any]:
    return {"id": held.id, "object": "model", "created": held.created, "owned_by": "fluxonnx"}


ROUTES = [
    Route("/v1/images/generations", generate, methods=["POST"]),
    Route("/v1/images/edits", edit, methods=["POST"]),
    Route("/v1/models", models),
    Route("/v1/models/{id}", model),
]
