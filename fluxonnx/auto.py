"""`--precision auto`: which precision suits the model and the machine, and why."""

from __future__ import annotations

from fluxonnx.checkpoint import Checkpoint
from fluxonnx.machine import adds_int8_products_exactly, available_memory
from fluxonnx.single_file import transformer_tensors

# Below this a transformer's weights cost neither time nor memory worth saving.
SMALL = 500e6
# What a run needs besides the transformer's weights, up to 512x512 (measured on the 4B model).
WORKING_MEMORY = 1.5e9
# int8 weights against the checkpoint's 16-bit ones, with the layers that are kept.
INT8_SHARE = 0.55


def choose(checkpoint: Checkpoint, available: int | None = None) -> tuple[str, str]:
    """Choose a precision for a checkpoint.

    int8 is the fastest on CPUs as long as its weights stay in memory; int4 is for less memory than that.

    Args:
        checkpoint: The model.
        available: Bytes of memory that can be had; by default what this machine has now.

    Returns:
        The precision and the reason, half a sentence.

    Raises:
        CheckpointError: The transformer's weights are missing or corrupt.
    """
    tensors = transformer_tensors(checkpoint).values()
    if any(tensor.quantisation for tensor in tensors):
        return "int8", "the transformer's weights are 8-bit integers already"
    weights = sum(tensor.nbytes for tensor in tensors)
    if weights < SMALL:
        return "bf16", f"the transformer's {weights / 1e6:.0f} MB of weights cost nothing as they are"
    free = available_memory() if available is None else available
    needed = weights * INT8_SHARE + WORKING_MEMORY
    if free < needed:
        return "int4", f"{free / 1e9:.1f} GB of memory are free, int8 would need {needed / 1e9:.1f} GB"
    how = "has 8-bit products" if adds_int8_products_exactly() else "lacks VNNI, but 8-bit products are faster still"
    return "int8", f"{free / 1e9:.1f} GB of memory are free, and this CPU {how}"
