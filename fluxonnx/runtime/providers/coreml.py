"""CoreML: the GPU and the Neural Engine of a Mac."""

from fluxonnx.runtime.providers.description import Traits

COREML = Traits(
    "onnxruntime",
    # The default, an older format, supports neither float16 nor most of the operators.
    settings={"ModelFormat": "MLProgram"},
    # Source: onnxruntime/core/providers/coreml/coreml_options.cc, and its page of onnxruntime.ai.
    options={
        "MLComputeUnits": ("ALL", "CPUAndGPU", "CPUAndNeuralEngine", "CPUOnly"),
        "ModelFormat": ("MLProgram", "NeuralNetwork"),
        "RequireStaticInputShapes": ("0", "1"),
        "EnableOnSubgraphs": ("0", "1"),
        "SpecializationStrategy": ("Default", "FastPrediction"),
        "ProfileComputePlan": ("0", "1"),
        "AllowLowPrecisionAccumulationOnGPU": ("0", "1"),
        "ModelCacheDirectory": (),
    },
    cache="ModelCacheDirectory",
    lacking=("bf16", "bf16-native", "int8", "int4"),
    static_shapes=True,
    needs="macOS",
    limits=(
        "It takes only nodes whose shapes are fixed, of at most 5 dimensions, none of them above 16,384; the rest runs "
        "on the CPU. A static build has such shapes: fluxonnx export --precision fp16 --flavour portable --shape WxH.",
        "It has no bfloat16.",
    ),
)
