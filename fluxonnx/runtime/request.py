"""A request for a picture, and its check before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from PIL import Image

from fluxonnx.errors import UsageError
from fluxonnx.runtime.canvas import Canvas, expanded, fit_mask, lay_out
from fluxonnx.runtime.fields import FIELD, FIELDS, FITTED_SIDE, MAX_BORDER, MAX_REFERENCES, STRENGTH
from fluxonnx.runtime.images import MAX_REFERENCE_AREA, fit_reference
from fluxonnx.runtime.inputs import Picture, gray_mask, plain, rgb_picture, several
from fluxonnx.runtime.notices import warn
from fluxonnx.runtime.schedule import custom_sigmas
from fluxonnx.runtime.sizes import asked_size, cropped_size, edited_size, own_size, painted_size, size_by_ratio

# The defaults of models whose manifest has none.
DEFAULTS: dict[str, int] = {item.name: item.default for item in FIELDS if item.model_default}

# The attributes of a request that hold pictures, which the table of fields does not describe.
PICTURES = ("image", "mask", "references", "canvas")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides what a picture looks like, except the seed and the model.

    None means "not said": `resolve` fills in a default. Pictures are PIL images, paths, or numpy arrays of uint8
    [height, width], [height, width, 3] or [height, width, 4].

    Attributes:
        prompt: What to draw.
        width: In pixels, a multiple of 16 from 64 to 4096, and the area at most 2048 * 2048; None for the size of
            `image`, else of the first reference as it is looked at, else the model's own, which is 256 unless its
            manifest says otherwise. If only one side is given, the other one keeps the ratio.
        height: Likewise.
        size: "input" for the size of the first input picture, as far as it can be drawn; None if `width` and `height`
            decide.
        steps: Denoising steps; None for 4, or 50 with a base model.
        guidance_scale: How much more the prompt counts than the negative prompt, at least 1, which turns guidance off;
            None for 4, or 1 with a distilled model, which was made to need none.
        negative_prompt: What guidance leads away from.
        image: The picture to start from.
        strength: How much of `image` is replaced by noise, in [0, 1]; see `schedule.start_step`. None for 0.75, or 1
            if only a part of it is drawn.
        mask: What is drawn of `image`: its white part, of any size, black where it is transparent; also an array of
            bool. None for all of it. `image` then is also the first picture to look at, as in diffusers' pipeline.
        mask_blur: The radius in pixels by which the edge of the mask is softened, from 0 to 256.
        mask_crop: Draw only the neighbourhood of the mask's white part, with so many pixels around it, at the size
            `width` and `height`, and put it back into `image`, whose size the result has. None for no crop.
        keep_unmasked: Whether every pixel outside of the mask stays as it is.
        expand: Pixels to add at the left, top, right and bottom of `image`, which are drawn like the mask's white part.
        references: Pictures to look at while drawing, at most 16.
        reference_area: To how many times 1024 * 1024 pixels they are scaled down, from 0.0625 to 4.
        kv: Whether references are looked at once, for all steps, instead of in each step: what models like
            FLUX.2-klein-9b-kv were made for, and faster. None for what the model was made for.
        schedule: "flow" (the model's own), "linear", "power" or "custom".
        sigmas: The noise levels of a custom schedule.
        power_alpha: Exponent of the power schedule.
        step_cache: The model is called in every n-th step only, from 1 (off) to 10; see `runtime.step_cache`.
        sampler: "euler", "heun" or "dpmpp-2m".
        noise: "torch" (the noise of diffusers), "size-independent" (the same composition at all sizes) or "flux2c" (the
            noise of flux2.c).
        max_sequence_length: The number of tokens that a prompt is padded or cut to: a multiple of 8 up to 512; None for
            the model's own, which is 512 unless its manifest says otherwise.
        tile: The side in pixels of the tiles in which larger pictures are encoded and decoded, at least 384; tiles
            cost a little exactness. None for 576 if memory is short, else whole pictures.
    """

    prompt: str
    width: int | None = None
    height: int | None = None
    size: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = FIELD["negative_prompt"].default
    image: Picture | None = None
    strength: float | None = None
    mask: Picture | None = None
    mask_blur: float = FIELD["mask_blur"].default
    mask_crop: int | None = None
    keep_unmasked: bool = FIELD["keep_unmasked"].default
    expand: tuple[int, ...] | None = None
    references: Picture | Iterable[Picture] = ()
    reference_area: float = FIELD["reference_area"].default
    kv: bool | None = None
    schedule: str = FIELD["schedule"].default
    sigmas: tuple[float, ...] | None = None
    power_alpha: float = FIELD["power_alpha"].default
    step_cache: int = FIELD["step_cache"].default
    sampler: str = FIELD["sampler"].default
    noise: str = FIELD["noise"].default
    max_sequence_length: int | None = None
    tile: int | None = None


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A checked `Request` with all defaults filled in and its pictures prepared.

    The pictures are RGB; the references have the size in which they are encoded. `image`, `sigmas`, `mask_crop` and
    `expand` are None where the request has none, `canvas` where all of the picture is drawn, `tile` where pictures are
    not divided or the run has yet to decide.
    """

    prompt: str
    width: int
    height: int
    size: str | None
    steps: int
    guidance_scale: float
    negative_prompt: str
    image: Image.Image | None
    strength: float
    canvas: Canvas | None
    mask_blur: float
    mask_crop: int | None
    keep_unmasked: bool
    expand: tuple[int, ...] | None
    references: tuple[Image.Image, ...]
    reference_area: float
    kv: bool
    schedule: str
    sigmas: tuple[float, ...] | None
    power_alpha: float
    step_cache: int
    sampler: str
    noise: str
    max_sequence_length: int
    tile: int | None

    @property
    def looks_at_pictures(self) -> bool:
        """Whether there are references; the picture of which a part is drawn is one, too."""
        return bool(self.references) or self.canvas is not None

    @property
    def guided(self) -> bool:
        """Whether each step takes a second, unconditional pass."""
        return self.guidance_scale != 1

    def parameters(self) -> dict[str, Any]:
        """Return the values that are written into a picture: all that have an effect on it, except the pictures."""
        names = [item.name for item in fields(self) if item.name not in PICTURES and FIELD[item.name].matters(self)]
        return {name: list(getattr(self, name)) if FIELD[name].many else getattr(self, name) for name in names}


def resolve(
    request: Request,
    is_distilled: bool,
    multiple: int,
    defaults: Mapping[str, int] = DEFAULTS,
    warn: Callable[[str], None] = warn,
) -> ResolvedRequest:
    """Check a request, fill in defaults and prepare the pictures.

    Args:
        request: The request.
        is_distilled: Whether the model needs no guidance.
        multiple: The pixels along a side of a latent token, of which sides have to be multiples.
        defaults: The model's width, height, max_sequence_length and kv.
        warn: Told about values that have no effect, and about pictures that are scaled.

    Raises:
        UsageError: A value is out of its range, or two values contradict each other.
        ImageError: An input picture can't be read.
    """
    if not isinstance(request, Request):
        raise UsageError(f"the request is of type {type(request).__name__}: pass a fluxonnx.Request")
    request = _plain(request)
    references = tuple(rgb_picture(picture) for picture in _references(request))
    image = rgb_picture(request.image) if request.image is not None else None
    mask = gray_mask(request.mask) if request.mask is not None else None
    untouched = image is not None and request.strength == 0 and (request.width, request.height) == image.size
    both = request.width is not None and request.height is not None
    for item in fields(Request):
        value = getattr(request, item.name)
        if item.name in PICTURES or (value is None and item.default is None):
            continue
        if item.name in ("width", "height") and (untouched or both):
            if error := FIELD[item.name].type_error(value):
                raise UsageError(error)  # the range is checked of both sides together
        else:
            FIELD[item.name].check(value, multiple)
    _check_part(request)
    if not request.prompt.strip():
        raise UsageError("the prompt is empty: say what to draw")
    if image is not None and mask is not None:
        mask = fit_mask(mask, image.size, warn)
    if image is not None and request.expand is not None:
        image, mask = expanded(image, mask, request.expand)
    area = request.reference_area * MAX_REFERENCE_AREA
    fitted = tuple(fit_reference(reference, multiple, area) for reference in references)
    width, height = _size(request, image, references, fitted, multiple, defaults, warn)
    canvas = None
    if image is not None and mask is not None:
        blur, crop, keep = request.mask_blur, request.mask_crop, request.keep_unmasked
        canvas = lay_out(image, mask, (width, height), multiple, blur=blur, crop=crop, keep=keep)
    tokens = request.max_sequence_length
    resolved = ResolvedRequest(
        prompt=request.prompt,
        width=width,
        height=height,
        size=request.size,
        steps=_steps(request, is_distilled),
        guidance_scale=_guidance(request, is_distilled, warn),
        negative_prompt=request.negative_prompt,
        image=image,
        strength=_strength(request),
        canvas=canvas,
        mask_blur=request.mask_blur,
        mask_crop=request.mask_crop,
        keep_unmasked=request.keep_unmasked,
        expand=request.expand,
        references=fitted,
        reference_area=request.reference_area,
        kv=_kv(request, bool(references) or canvas is not None, defaults, warn),
        schedule=request.schedule,
        sigmas=request.sigmas,
        power_alpha=request.power_alpha,
        step_cache=request.step_cache,
        sampler=request.sampler,
        noise=request.noise,
        max_sequence_length=defaults["max_sequence_length"] if tokens is None else tokens,
        tile=request.tile,
    )
    _check_noise(resolved)
    return resolved


def _plain(request: Request) -> Request:
    """Give values Python's own types, see `inputs.plain`."""
    names = [item.name for item in fields(Request) if item.name not in PICTURES]
    return replace(request, **{name: plain(FIELD[name], getattr(request, name)) for name in names})


