"""Everything fluxonnx raises on purpose: one line that says what is wrong and what to do."""


class FluxonnxError(Exception):
    """Base of all errors fluxonnx raises; the message is one line meant for a person."""


class UsageError(FluxonnxError, ValueError):
    """An argument has a value that can never work (the command line exits with 2)."""


class CheckpointError(FluxonnxError):
    """A model directory is incomplete, corrupt, or of a kind fluxonnx does not know."""


class ExportError(FluxonnxError):
    """Graphs could not be written."""


class ImageError(FluxonnxError):
    """An image file could not be read or written."""


class Cancelled(FluxonnxError):
    """A callback asked for the run to stop."""
