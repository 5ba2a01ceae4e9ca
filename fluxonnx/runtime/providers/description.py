"""What is known of an execution provider."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

CPU = "cpu"
OPENBLAS = "openblas"


def _nothing() -> None:
    """Prepare nothing."""


def _no_settings(threads: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Traits:
    """What suits a provider, and what is known of it.

    Attributes:
        package: The wheel that contains it, to be installed in place of onnxruntime.
        precision: The precision that it is fastest with; None for that of the checkpoint's weights.
        flavour: The flavour whose graphs it runs right and without leaving nodes to the CPU.
        settings: Its own options, as onnxruntime's documentation names them.
        options: The options that may be given besides, with the values of each; no values for one that takes any. None
            where they are not known here: then they are passed on as they are.
        cache: An option that names a folder for graphs that it has compiled; "" if it has none.
        plugin: The package of a plugin that contains it, to be installed beside onnxruntime; "" if there is none.
        lacking: Precisions whose number formats it has no kernels for.
        needs: What a machine has to have.
        static_shapes: Whether it takes only graphs whose shapes are fixed.
        limits: What it can't do, or does wrong, a sentence each.
        tested: Where its pictures were compared with those of the CPU; "" if nowhere.
        device: The name of its memory, as OrtValue knows it, if inputs that stay the same can stay there; else "".
        thread_settings: Options for a number of threads per operator, if it ignores the session's own setting.
        prepare: Called before a session is made.
    """

    package: str
    precision: str | None = "fp16"
    flavour: str = "portable"
    settings: dict[str, Any] = field(default_factory=dict)
    options: Mapping[str, tuple[str, ...]] | None = None
    cache: str = ""
    plugin: str = ""
    lacking: tuple[str, ...] = ("bf16-native",)
    needs: str = ""
    static_shapes: bool = False
    limits: tuple[str, ...] = ()
    tested: str = ""
    device: str = ""
    thread_settings: Callable[[int], dict[str, Any]] = _no_settings
    prepare: Callable[[], None] = _nothing
