"""The values that steer a picture, each described once.

The flags of `generate`, the keys of prompt files, the metadata of pictures and the checks of a request follow this
table. The module imports nothing heavy, because `fluxonnx --help` needs it.
"""

from __future__ import annotations

from argparse import ArgumentTypeError, BooleanOptionalAction
from pathlib import Path

from fluxonnx.runtime.field import Field

# What can be drawn: at most 4 megapixels (FLUX.2 Technical Specifications, help.bfl.ai).
MIN_SIDE, MAX_SIDE = 64, 4096
MAX_AREA = 2048 * 2048
# The side to which large input pictures are fitted, and the largest of which noise is sampled that has the same
# composition at all sizes (FLUX_VAE_MAX_DIM, antirez/flux2.c).
FITTED_SIDE = 1792
MAX_REFERENCES = 16
# The longest prompt of the reference pipeline (tokenizer_max_length, diffusers pipeline_flux2_klein.py).
MAX_TOKENS = 512
STRENGTH = 0.75
# The most pixels that --expand adds at a side.
MAX_BORDER = 4096
# How many pixels around the mask --mask-crop alone takes in.
CROP_PAD = 32


def four_numbers(text: str) -> list[int]:
    """Parse --expand."""
    try:
        left, top, right, bottom = (int(part) for part in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text[:40]!r} is not four numbers of pixels, such as 64,0,64,0") from None
    return [left, top, right, bottom]


CANNOT_DRAW = "{name} {value} can't be drawn: it must be {range}, the nearest is {nearest}"