def _references(request: Request) -> tuple[Any, ...]:
    references = several(request.references)
    if len(references) > MAX_REFERENCES:
        raise UsageError(f"{len(references)} reference images are too many: {MAX_REFERENCES} at most")
    return references


def _kv(request: Request, looks: bool, defaults: Mapping[str, int], warn: Callable[[str], None]) -> bool:
    usual = bool(defaults.get("kv"))
    if request.kv and not looks:
        warn("kv is about references, but there are none: it changes nothing")
    elif request.kv and not usual:
        warn("this model was not made to look at references only once (kv): expect another picture than without")
    return usual if request.kv is None else request.kv


def _check_noise(request: ResolvedRequest) -> None:
    if request.noise != "torch" and max(request.width, request.height) > FITTED_SIDE:
        raise UsageError(f"noise {request.noise} is made for sides of at most {FITTED_SIDE}: choose torch, or a size")


def _check_part(request: Request) -> None:
    """Check what says which part of a picture is drawn."""
    if request.mask is None and request.expand is None:
        for name, default in (("mask_blur", 0), ("mask_crop", None), ("keep_unmasked", True)):
            if getattr(request, name) != default:
                raise UsageError(f"{name} says how a mask is used, but there is none: give a mask, or expand")
    elif request.image is None:
        name = "expand" if request.mask is None else "the mask"
        raise UsageError(f"{name} says which part of a picture is drawn, but there is none: give the picture to paint")
    if request.expand is not None:
        if len(request.expand) != 4 or not all(0 <= side <= MAX_BORDER for side in request.expand):
            shown = ",".join(map(str, request.expand))
            raise UsageError(f"expand is {shown}, but must be left,top,right,bottom, each from 0 to {MAX_BORDER}")
        if not any(request.expand):
            raise UsageError("expand is 0,0,0,0, which adds nothing: leave it out")
        if request.strength == 0:
            raise UsageError("strength 0 draws nothing, but expand adds what has to be drawn: leave one of them out")


