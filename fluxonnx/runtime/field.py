"""What one value that steers a picture may be, and the check of it.

The module imports nothing heavy, because `fluxonnx --help` needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from fluxonnx.errors import UsageError

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
    bool: (bool, "boolean"),
}

# Where a value can be given besides a flag: an attribute of `Request`, a line of a prompt file, the metadata of the
# picture that --from names.
Place = Literal["request", "prompt file", "picture"]


@dataclass(frozen=True, kw_only=True)
class Field:
    """One value that steers a picture.

    Attributes:
        name: The attribute of `Request`, the key in prompt files and the key in the metadata of a picture.
        kind: str, int, float, bool or Path, which files hold as a string.
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
        return isinstance(value, KINDS[self.kind][0]) and isinstance(value, bool) == (self.kind is bool)

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
