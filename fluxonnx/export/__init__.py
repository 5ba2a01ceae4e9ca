"""The exporter: a checkpoint in, graphs out."""

from fluxonnx.export.exporter import Report, export

__all__ = ["Report", "export"]