def _strength(request: Request) -> float:
    if request.strength is not None:
        return request.strength
    return 1.0 if request.mask is not None or request.expand is not None else STRENGTH


def _size(
    request: Request,
    image: Image.Image | None,
    references: tuple[Image.Image, ...],
    fitted: tuple[Image.Image, ...],
    multiple: int,
    defaults: Mapping[str, int],
    warn: Callable[[str], None],
) -> tuple[int, int]:
    width, height = request.width, request.height
    if request.size is not None:
        if (width, height) != (None, None):
            raise UsageError("size input is the size of the input picture: leave it out, or width and height (-W, -H)")
        if image is None and not references:
            raise UsageError("size input is the size of the input picture, but there is none: give one")
        return own_size((image or references[0]).size, multiple, warn)
    if image is not None and request.strength == 0 and (width, height) in ((None, None), image.size):
        return image.size  # nothing is drawn, so any size will do: the input comes back as it is
    model = image or (references[0] if references else None)
    if model is None or (width is not None and height is not None):
        return asked_size(width, height, multiple, defaults, warn)
    if width is not None or height is not None:
        return size_by_ratio(width, height, model.size, multiple, warn)
    if image is not None and request.mask_crop is not None:
        return cropped_size(image.size, multiple)
    if image is not None:
        return painted_size(image.size, multiple, warn)
    return edited_size(model.size, fitted[0].size, multiple, warn)


def _steps(request: Request, is_distilled: bool) -> int:
    if (request.schedule == "custom") != (request.sigmas is not None):
        raise UsageError("a custom schedule and sigmas go together: give both or neither")
    if request.sigmas is not None:
        steps = len(custom_sigmas(request.sigmas)) - 1
        if request.steps not in (None, steps):
            raise UsageError(f"steps is {request.steps}, but the custom sigmas make {steps}: leave steps out")
        return steps
    return FIELD["steps"].default_for(is_distilled) if request.steps is None else request.steps


def _guidance(request: Request, is_distilled: bool, warn: Callable[[str], None]) -> float:
    scale = request.guidance_scale
    if not is_distilled:
        return FIELD["guidance_scale"].default_for(is_distilled) if scale is None else scale
    if scale not in (None, 1):
        warn(f"guidance scale {scale:g} on a model that was distilled to need none: each step takes twice the time")
    elif request.negative_prompt:
        warn("the negative prompt is ignored: this model needs a guidance scale above 1 (-g) to follow one")
    return FIELD["guidance_scale"].default_for(is_distilled) if scale is None else scale
