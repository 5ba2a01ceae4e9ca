"""`--precision auto`: which precision and which provider suit the model and the machine, and why."""

from __future__ import annotations

from dataclasses import dataclass

from fluxonnx.checkpoint import Checkpoint
from fluxonnx.machine import adds_int8_products_exactly, available_memory
from fluxonnx.runtime.providers import CPU, available, traits, works
from fluxonnx.single_file import transformer_tensors

# Below this a transformer's weights cost neither time nor memory worth saving.
SMALL = 500e6
# What a run needs besides the transformer's weights, up to 512x512 (measured on the 4B model).
WORKING_MEMORY = 1.5e9
# int8 weights against the checkpoint's 16-bit ones, with the layers that are kept.
INT8_SHARE = 0.55
# Taken unasked where they work. Others may be slower than the CPU: they are for who asks for them.
FASTER_THAN_CPU = ("cuda",)


@dataclass(frozen=True)
class Choice:
    """A precision and a provider, and why, half a sentence."""

    precision: str
    provider: str
    reason: str

    def __str__(self) -> str:
        return f"Precision {self.precision}, provider {self.provider}: {self.reason}"


def choose(checkpoint: Checkpoint, provider: str | None = None, memory: int | None = None) -> Choice:
    """Choose a precision for a checkpoint, and a provider unless that is given.

    On CPUs int8 is the fastest as long as its weights stay in memory; int4 is for less memory than that.

    Args:
        checkpoint: The model.
        provider: What it is to run on.
        memory: Bytes of memory that can be had; by default what this machine has now.

    Raises:
        CheckpointError: The transformer's weights are missing or corrupt.
    """
    tensors = transformer_tensors(checkpoint).values()
    weights = sum(tensor.nbytes for tensor in tensors)
    if any(tensor.quantisation for tensor in tensors):
        return Choice("int8", provider or CPU, "the transformer's weights are 8-bit integers already")
    if weights < SMALL:
        reason = f"the transformer's {weights / 1e6:.0f} MB of weights cost nothing as they are"
        return Choice("bf16", provider or CPU, reason)
    if provider is None:
        provider = next((name for name in FASTER_THAN_CPU if name in available() and works(name)), CPU)
    if precision := traits(provider).precision:
        return Choice(precision, provider, f"{provider} computes faster in 16 bits than in 32")
    free = available_memory() if memory is None else memory
    needed = weights * INT8_SHARE + WORKING_MEMORY
    if free < needed:
        reason = f"{free / 1e9:.1f} GB of memory are free, int8 would need {needed / 1e9:.1f} GB"
        return Choice("int4", provider, reason)
    how = "has 8-bit products" if adds_int8_products_exactly() else "lacks VNNI, but 8-bit products are faster still"
    return Choice("int8", provider, f"{free / 1e9:.1f} GB of memory are free, and this CPU {how}")
