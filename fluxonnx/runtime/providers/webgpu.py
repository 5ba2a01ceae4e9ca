"""WebGPU: any GPU with a driver for Vulkan, Metal or DirectX 12."""

from fluxonnx.runtime.providers.description import Traits

WEBGPU = Traits(
    "onnxruntime-webgpu",
    # com.microsoft's MultiHeadAttention is silently wrong on a software adapter, by 0.11 to 0.24.
    flavour="portable",
    plugin="onnxruntime-ep-webgpu",
    # Source: onnxruntime/core/providers/webgpu/webgpu_provider_options.h.
    options={
        "preferredLayout": ("NCHW", "NHWC"),
        "enableGraphCapture": ("0", "1"),
        "dawnBackendType": ("D3D12", "Vulkan"),
        "powerPreference": ("high-performance", "low-power"),
        "deviceId": (),
        "validationMode": ("disabled", "wgpuOnly", "basic", "full"),
        "preserveDevice": ("0", "1"),
        "forceCpuNodeNames": (),
        "maxStorageBufferBindingSize": (),
        **dict.fromkeys(
            (
                "storageBufferCacheMode",
                "uniformBufferCacheMode",
                "queryResolveBufferCacheMode",
                "defaultBufferCacheMode",
            ),
            ("disabled", "lazyRelease", "simple", "bucket"),
        ),
    },
    lacking=("bf16", "bf16-native"),
    needs="a GPU with a driver for Vulkan, Metal or DirectX 12",
    limits=(
        "Graphs of the flavour ort were silently wrong on a software adapter: it gets portable ones.",
        "It has no bfloat16: builds of bf16, int8 and int4 with such tensors leave nodes to the CPU.",
    ),
)
