"""From noise to the latents of a picture: the noise, what the transformer is conditioned on, and the loop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from fluxonnx.checkpoint.manifest import Shape
from fluxonnx.contract import REFERENCE_T, grid_ids, pack
from fluxonnx.runtime.fields import MAX_SIDE
from fluxonnx.runtime.models import Models, Transformer
from fluxonnx.runtime.noise import flux2c_randn, randn, size_independent_randn
from fluxonnx.runtime.phases import Phases
from fluxonnx.runtime.request import ResolvedRequest
from fluxonnx.runtime.sampler import SolverStep, Velocity, sample
from fluxonnx.runtime.schedule import make_sigmas, start_step
from fluxonnx.runtime.tiles import Tiling


@dataclass(frozen=True)
class Prepared:
    """A request whose prompts and pictures are encoded: everything that all its pictures have in common.

    Attributes:
        request: The request; whether tiles are used is decided.
        channels: Channels of a latent token.
        unit: Pixels along each side of a latent token.
        embeds: Embeddings of the prompt and, with guidance, of the negative prompt: f32 [1, text_seq, 3 * hidden] each.
        start: The picture to start from, f32 [1, channels, rows, columns]; None to start from noise alone.
        references: The references, f32 [1, channels, their rows, their columns] each.
    """

    request: ResolvedRequest
    channels: int
    unit: int
    embeds: list[np.ndarray]
    start: np.ndarray | None
    references: list[np.ndarray]

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


def sigmas_of(prepared: Prepared) -> np.ndarray:
    """Return the noise levels between the steps: f32 [steps + 1]; image-to-image starts in the middle of a schedule."""
    request, (rows, columns) = prepared.request, prepared.grid
    sigmas = make_sigmas(request.schedule, rows * columns, request.steps, request.power_alpha, request.sigmas)
    return sigmas if request.image is None else sigmas[start_step(len(sigmas) - 1, request.strength) :]


def first_latents(prepared: Prepared, seeds: Sequence[int], sigma: np.float32) -> np.ndarray:
    """Draw noise for each seed, and mix it with the picture to start from: f32 [len(seeds), image_seq, channels]."""
    shape = (1, prepared.channels, *prepared.grid)

    def draw(seed: int) -> np.ndarray:
        if prepared.request.noise == "size-independent":
            return size_independent_randn(seed, shape, MAX_SIDE // prepared.unit)
        if prepared.request.noise == "flux2c":
            return flux2c_randn(seed, shape)
        return randn(seed, shape)

    noise = pack(np.concatenate([draw(seed) for seed in seeds]))
    return noise if prepared.start is None else sigma * noise + (1 - sigma) * pack(prepared.start)


def denoise(
    models: Models, phases: Phases, prepared: Prepared, latents: np.ndarray, sigmas: np.ndarray
) -> Generator[SolverStep, None, None]:
    """Denoise a batch; the transformer is loaded until the generator ends or is closed.

    Args:
        models: The graphs.
        phases: Told about the loading and the loop.
        prepared: What the pictures of the batch have in common.
        latents: f32 [batch, image_seq, channels], at noise level sigmas[0].
        sigmas: f32 [steps + 1].

    Yields:
        The state after each step.
    """
    with phases("load transformer"), models.transformer(prepared.shape) as transformer:
        velocity = _velocity(transformer, prepared, len(latents))
        with phases("denoise"):
            yield from sample(velocity, latents, sigmas, prepared.request.sampler)


def _velocity(transformer: Transformer, prepared: Prepared, batch: int) -> Velocity:
    """Return the transformer as a function of latents and sigma, with references and guidance."""
    request, references = prepared.request, prepared.references
    grids = [(*prepared.grid, 0)]
    grids += [(*reference.shape[2:], REFERENCE_T * (i + 1)) for i, reference in enumerate(references)]
    img_ids = np.concatenate([grid_ids(rows, columns, t) for rows, columns, t in grids])
    reference_tokens = [np.repeat(pack(reference), batch, axis=0) for reference in references]
    passes = [transformer.velocity(np.repeat(embeds, batch, axis=0), img_ids) for embeds in prepared.embeds]

    def velocity(latents: np.ndarray, sigma: np.float32) -> np.ndarray:
        tokens = np.concatenate([latents, *reference_tokens], axis=1) if reference_tokens else latents
        found = [run(tokens, sigma)[:, : latents.shape[1]] for run in passes]
        if not request.guided:
            return found[0]
        conditional, unconditional = found
        return unconditional + np.float32(request.guidance_scale) * (conditional - unconditional)

    return velocity


class Step:
    """A picture after a denoising step.

    Attributes:
        index: 1 after the first step.
        steps: How many there are.
        sigma: The noise level at the start of the step, in [0, 1].
        latents: f32 [1, image_seq, channels], after the step.
    """

    def __init__(
        self,
        state: SolverStep,
        image: Callable[[np.ndarray], Image.Image],
        preview: Callable[[np.ndarray], Image.Image],
    ) -> None:
        """Describe the state of a batch of one; `image` and `preview` decode f32 [1, image_seq, channels]."""
        self.index, self.steps, self.sigma, self.latents = state.index, state.steps, state.sigma, state.latents
        self._state, self._image, self._preview = state, image, preview

    @cached_property
    def estimate(self) -> np.ndarray:
        """The clean picture that the model expects: f32 [1, image_seq, channels]; after the last step, `latents`."""
        return self.latents if self.index == self.steps else self._state.estimate()

    def preview(self) -> Image.Image:
        """Decode a small version of `estimate`: RGB, half as large or less, with the longer side at most 256 pixels.

        It takes as long as decoding a picture of that size: a quarter of the whole picture's time up to 512x512, less
        above. The first call loads the decoder, which then takes memory beside the transformer until the loop ends.
        """
        return self._preview(self.estimate)

    def image(self) -> Image.Image:
        """Decode `estimate`: an RGB picture whose `info` holds the parameters that make the finished one.

        After the last step it is the finished picture, bit for bit.
        """
        return self._image(self.estimate)
