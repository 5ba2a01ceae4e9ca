"""Precisions: how a weight is stored and how a linear layer is computed; nothing else in the package knows.

A new precision is a file with a subclass of `Precision`, and an entry in `PRECISIONS`.
"""

from __future__ import annotations

from fluxonnx.errors import UsageError
from fluxonnx.export.precisions.bf16 import Precision, Prepared
from fluxonnx.export.precisions.fp16 import Float16
from fluxonnx.export.precisions.fp32 import Float32
from fluxonnx.export.precisions.int4 import Int4
from fluxonnx.export.precisions.int8 import Int8
from fluxonnx.export.precisions.native import NativeBfloat16
from fluxonnx.export.precisions.quantised import Quantised

__all__ = [
    "PRECISIONS",
    "Float16",
    "Float32",
    "Int4",
    "Int8",
    "NativeBfloat16",
    "Precision",
    "Prepared",
    "Quantised",
    "make_precision",
]

PRECISIONS: dict[str, type[Precision]] = {
    cls.name: cls for cls in (Precision, Float32, Float16, NativeBfloat16, Int8, Int4)
}


def make_precision(name: str, keep: str | None = None, block: int | None = None, rotate: bool = False) -> Precision:
    """Return a precision by its name.

    Raises:
        UsageError: The name is unknown, or this precision does not have one of the options.
    """
    if name not in PRECISIONS:
        raise UsageError(f"precision {name!r} is unknown: choose one of {', '.join(PRECISIONS)}")
    kind = PRECISIONS[name]
    if keep is not None and not issubclass(kind, Quantised):
        raise UsageError(f"--keep is for int8 and int4, but the precision is {name}")
    if block is not None and kind is not Int4:
        raise UsageError(f"--block is for int4, but the precision is {name}")
    if rotate and kind is not Int8:
        raise UsageError(f"--rotate is for int8, but the precision is {name}")
    if kind is Int4:
        return Int4(keep, *([] if block is None else [block]))
    return Int8(keep, rotate) if kind is Int8 else kind()
