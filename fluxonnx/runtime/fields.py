"""The values that steer a picture, each described once.

The flags of `generate`, the keys of prompt files, the metadata of pictures and the checks of a request follow this
table. The module imports nothing heavy, because `fluxonnx --help` needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from fluxonnx.errors import UsageError

# The sides that the model can draw (FLUX_VAE_MAX_DIM, antirez/flux2.c).
MIN_SIDE, MAX_SIDE = 64, 1792
MAX_REFERENCES = 10
# The longest prompt of the reference pipeline (tokenizer_max_length, diffusers pipeline_flux2_klein.py).
MAX_TOKENS = 512
STRENGTH = 0.75
# Longer integers are not printed.
MOST_BITS = 128
# Longer values are cut in messages.
MOST_CHARACTERS = 200

# What a value may be, and its name in messages. The abstract classes include numpy's numbers.
KINDS: dict[type, tuple[type, str]] = {
    str: (str, "string"),
    Path: (str, "string"),
    int: (Integral, "integer"),
    float: (Real, "number"),
}

# Where a value can be given besides a flag: an attribute of `Request`, a line of a prompt file, the metadata of the
# picture that --from names.
Place = Literal["request", "prompt file", "picture"]


@dataclass(frozen=True, kw_only=True)
class Field:
    """One value that steers a picture.

    Attributes:
        name: The attribute of `Request`, the key in prompt files and the key in the metadata of a picture.
        kind: str, int, float or Path, which files hold as a string.
        many: Whether the value is a list.
        places: Where it can be given besides its flag.
        default: The value if none is given.
        base_default: The same for base models, where it is another one.
        model_default: Whether a model's manifest can set another default.
        low: The least value.
        high: The greatest value.
        low_note: The meaning of the least value.
        high_note: The meaning of the greatest value.
        above: A value that it has to exceed.
        multiple: A number of which it has to be a multiple.
        whole_tokens: Whether it has to be a multiple of the pixels along a side of a latent token.
        choices: The only possible values.
        complaint: The message about a value out of range.
        flags: The flags of `generate`; empty if there is none.
        group: The group of flags that they belong to.
        metavar: The name of the value in the help.
        help: The text in the help; {name} stands for an attribute of the field.
        flag_options: Further arguments of `ArgumentParser.add_argument`.
        matters: Whether the value has an effect on a picture, given the `ResolvedRequest`: a picture's metadata leaves
            out values that have none.
    """

    name: str
    kind: type[Any]
    many: bool = False
    places: tuple[Place, ...] = ("request", "prompt file", "picture")
    default: Any = None
    base_default: Any = None
    model_default: bool = False
    low: float | None = None
    high: float | None = None
    low_note: str = ""
    high_note: str = ""
    above: float | None = None
    multiple: int | None = None
    whole_tokens: bool = False
    choices: tuple[str, ...] = ()
    complaint: str = "{name} is {value}, but must be {range}"
    flags: tuple[str, ...] = ()
    group: str = ""
    metavar: str = ""
    help: str = ""
    flag_options: Mapping[str, Any] = field(default_factory=dict)
    matters: Callable[[Any], bool] = lambda request: True

    def default_for(self, is_distilled: bool) -> Any:
        """Return the default for a distilled or a base model."""
        return self.default if is_distilled or self.base_default is None else self.base_default

    def type_error(self, value: object) -> str | None:
        """Return what is wrong with the type of a value from Python or from JSON; None if nothing is."""
        noun = KINDS[self.kind][1]
        if self.many:
            expected = f"a list of {noun}s"
            fits = (
                isinstance(value, Iterable)
                and not isinstance(value, (str, Mapping))
                and all(self._is_one(item) for item in value)
            )
        else:
            expected = f"an {noun}" if noun == "integer" else f"a {noun}"
            fits = self._is_one(value)
        return None if fits else f'"{self.name}" is {_short(value)}, expected {expected}'

    def _is_one(self, value: object) -> bool:
        # To Python, a bool is an int.
        return isinstance(value, KINDS[self.kind][0]) and not isinstance(value, bool)

    def check(self, value: Any, pixels_per_token: int = 1) -> None:
        """Check the type, the choices and the range of a value; the items of a list only for their type.

        Raises:
            UsageError: The value is impossible.
        """
        if error := self.type_error(value):
            raise UsageError(error)
        if self.choices and value not in self.choices:
            raise UsageError(f"{self.name} {_short(value)} is unknown: choose one of {', '.join(self.choices)}")
        multiple = pixels_per_token if self.whole_tokens else self.multiple
        # Comparisons with NaN are false, so that NaN is out of every range.
        fits = (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (multiple is None or value % multiple == 0)
        )
        if not fits:
            bounds, nearest = self._range(multiple), self._nearest(value, multiple)
            raise UsageError(self.complaint.format(name=self.name, value=_text(value), range=bounds, nearest=nearest))

    def _range(self, multiple: int | None) -> str:
        low = f"{self.low} {self.low_note}".rstrip()
        high = f"{self.high} {self.high_note}".rstrip()
        parts = [f"a multiple of {multiple}"] if multiple is not None else []
        if self.low is not None and self.high is not None:
            parts.append(f"from {low} to {high}")
        elif self.low is not None:
            parts.append(f"and at least {low}" if parts else f"at least {low}")
        if self.above is not None:
            parts.append(f"above {self.above}")
        return " ".join(parts)

    def _nearest(self, value: float, multiple: int | None) -> float | None:
        if multiple is None or self.low is None or self.high is None:
            return None
        return round(min(max(value, self.low), self.high) / multiple) * multiple


def _text(value: object) -> str:
    """Return a value for a message: Python refuses to print integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        return f"{'-' if value < 0 else ''}2**{value.bit_length() - 1} or so"
    return str(value)


def _short(value: object) -> str:
    """Return the representation of any value for a message of one line."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a list of such integers, or an object of the caller's
        return f"of type {type(value).__name__}"
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


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
        help="what guidance leads away from (base models)",
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
        help="default: the width of the input picture, else {default}",
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
        places=(),
        flags=("-i", "--input"),
        group="input",
        metavar="FILE",
        help="the picture to edit or paint over",
        flag_options={"action": "append", "default": []},
    ),
    Field(
        name="strength",
        kind=float,
        places=("request", "picture"),
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
        name="reference",
        kind=Path,
        many=True,
        places=(),
        flags=("-r", "--reference"),
        group="input",
        metavar="FILE",
        help=f"a picture to look at; up to {MAX_REFERENCES}, also together with -i and -t",
        flag_options={"action": "append", "default": []},
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
        help="guidance scale, 1 turns it off (base models; default: {base_default:g})",
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
