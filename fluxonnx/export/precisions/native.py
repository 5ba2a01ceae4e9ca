"""The checkpoint's weights, and arithmetic in bfloat16 as well: what diffusers does in bfloat16, for GPUs.

The two transformers compute in bfloat16, their residual streams included. Matrix products add in float32, and norms and
softmax compute in it, inside the provider's kernels. The autoencoder stays in float32: no provider convolves in
bfloat16. CPUs have no kernels for such graphs.
"""

from __future__ import annotations

from onnx import TensorProto

from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.contract import KV_COMPONENTS
from fluxonnx.export.precisions.bf16 import NORMS_ON_GPUS, Precision

TRANSFORMERS = ("text_encoder", "transformer", *KV_COMPONENTS)


class NativeBfloat16(Precision):
    """Weights as a bfloat16 checkpoint stores them; other weights are converted to a file of the build."""

    name = "bf16-native"
    autoencoder_opset = NORMS_ON_GPUS
    bands = False
    flavours: tuple[str, ...] = ("ort",)

    def arithmetic(self, component: str) -> int:
        """Return bfloat16 for the transformers."""
        return TensorProto.BFLOAT16 if component in TRANSFORMERS else TensorProto.FLOAT

    def stored_dtype(self, tensor: Tensor) -> str:
        """Return BF16, whatever the checkpoint has."""
        return "BF16"

    def cuts(self, tensor: Tensor) -> bool:
        """Whether a slice has to be converted: a file of the build holds whole tensors."""
        return tensor.dtype != "BF16"
