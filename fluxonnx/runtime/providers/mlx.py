"""MLX: the GPU of an Apple Silicon Mac."""

from fluxonnx.runtime.providers.description import Traits

MLX = Traits("onnxruntime-ep-mlx", plugin="onnxruntime-ep-mlx", needs="macOS on Apple Silicon")