FIELDS = (
    Field(
        name="prompt",
        kind=str,
        flags=("-p", "--prompt"),
        group="prompt",
        metavar="TEXT",
        help="what to draw",
    ),
    Field(
        name="negative_prompt",
        kind=str,
        default="",
        flags=("--negative-prompt",),
        group="prompt",
        metavar="TEXT",
        help="what guidance leads away from (base models, others with -g above 1)",
        matters=lambda request: request.guided,
    ),
    Field(
        name="max_sequence_length",
        kind=int,
        places=("request", "picture"),
        default=MAX_TOKENS,
        model_default=True,
        low=8,
        high=MAX_TOKENS,
        multiple=8,
        flags=("--max-sequence-length",),
        group="prompt",
        metavar="N",
        help="pad or cut prompts to N tokens, a multiple of {multiple} up to {high} (default: {default})",
    ),
    Field(
        name="output",
        kind=Path,
        places=("prompt file",),
        default=Path("out.png"),
        flags=("-o", "--output"),
        group="picture",
        metavar="FILE",
        help=".png, .jpg, .webp or .ppm (default: {default})",
    ),
    Field(
        name="width",
        kind=int,
        default=256,
        model_default=True,
        low=MIN_SIDE,
        high=MAX_SIDE,
        whole_tokens=True,
        complaint=CANNOT_DRAW,
        flags=("-W", "--width"),
        group="picture",
        metavar="PX",
        help="default: the width of the input picture, else {default}; -W or -H alone keeps the ratio",
    ),
    Field(
        name="height",
        kind=int,
        default=256,
        model_default=True,
        low=MIN_SIDE,
        high=MAX_SIDE,
        whole_tokens=True,
        complaint=CANNOT_DRAW,
        flags=("-H", "--height"),
        group="picture",
        metavar="PX",
        help="likewise; both have to be multiples of 16",
    ),
    Field(
        name="size",
        kind=str,
        places=("request", "prompt file"),
        choices=("input",),
        flags=("--size",),
        group="picture",
        metavar="input",
        help="input: the size of the first input picture, also where it is looked at in a smaller one",
        matters=lambda request: False,
    ),
    Field(
        name="seed",
        kind=int,
        places=("prompt file", "picture"),
        low=0,
        high=2**64 - 1,
        flags=("-S", "--seed"),
        group="picture",
        metavar="N",
        help="several seeds make several pictures (default: a random seed)",
        flag_options={"nargs": "+"},
    ),
    Field(
        name="count",
        kind=int,
        places=(),
        default=1,
        low=1,
        high=1000,
        flags=("-n", "--count"),
        group="picture",
        metavar="N",
        help="make N pictures with the seeds S, S+1, ..., in numbered files",
    ),
    Field(
        name="input",
        kind=Path,
        many=True,
        places=("prompt file",),
        flags=("-i", "--input"),
        group="input",
        metavar="FILE",
        help="the picture to edit or paint over",
        flag_options={"action": "append", "default": []},
    ),
    Field(
        name="strength",
        kind=float,
        default=STRENGTH,
        low=0,
        high=1,
        low_note="(the input as it is)",
        high_note="(all new)",
        flags=("-t", "--strength"),
        group="input",
        metavar="X",
        help="paint over the input: 0 keeps it, 1 keeps only its size, 0.7 changes the style (-t alone: {default})",
        flag_options={"nargs": "?", "const": STRENGTH},
        matters=lambda request: request.image is not None,
    ),
    Field(
        name="mask",
        kind=Path,
        places=("prompt file",),
        flags=("--mask",),
        group="input",
        metavar="FILE",
        help="repaint only the white part of this mask of the input, in all steps unless -t says otherwise",
    ),
    Field(
        name="mask_blur",
        kind=float,
        default=0.0,
        low=0,
        high=256,
        low_note="(a sharp edge)",
        flags=("--mask-blur",),
        group="input",
        metavar="PX",
        help="soften the edge of the mask by this radius (default: {default:g})",
        matters=lambda request: request.canvas is not None,
    ),
    Field(
        name="mask_crop",
        kind=int,
        low=0,
        high=4096,
        flags=("--mask-crop",),
        group="input",
        metavar="PX",
        help="draw only the mask's neighbourhood, PX pixels around it (alone: {flag_options[const]}), at the full size "
        "of -W and -H; the result has the input's size",
        flag_options={"nargs": "?", "const": CROP_PAD},
        matters=lambda request: request.mask_crop is not None,
    ),
    Field(
        name="keep_unmasked",
        kind=bool,
        default=True,
        flags=("--keep-unmasked",),
        group="input",
        help="keep every pixel outside of the mask as it is (default), or show all of the drawn picture",
        flag_options={"action": BooleanOptionalAction},
        matters=lambda request: request.canvas is not None,
    ),
    Field(
        name="expand",
        kind=int,
        many=True,
        flags=("--expand",),
        group="input",
        metavar="L,T,R,B",
        help="outpaint: add so many pixels at the left, top, right and bottom of the input, and draw them",
        flag_options={"type": four_numbers},
        matters=lambda request: request.expand is not None,
    ),
    Field(
        name="reference",
        kind=Path,
        many=True,
        places=("prompt file",),
        flags=("-r", "--reference"),
        group="input",
        metavar="FILE",
        help=f"a picture to look at; up to {MAX_REFERENCES}, also together with -i and -t",
        flag_options={"action": "append", "default": []},
    ),
    Field(
        name="reference_area",
        kind=float,
        default=1.0,
        low=0.0625,
        high=4,
        flags=("--reference-area",),
        group="input",
        metavar="MP",
        help="scale pictures to look at down to so many times 1024x1024 pixels (default: {default:g}, as diffusers; "
        "the original code takes 3.9 for a single picture)",
        matters=lambda request: bool(request.references),
    ),
    Field(
        name="kv",
        kind=bool,
        default=False,
        flags=("--kv",),
        group="input",
        help="look at references once instead of in each step, which is faster: for models made for it, such as "
        "FLUX.2-klein-9b-kv (their default)",
        flag_options={"action": BooleanOptionalAction},
        matters=lambda request: request.looks_at_pictures,
    ),
    Field(
        name="steps",
        kind=int,
        default=4,
        base_default=50,
        low=1,
        high=1000,
        flags=("-s", "--steps"),
        group="sampling",
        metavar="N",
        help="default: {default}, or {base_default} with a base model",
    ),
    Field(
        name="guidance_scale",
        kind=float,
        default=1.0,
        base_default=4.0,
        low=1,
        high=100,
        low_note="(off)",
        flags=("-g", "--guidance"),
        group="sampling",
        metavar="X",
        help="guidance scale, 1 turns it off (default: {default:g}, or {base_default:g} with a base model)",
    ),
    Field(
        name="step_cache",
        kind=int,
        default=1,
        low=1,
        high=10,
        low_note="(off)",
        flags=("--step-cache",),
        group="sampling",
        metavar="N",
        help="call the model in every N-th step only (base models, 50 steps): 2 halves the time and changes little",
        matters=lambda request: request.step_cache != 1,
    ),
    Field(
        name="sampler",
        kind=str,
        default="euler",
        choices=("euler", "heun", "dpmpp-2m"),
        flags=("--sampler",),
        group="sampling",
        metavar="NAME",
        help="euler (default), heun or dpmpp-2m",
    ),
    Field(
        name="schedule",
        kind=str,
        default="flow",
        choices=("flow", "linear", "power", "custom"),
        flags=("--schedule",),
        group="sampling",
        metavar="NAME",
        help="flow (default), linear, power or custom",
    ),
    Field(
        name="sigmas",
        kind=float,
        many=True,
        places=("request", "picture"),
        flags=("--sigmas",),
        group="sampling",
        metavar="X",
        help="the noise levels of a custom schedule, falling from 1",
        flag_options={"nargs": "+"},
        matters=lambda request: request.schedule == "custom",
    ),
    Field(
        name="power_alpha",
        kind=float,
        default=2.0,
        above=0,
        flags=("--power-alpha",),
        group="sampling",
        metavar="X",
        help="the exponent of the power schedule (default: {default:g})",
        matters=lambda request: request.schedule == "power",
    ),
    Field(
        name="noise",
        kind=str,
        default="torch",
        choices=("torch", "size-independent", "flux2c"),
        flags=("--noise",),
        group="sampling",
        metavar="KIND",
        help="torch (default), size-independent: the same composition at all sizes, or flux2c: the pictures of flux2.c",
    ),
    Field(
        name="tile",
        kind=int,
        places=("request", "picture"),
        low=384,
        whole_tokens=True,
        matters=lambda request: request.tile is not None,
    ),
    # What the metadata of a picture says about its input pictures and about the model.
    Field(name="image_file", kind=str, places=("picture",)),
    Field(name="image_sha256", kind=str, places=("picture",)),
    Field(name="mask_file", kind=str, places=("picture",)),
    Field(name="mask_sha256", kind=str, places=("picture",)),
    Field(name="reference_files", kind=str, many=True, places=("picture",)),
    Field(name="reference_sha256", kind=str, many=True, places=("picture",)),
    Field(name="lora_files", kind=str, many=True, places=("picture",)),
    Field(name="lora_sha256", kind=str, many=True, places=("picture",)),
    Field(name="lora_scales", kind=float, many=True, places=("picture",)),
    Field(name="model", kind=str, places=("picture",)),
    Field(name="precision", kind=str, places=("picture",)),
    Field(name="text_encoder_precision", kind=str, places=("picture",)),
    Field(name="flavour", kind=str, places=("picture",)),
    Field(name="provider", kind=str, places=("picture",)),
)

FIELD = {item.name: item for item in FIELDS}
