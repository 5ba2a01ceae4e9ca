"""What picture is wanted: every way to steer a run, checked before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from PIL import Image

from fluxonnx.errors import UsageError
from fluxonnx.runtime.images import as_rgb, fit_reference
from fluxonnx.runtime.sampler import SOLVERS
from fluxonnx.runtime.schedule import SCHEDULES, custom_sigmas
from fluxonnx.runtime.text import MAX_LENGTH
from fluxonnx.runtime.tiles import SMALLEST

# The sides that the model can draw (FLUX_VAE_MAX_DIM, antirez/flux2.c).
MIN_SIDE, MAX_SIDE = 64, 1792
# What a model is asked for when nobody says; a manifest's "defaults" override it.
DEFAULTS = {"width": 256, "height": 256, "max_sequence_length": MAX_LENGTH}

# The reference pipeline's defaults, for distilled and base models.
DISTILLED_STEPS, BASE_STEPS = 4, 50
BASE_GUIDANCE = 4.0

MAX_STEPS = 1000
MAX_REFERENCES = 10
NOISES = ("torch", "size-independent")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides what a picture looks like, but for the seed and the model.

    Attributes:
        prompt: What to draw.
        width: In pixels, a multiple of 16 from 64 to 1792; None for the size of `image`, else of the first reference,
            else the model's own, which is 256 unless its manifest says otherwise.
        height: Likewise.
        steps: Denoising steps; None for 4, or 50 with a base model.
        guidance_scale: How much more than the negative prompt the prompt counts, at least 1, which turns it off; None
            for 4. Distilled models ignore it.
        negative_prompt: What guidance leads away from.
        image: The picture to start from.
        strength: How much of `image` is noised away, in [0, 1]; see `schedule.start_step`.
        references: Pictures to look at while drawing, at most 10.
        schedule: "flow" (as the model was made), "linear", "power" or "custom".
        sigmas: The noise levels of a custom schedule.
        power_alpha: Exponent of the power schedule.
        sampler: "euler", "heun" or "dpmpp-2m".
        noise: "torch" (as diffusers draws it) or "size-independent" (alike at all sizes).
        max_sequence_length: To how many tokens a prompt is padded or cut: a multiple of 8 up to 512; None for the
            model's own, which is 512 unless its manifest says otherwise.
        tile: The side in pixels of the tiles in which larger pictures are encoded and decoded, which costs a little
            exactness, at least 384; None for 576 if memory is short, else whole pictures.
    """

    prompt: str
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = ""
    image: Image.Image | None = None
    strength: float = 0.75
    references: tuple[Image.Image, ...] = ()
    schedule: str = "flow"
    sigmas: tuple[float, ...] | None = None
    power_alpha: float = 2.0
    sampler: str = "euler"
    noise: str = "torch"
    max_sequence_length: int | None = None
    tile: int | None = None

    def parameters(self) -> dict[str, Any]:
        """Return what can be written down: all fields that matter, except the pictures."""
        skipped = {"image", "references"}
        if self.schedule != "custom":
            skipped.add("sigmas")
        if self.schedule != "power":
            skipped.add("power_alpha")
        if self.image is None:
            skipped.add("strength")
        if self.tile is None:
            skipped.add("tile")
        if self.guidance_scale == 1:
            skipped.add("negative_prompt")
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in skipped}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def guided(self) -> bool:
        """Whether each step takes a second, unconditional pass."""
        return self.guidance_scale != 1


