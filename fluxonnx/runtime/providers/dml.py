"""DirectML: any GPU, on Windows."""

from fluxonnx.runtime.providers.description import Traits

DML = Traits("onnxruntime-directml", flavour="ort", lacking=("bf16",), needs="Windows and a GPU for DirectX 12")
