"""Very many pictures: tables of prompts in, a folder of pictures and a table out, on one machine or many."""

from fluxonnx.batch.painter import Painter

__all__ = ["Painter"]
