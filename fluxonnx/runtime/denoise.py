"""From noise to the latents of a picture: the noise, what the transformer is conditioned on, and the loop."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cached_property

import numpy as np
from PIL import Image

from fluxonnx.contract import grid_ids, pack
from fluxonnx.errors import UsageError
from fluxonnx.runtime.events import StepEnded
from fluxonnx.runtime.fields import FITTED_SIDE
from fluxonnx.runtime.models import Models, Transformer
from fluxonnx.runtime.noise import flux2c_randn, randn, size_independent_randn
from fluxonnx.runtime.phases import Phases
from fluxonnx.runtime.prepare import Prepared, reference_ids
from fluxonnx.runtime.sampler import SolverStep, Velocity, sample
from fluxonnx.runtime.schedule import make_sigmas, start_step
from fluxonnx.runtime.step_cache import cached


def sigmas_of(prepared: Prepared) -> np.ndarray:
    """Return the noise levels between the steps: f32 [steps + 1]; image-to-image starts in the middle of a schedule."""
    request, (rows, columns) = prepared.request, prepared.grid
    sigmas = make_sigmas(request.schedule, rows * columns, request.steps, request.power_alpha, request.sigmas)
    return sigmas if request.image is None else sigmas[start_step(len(sigmas) - 1, request.strength) :]


def draw_noise(prepared: Prepared, seeds: Sequence[int]) -> np.ndarray:
    """Draw noise for each seed: f32 [len(seeds), image_seq, channels]."""
    shape = (1, prepared.channels, *prepared.grid)

    def draw(seed: int) -> np.ndarray:
        if prepared.request.noise == "size-independent":
            return size_independent_randn(seed, shape, FITTED_SIDE // prepared.unit)
        if prepared.request.noise == "flux2c":
            return flux2c_randn(seed, shape)
        return randn(seed, shape)

    return pack(np.concatenate([draw(seed) for seed in seeds]))


def denoise(models: Models, phases: Phases, prepared: Prepared, noise: np.ndarray) -> Generator[SolverStep, None, None]:
    """Walk from noise to the latents of pictures; the transformer is loaded until the generator ends or is closed.

    Args:
        models: The graphs.
        phases: Told of loading and denoising.
        prepared: What the pictures have in common.
        noise: Of `draw_noise`: f32 [batch, image_seq, channels].

    Yields:
        The state after each step.
    """
    sigmas, mode = sigmas_of(prepared), prepared.mode
    with phases("load transformer"), models.transformer(prepared.shape, bool(prepared.kept)) as transformer:
        velocity = cached(_velocity(transformer, prepared, len(noise)), prepared.request.step_cache)
        with phases("denoise"):

            def hold(latents: np.ndarray, sigma: np.float32) -> np.ndarray:
                return mode.hold(latents, noise, sigma)

            yield from sample(velocity, mode.begin(noise, sigmas[0]), sigmas, prepared.request.sampler, hold)


def _velocity(transformer: Transformer, prepared: Prepared, batch: int) -> Velocity:
    """Return the transformer as a function of latents and sigma, with references and guidance."""
    request, img_ids = prepared.request, grid_ids(*prepared.grid)
    reference_tokens: list[np.ndarray] = []
    kept = {name: _repeated(values, batch) for name, values in prepared.kept.items()}
    if prepared.references and not kept:
        img_ids = np.concatenate([img_ids, reference_ids(prepared.references)])
        reference_tokens = [_repeated(pack(reference), batch) for reference in prepared.references]
    passes = [transformer.velocity(_repeated(embeds, batch), img_ids, kept) for embeds in prepared.embeds]

    def velocity(latents: np.ndarray, sigma: np.float32) -> np.ndarray:
        tokens = np.concatenate([latents, *reference_tokens], axis=1) if reference_tokens else latents
        found = [run(tokens, sigma)[:, : latents.shape[1]] for run in passes]
        if not request.guided:
            return found[0]
        conditional, unconditional = found
        return unconditional + np.float32(request.guidance_scale) * (conditional - unconditional)

    return velocity


def _repeated(values: np.ndarray, batch: int) -> np.ndarray:
    """[1, ...] -> [batch, ...], without a copy where that is the same."""
    return values if batch == 1 else np.repeat(values, batch, axis=0)


def step_ended(state: SolverStep, draw: Callable[[np.ndarray], Image.Image]) -> StepEnded:
    """Tell of a step of a batch; `draw` makes a small picture of f32 [1, image_seq, channels]."""

    def preview(i: int) -> Image.Image:
        return draw(state.estimate()[i : i + 1])

    return StepEnded(state.index, state.steps, len(state.latents), preview)


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
        previews: Mapping[str, Callable[[np.ndarray], Image.Image]],
    ) -> None:
        """Describe the state of a batch of one; `image` and `previews` decode f32 [1, image_seq, channels]."""
        self.index, self.steps, self.sigma, self.latents = state.index, state.steps, state.sigma, state.latents
        self._state, self._image, self._previews = state, image, previews

    @cached_property
    def estimate(self) -> np.ndarray:
        """The clean picture that the model expects: f32 [1, image_seq, channels]; after the last step, `latents`."""
        return self.latents if self.index == self.steps else self._state.estimate()

    def preview(self, method: str = "vae") -> Image.Image:
        """Draw a small version of `estimate`: RGB, half as large or less, with the longer side at most 256 pixels.

        Args:
            method: "vae" takes as long as decoding a picture of that size: a quarter of the whole picture's time up to
                512x512, less above. The first call loads the decoder, which then takes memory beside the transformer
                until the loop ends. "fast" takes a few milliseconds, shows an eighth of the picture's resolution, and
                loads nothing but the encoder, once per model, for as long as it takes to encode a picture of 256x256.

        Raises:
            UsageError: There is no such method.
        """
        if method not in self._previews:
            raise UsageError(f"preview method {method!r} is unknown: choose one of {', '.join(self._previews)}")
        return self._previews[method](self.estimate)

    def image(self) -> Image.Image:
        """Decode `estimate`: an RGB picture whose `info` holds the parameters that make the finished one.

        After the last step it is the finished picture, bit for bit.
        """
        return self._image(self.estimate)