def resolve(request: Request, is_distilled: bool, multiple: int, defaults: Mapping[str, int] = DEFAULTS) -> Request:
    """Fill in defaults, prepare the pictures, and refuse what can't be.

    Args:
        request: What is wanted.
        is_distilled: Whether the model needs no guidance.
        multiple: What sides must be multiples of.
        defaults: The model's width, height and max_sequence_length.

    Returns:
        A request without None in `width`, `height`, `steps`, `guidance_scale` and `max_sequence_length`, whose pictures
        are RGB and, the references, of the size in which they are encoded.

    Raises:
        UsageError: A value is out of its range, or two contradict each other.
    """
    if not request.prompt.strip():
        raise UsageError("the prompt is empty: say what to draw")
    image = as_rgb(request.image) if request.image is not None else None
    if len(request.references) > MAX_REFERENCES:
        raise UsageError(f"{len(request.references)} reference images are too many: {MAX_REFERENCES} at most")
    references = tuple(fit_reference(as_rgb(reference), multiple) for reference in request.references)
    if not 0 <= request.strength <= 1:
        raise UsageError(f"strength is {request.strength}, but must be from 0 (the input as it is) to 1 (all new)")
    width, height = _size(request, image, references, multiple, defaults)
    steps = _steps(request, is_distilled)
    for name, value, known in (
        ("sampler", request.sampler, tuple(SOLVERS)),
        ("noise", request.noise, NOISES),
    ):
        if value not in known:
            raise UsageError(f"{name} {value!r} is unknown: choose one of {', '.join(known)}")
    if request.tile is not None and (request.tile < SMALLEST or request.tile % multiple):
        raise UsageError(f"tile is {request.tile}, but must be a multiple of {multiple} and at least {SMALLEST}")
    guidance = _guidance(request, is_distilled)
    return replace(
        request,
        width=width,
        height=height,
        steps=steps,
        guidance_scale=guidance,
        image=image,
        references=references,
        max_sequence_length=request.max_sequence_length or defaults["max_sequence_length"],
    )


def _size(
    request: Request,
    image: Image.Image | None,
    references: tuple[Image.Image, ...],
    multiple: int,
    defaults: Mapping[str, int],
) -> tuple[int, int]:
    if image is not None and request.strength == 0 and request.width is None and request.height is None:
        return image.size  # nothing is drawn, so any size will do: the input comes back as it is
    model = image or (references[0] if references else None)
    width, height = model.size if model else (defaults["width"], defaults["height"])
    width = width // multiple * multiple if request.width is None else request.width
    height = height // multiple * multiple if request.height is None else request.height
    for name, side in (("width", width), ("height", height)):
        if not MIN_SIDE <= side <= MAX_SIDE or side % multiple:
            nearest = min(max(round(side / multiple) * multiple, MIN_SIDE), MAX_SIDE)
            raise UsageError(
                f"{name} {side} can't be drawn: sides are multiples of {multiple} from {MIN_SIDE} to {MAX_SIDE}, "
                f"the nearest is {nearest}"
            )
    return width, height


def _steps(request: Request, is_distilled: bool) -> int:
    if request.schedule not in SCHEDULES:
        raise UsageError(f"schedule {request.schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}")
    if not request.power_alpha > 0:
        raise UsageError(f"power_alpha is {request.power_alpha}, but must be above 0")
    if (request.schedule == "custom") != (request.sigmas is not None):
        raise UsageError("a custom schedule and sigmas go together: give both or neither")
    if request.sigmas is not None:
        steps = len(custom_sigmas(request.sigmas)) - 1
        if request.steps not in (None, steps):
            raise UsageError(f"steps is {request.steps}, but the custom sigmas make {steps}: leave steps out")
        return steps
    steps = (DISTILLED_STEPS if is_distilled else BASE_STEPS) if request.steps is None else request.steps
    if not 1 <= steps <= MAX_STEPS:
        raise UsageError(f"steps is {steps}, but must be from 1 to {MAX_STEPS}")
    return steps


def _guidance(request: Request, is_distilled: bool) -> float:
    scale = request.guidance_scale
    if scale is not None and not 1 <= scale <= 100:
        raise UsageError(f"guidance_scale is {scale}, but must be from 1 (off) to 100")
    if not is_distilled:
        return BASE_GUIDANCE if scale is None else scale
    if scale not in (None, 1):
        warnings.warn(f"guidance scale {scale:g} is ignored: this model was distilled to need none", stacklevel=4)
    elif request.negative_prompt:
        warnings.warn("the negative prompt is ignored: this model was distilled to need no guidance", stacklevel=4)
    return 1.0
