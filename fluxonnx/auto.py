"""`--precision auto`: the precision and the provider that suit the model and the machine, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.machine import available_memory, has_exact_int8_dot
from fluxonnx.runtime.memory import SMALL, int8_bytes
from fluxonnx.runtime.providers import CPU, OPENBLAS, available, traits, works

# Providers that are chosen unasked where they work. Others may be slower than the CPU.
FASTER_THAN_CPU = ("cuda",)


@dataclass(frozen=True)
class Choice:
    """A precision, a provider, and the reason in half a sentence."""

    precision: str
    provider: str
    reason: str

    def __str__(self) -> str:
        return f"Precision {self.precision}, provider {self.provider}: {self.reason}"


@dataclass(frozen=True)
class Surroundings:
    """What the choice depends on besides the model.

    Attributes:
        memory: Bytes of free memory.
        exact_int8_dot: See `machine.has_exact_int8_dot`.
        providers: The providers of the installed onnxruntime.
        works: Whether one of them can be started.
    """

    memory: int
    exact_int8_dot: bool
    providers: tuple[str, ...]
    works: Callable[[str], bool]


def surroundings() -> Surroundings:
    """Return the surroundings on this machine."""
    return Surroundings(available_memory(), has_exact_int8_dot(), tuple(available()), works)


def choose(checkpoint: Checkpoint, provider: str | None = None) -> Choice:
    """Choose a precision for a checkpoint on this machine, and a provider unless that is given.

    Raises:
        CheckpointError: The transformer's weights are missing or corrupt.
    """
    tensors = checkpoint.tensors("transformer").values()
    weights = sum(tensor.nbytes for tensor in tensors)
    return choose_for(weights, any(tensor.quantisation for tensor in tensors), provider, surroundings())


def choose_for(weights: int, quantised: bool, provider: str | None, here: Surroundings) -> Choice:
    """Choose a precision, and a provider unless that is given.

    On CPUs int8 is the fastest as long as its weights stay in memory; int4 is for less memory than that.

    Args:
        weights: Bytes of the transformer's weights.
        quantised: Whether they are 8-bit integers.
        provider: The provider to run on.
        here: The machine.
    """
    if quantised:
        return Choice("int8", provider or CPU, "the transformer's weights are 8-bit integers already")
    if weights < SMALL:
        reason = f"the transformer's {weights / 1e6:.0f} MB of weights cost nothing as they are"
        return Choice("bf16", provider or CPU, reason)
    if provider is None:
        provider = next((name for name in FASTER_THAN_CPU if name in here.providers and here.works(name)), CPU)
    if provider == OPENBLAS:
        return Choice("bf16", provider, "BLAS multiplies in float32, so integers would be no faster")
    if precision := traits(provider).precision:
        return Choice(precision, provider, f"{provider} computes faster in 16 bits than in 32")
    needed = int8_bytes(weights)
    if here.memory < needed:
        reason = f"{here.memory / 1e9:.1f} GB of memory are free, int8 would need {needed / 1e9:.1f} GB"
        return Choice("int4", provider, reason)
    how = "has exact 8-bit dot products" if here.exact_int8_dot else "lacks VNNI, but 8-bit products are faster still"
    return Choice("int8", provider, f"{here.memory / 1e9:.1f} GB of memory are free, and this CPU {how}")
