"""CoreML: the GPU and the Neural Engine of a Mac."""

from fluxonnx.runtime.providers.description import Traits

COREML = Traits(
    "onnxruntime",
    # The default, an older format, supports neither float16 nor most of the operators.
    settings={"ModelFormat": "MLProgram"},
    lacking=("bf16", "int8", "int4"),
    static_shapes=True,
    needs="macOS",
    limits=(
        "It takes only nodes whose shapes are fixed, of at most 5 dimensions, none of them above 16,384; the rest runs "
        "on the CPU.",
        "It has no bfloat16.",
    ),
)
