"""Modes: small objects that steer the one denoising loop. They say where it starts, what it holds, and how it ends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from fluxonnx.runtime.canvas import Canvas


class Mode:
    """A picture from noise alone; the other modes start from a picture."""

    def begin(self, noise: np.ndarray, sigma: np.float32) -> np.ndarray:
        """Return the latents that the loop starts from: f32 [batch, image_seq, channels], at noise level `sigma`."""
        return noise

    def hold(self, latents: np.ndarray, noise: np.ndarray, sigma: np.float32) -> np.ndarray:
        """Return the latents after a step to noise level `sigma`, with what has to stay as it is put back."""
        return latents

    def finish(self, picture: Image.Image) -> Image.Image:
        """Return the picture to hand out, given the decoded one."""
        return picture


@dataclass(frozen=True)
class PaintOver(Mode):
    """Image-to-image: noise is mixed with a picture.

    Attributes:
        start: The picture, f32 [1, image_seq, channels].
    """

    start: np.ndarray

    def begin(self, noise: np.ndarray, sigma: np.float32) -> np.ndarray:
        """See `Mode.begin` (FlowMatchEulerDiscreteScheduler.scale_noise, diffusers)."""
        return sigma * noise + (1 - sigma) * self.start


@dataclass(frozen=True)
class Inpaint(PaintOver):
    """A part of a picture is drawn; after each step, the rest is put back at the noise level of that step.

    Source: the denoising loop of diffusers, pipeline_flux2_klein_inpaint.py.

    Attributes:
        area: How much of each token is drawn, f32 [1, image_seq, 1] in [0, 1].
        canvas: The picture.
    """

    area: np.ndarray
    canvas: Canvas

    def hold(self, latents: np.ndarray, noise: np.ndarray, sigma: np.float32) -> np.ndarray:
        """See `Mode.hold`."""
        return (1 - self.area) * self.begin(noise, sigma) + self.area * latents

    def finish(self, picture: Image.Image) -> Image.Image:
        """See `Mode.finish`."""
        return self.canvas.finish(picture)
