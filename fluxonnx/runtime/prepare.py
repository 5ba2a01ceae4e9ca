"""What all pictures of a request have in common: encoded prompts and pictures, the decision about tiles, the mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fluxonnx.checkpoint.manifest import Shape
from fluxonnx.contract import REFERENCE_T, Architecture, grid_ids, pack
from fluxonnx.machine import usable_cores
from fluxonnx.runtime.engine import SessionOptions
from fluxonnx.runtime.images import fit_start, image_to_sample
from fluxonnx.runtime.memory import batch_size
from fluxonnx.runtime.models import Kept, Models
from fluxonnx.runtime.modes import Inpaint, Mode, PaintOver
from fluxonnx.runtime.phases import Phases
from fluxonnx.runtime.prompts import Prompts
from fluxonnx.runtime.request import ResolvedRequest
from fluxonnx.runtime.tiles import Tiling, choose_tile

# onnxruntime's matrix product (MLAS sgemm) changes its order of summation when a thread gets this many columns or
# fewer, and how many it gets depends on the number of rows. Narrow models draw one picture at a time, so that a picture
# out of a batch is bitwise what it is alone.
BITWISE_COLUMNS = 64


@dataclass(frozen=True)
class Prepared:
    """A request whose prompts and pictures are encoded: everything that all its pictures have in common.

    Attributes:
        request: The request; whether tiles are used is decided.
        channels: Channels of a latent token.
        unit: Pixels along each side of a latent token.
        embeds: Embeddings of the prompt and, with guidance, of the negative prompt: f32 [1, text_seq, 3 * hidden] each.
        references: The references, f32 [1, channels, their rows, their columns] each.
        kept: What is kept of the references, if the transformer does not read them in each step, see `Models.kept`.
        mode: What steers the loop.
    """

    request: ResolvedRequest
    channels: int
    unit: int
    embeds: list[np.ndarray]
    references: list[np.ndarray]
    mode: Mode
    kept: Kept = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of latent tokens."""
        return self.request.height // self.unit, self.request.width // self.unit

    @property
    def tokens(self) -> int:
        """Tokens that the transformer gets for each picture: text, picture, and references that it reads."""
        rows, columns = self.grid
        references = 0 if self.kept else sum(reference[0, 0].size for reference in self.references)
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
    kept: Kept = {}
    if request.kv and latents:
        with phases("read references"):
            tokens = np.concatenate([pack(reference) for reference in latents], axis=1)
            kept = models.kept(tokens, reference_ids(latents))
    return Prepared(request, sizes.transformer.in_channels, unit, embeds, latents, mode, kept)


def reference_ids(references: Sequence[np.ndarray]) -> np.ndarray:
    """Return (t, y, x, 0) of the tokens of references, f32 [1, channels, rows, columns] each: int64 [their sum, 4]."""
    sizes = [(item.shape[2], item.shape[3]) for item in references]
    return np.concatenate([grid_ids(*size, t=REFERENCE_T * (i + 1)) for i, size in enumerate(sizes)])


def at_once(prepared: Prepared, width: int, options: SessionOptions) -> int:
    """Return how many pictures to make in one pass: as many as fit into memory and stay reproducible.

    Args:
        prepared: What they have in common.
        width: Width of the transformer's residual stream.
        options: How graphs are run.
    """
    if options.low_memory or width // (options.threads or usable_cores()) <= BITWISE_COLUMNS:
        return 1
    kept = sum(values.nbytes for values in prepared.kept.values())
    return batch_size(prepared.tokens, width, options.free_memory(), kept)
