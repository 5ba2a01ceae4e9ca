"""What all pictures of a request have in common: encoded prompts and pictures, the decision about tiles, the mode."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fluxonnx.checkpoint.manifest import Shape
from fluxonnx.contract import Architecture, pack
from fluxonnx.runtime.engine import SessionOptions
from fluxonnx.runtime.images import fit_start, image_to_sample
from fluxonnx.runtime.models import Models
from fluxonnx.runtime.modes import Inpaint, Mode, PaintOver
from fluxonnx.runtime.phases import Phases
from fluxonnx.runtime.prompts import Prompts
from fluxonnx.runtime.request import ResolvedRequest
from fluxonnx.runtime.tiles import Tiling, choose_tile


@dataclass(frozen=True)
class Prepared:
    """A request whose prompts and pictures are encoded: everything that all its pictures have in common.

    Attributes:
        request: The request; whether tiles are used is decided.
        channels: Channels of a latent token.
        unit: Pixels along each side of a latent token.
        embeds: Embeddings of the prompt and, with guidance, of the negative prompt: f32 [1, text_seq, 3 * hidden] each.
        references: The references, f32 [1, channels, their rows, their columns] each.
        mode: What steers the loop.
    """

    request: ResolvedRequest
    channels: int
    unit: int
    embeds: list[np.ndarray]
    references: list[np.ndarray]
    mode: Mode

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of latent tokens."""
        return self.request.height // self.unit, self.request.width // self.unit

    @property
    def tokens(self) -> int:
        """Tokens that the transformer gets for each picture: text, picture and references."""
        rows, columns = self.grid
        references = sum(reference[0, 0].size for reference in self.references)
        return self.request.max_sequence_length + rows * columns + references

    @property
    def shape(self) -> Shape | None:
        """What a static build has to draw for it; None with references, which none draws."""
        request = self.request
        return None if self.references else Shape(request.width, request.height, request.max_sequence_length)

    @property
    def tiling(self) -> Tiling:
        """How its pictures are divided."""
        return Tiling(self.request.tile, self.unit)


def prepare(
    request: ResolvedRequest,
    sizes: Architecture,
    prompts: Prompts,
    models: Models,
    options: SessionOptions,
    phases: Phases,
) -> Prepared:
    """Decide about tiles, encode prompts and pictures, and choose the mode.

    Raises:
        FluxonnxError: A graph could not be loaded or run.
    """
    unit = sizes.vae.scale_factor
    with phases("encode prompt"):
        texts = [request.prompt, request.negative_prompt] if request.guided else [request.prompt]
        embeds = prompts.encode(texts, request.max_sequence_length)
    # What is decided is written into the picture, since tiles change it a little.
    drawn = [(request.width, request.height), *(reference.size for reference in request.references)]
    channels = max(sizes.vae.decoder_channels[:2])
    tile = choose_tile(
        drawn, request.tile, options.low_memory, channels, options.free_memory(), models.in_bands(channels)
    )
    request = replace(request, tile=tile)
    canvas = request.canvas
    start = None
    if canvas is not None:
        start = canvas.start()
    elif request.image is not None and request.strength < 1:
        start = fit_start(request.image, request.width, request.height, unit)
    images = [*([start] if start else []), *request.references]
    latents: list[np.ndarray] = []
    if images:
        with phases("encode image"):
            latents = models.encode_images([image_to_sample(image) for image in images], Tiling(tile, unit))
    mode = Mode()
    if canvas is not None:  # the picture is also the first one to look at, as in the reference
        mode = Inpaint(pack(latents[0]), canvas.area(unit), canvas)
    elif start is not None:
        mode = PaintOver(pack(latents.pop(0)))
    return Prepared(request, sizes.transformer.in_channels, unit, embeds, latents, mode)
