"""An engine for ONNX graphs on numpy, whose matrix products are those of a BLAS library; it knows no model."""
