"""WebGPU: any GPU with a driver for Vulkan, Metal or DirectX 12."""

from fluxonnx.runtime.providers.description import Traits

WEBGPU = Traits(
    "onnxruntime-webgpu",
    # com.microsoft's MultiHeadAttention is silently wrong on a software adapter, by 0.11 to 0.24.
    flavour="portable",
    plugin="onnxruntime-ep-webgpu",
    lacking=("bf16",),
    needs="a GPU with a driver for Vulkan, Metal or DirectX 12",
    limits=(
        "Graphs of the flavour ort were silently wrong on a software adapter: it gets portable ones.",
        "It has no bfloat16: builds of bf16, int8 and int4 with such tensors leave nodes to the CPU.",
    ),
)
