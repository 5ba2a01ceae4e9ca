"""From latents to pictures: whole ones, with the parameters that made them, and previews."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from fluxonnx.contract import unpack
from fluxonnx.runtime.images import sample_to_image
from fluxonnx.runtime.models import Models
from fluxonnx.runtime.phases import Phases
from fluxonnx.runtime.prepare import Prepared
from fluxonnx.runtime.preview import FastPreview, draw_preview, put_back
from fluxonnx.runtime.request import ResolvedRequest
from fluxonnx.runtime.tiles import Tiling

# draw(prepared, latents f32 [1, image_seq, channels], seed, phases)
Draw = Callable[[Prepared, np.ndarray, int, Phases], Image.Image]


class Renderer:
    """Draws pictures of latents; the decoder stays loaded until it is released.

    Attributes:
        previews: How a preview is drawn, by the names of `preview.METHODS`.
    """

    def __init__(self, models: Models, unit: int, facts: Callable[[], dict[str, Any]]) -> None:
        """Load nothing yet.

        Args:
            models: The graphs.
            unit: Pixels along each side of a latent token.
            facts: Returns what a picture says of the model that made it.
        """
        self._models, self._unit, self._facts = models, unit, facts
        self._fast = FastPreview(partial(models.encode_images, tiling=Tiling(None, unit)), unit)
        self.previews: dict[str, Draw] = {"vae": self._preview, "fast": self.fast_preview}

    def picture(self, prepared: Prepared, tokens: np.ndarray, seed: int, phases: Phases) -> Image.Image:
        """f32 [1, image_seq, channels] -> a picture, signed."""
        with phases("decode"):
            sample = self._models.decode(unpack(tokens, *prepared.grid), prepared.tiling)
        return self.signed(prepared.mode.finish(sample_to_image(sample)), prepared.request, seed)

    def _preview(self, prepared: Prepared, tokens: np.ndarray, seed: int, phases: Phases) -> Image.Image:
        """f32 [1, image_seq, channels] -> a small picture, by the decoder."""
        decode = partial(self._models.decode, tiling=Tiling(None, self._unit))
        with phases("preview"):
            small = draw_preview(decode, unpack(tokens, *prepared.grid), self._unit)
            return put_back(small, prepared.request.canvas)

    def fast_preview(self, prepared: Prepared, tokens: np.ndarray, seed: int, phases: Phases) -> Image.Image:
        """f32 [1, image_seq, channels] -> a small picture, without the decoder."""
        with phases("preview"):
            return put_back(self._fast.draw(unpack(tokens, *prepared.grid)), prepared.request.canvas)

    def signed(self, image: Image.Image, request: ResolvedRequest, seed: int) -> Image.Image:
        """Write into the picture's `info` what is needed to make it again."""
        info: dict[Any, Any] = {**request.parameters(), "seed": seed, **self._facts()}
        image.info = info
        return image
