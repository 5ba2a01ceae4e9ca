"""DirectML: any GPU, on Windows."""

from fluxonnx.runtime.providers.description import Traits

DML = Traits(
    "onnxruntime-directml",
    flavour="ort",
    # Source: onnxruntime/core/providers/dml/dml_provider_factory.cc, and the tools around it.
    options={
        "device_id": (),
        "performance_preference": ("default", "high_performance", "minimum_power"),
        "device_filter": ("any", "gpu", "npu"),
        "disable_metacommands": ("true", "false"),
        "enable_graph_capture": ("true", "false"),
        "enable_graph_serialization": ("true", "false"),
    },
    lacking=("bf16", "bf16-native"),
    needs="Windows and a GPU for DirectX 12",
)
