"""None of onnxruntime's: the package's own engine, on numpy and BLAS."""

from fluxonnx.runtime.providers.description import Traits

OPENBLAS = Traits(
    "fluxonnx[openblas]",
    None,
    "ort",
    limits=("Products are computed in float32: int8 and int4 builds save memory, but no time.",),
    tested="Linux x86-64 with numpy's OpenBLAS, in CI",
)
