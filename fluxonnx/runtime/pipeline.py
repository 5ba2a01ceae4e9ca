"""Flux: encode the prompt, draw noise, walk it to a picture, decode."""

from __future__ import annotations

import secrets
import warnings
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType

import numpy as np
from PIL import Image

from fluxonnx import __version__
from fluxonnx.checkpoint import Checkpoint
from fluxonnx.errors import Cancelled, UsageError
from fluxonnx.manifest import Build, Manifest
from fluxonnx.runtime.images import sample_to_image
from fluxonnx.runtime.models import Models, grid_ids, pack, unpack
from fluxonnx.runtime.noise import randn
from fluxonnx.runtime.phases import Phases
from fluxonnx.runtime.sampler import sample
from fluxonnx.runtime.schedule import flow_sigmas
from fluxonnx.runtime.session import SessionOptions
from fluxonnx.runtime.text import Tokenizer

# callback(step, steps, sigma, latents f32 [batch, image_seq, channels]); returning False stops the run
Callback = Callable[[int, int, float, np.ndarray], object]

# The sides that the model can draw (FLUX_VAE_MAX_DIM of antirez/flux2.c; diffusers' limits are the same).
MIN_SIDE, MAX_SIDE = 64, 1792

DISTILLED_STEPS = 4
PROMPTS_REMEMBERED = 8


def random_seed() -> int:
    """Draw a seed a person can type again."""
    return secrets.randbelow(2**32)


class Flux:
    """A model ready to make pictures; a context manager. Get one from `fluxonnx.load`."""

    def __init__(
        self, checkpoint: Checkpoint, manifest: Manifest, build: Build, options: SessionOptions | None = None
    ) -> None:
        """Open a build of a checkpoint; no graph is loaded until a picture needs it."""
        self.name = checkpoint.name
        self.is_distilled = checkpoint.is_distilled
        self.text_encoder_out_layers = tuple(manifest.text_encoder_out_layers or ())
        #: The phases of the last run and the seconds they took.
        self.phases = Phases()
        self._models = Models(checkpoint.root, build, options or SessionOptions())
        self._tokenizer = Tokenizer(checkpoint.root / "tokenizer")
        self._channels = manifest.architecture["transformer"]["in_channels"]
        self._multiple = 2 ** len(manifest.architecture["vae"]["decoder_channels"])
        self._prompts: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()

    def generate(
        self,
        prompt: str,
        width: int = 256,
        height: int = 256,
        *,
        steps: int | None = None,
        seed: int | None = None,
        max_sequence_length: int = 512,
        callback: Callback | None = None,
    ) -> Image.Image:
        """Make a picture of `prompt`.

        The same seed gives the same picture as diffusers' `Flux2KleinPipeline` in float32.

        Args:
            prompt: What to draw. Past `max_sequence_length` tokens it is cut, with a warning that shows what was cut.
            width: In pixels, a multiple of 16 from 64 to 1792.
            height: Likewise.
            steps: Denoising steps; by default 4.
            seed: From 0 to 2**64 - 1; by default a random one, to be found in the picture's `info`.
            max_sequence_length: To how many tokens the prompt is padded or cut: a multiple of 8 up to 512.
            callback: Called after each step with (step, steps, sigma, latents); returning False stops the run.

        Returns:
            An RGB picture whose `info` holds the parameters that made it.

        Raises:
            UsageError: A value is out of its range.
            Cancelled: The callback returned False.
            FluxonnxError: A graph could not be loaded or run.
        """
        self._check_size(width, height)
        if not prompt.strip():
            raise UsageError("the prompt is empty: say what to draw")
        steps = DISTILLED_STEPS if steps is None else steps
        if not 1 <= steps <= 1000:
            raise UsageError(f"steps is {steps}, but must be from 1 to 1000")
        seed = random_seed() if seed is None else seed

        self.phases = Phases()
        rows, columns = height // self._multiple, width // self._multiple
        latents = pack(randn(seed, (1, self._channels, rows, columns)))
        embeds = self._prompt_embeds(prompt, max_sequence_length)
        with self.phases("load transformer"), self._models.transformer() as transformer:
            velocity = transformer.velocity(embeds, grid_ids(rows, columns))
            with self.phases("denoise"):
                for step in sample(velocity, latents, flow_sigmas(rows * columns, steps)):
                    latents = step.latents
                    if callback and callback(step.index, step.steps, step.sigma, latents) is False:
                        raise Cancelled(f"stopped by the callback after step {step.index} of {step.steps}")
        with self.phases("decode"):
            sample_ = self._models.decode_latents(unpack(latents, rows, columns))
        image = sample_to_image(sample_[0])
        image.info.update(
            prompt=prompt,
            seed=seed,
            steps=steps,
            width=width,
            height=height,
            model=self.name,
            version=__version__,
        )
        return image

    def _check_size(self, width: int, height: int) -> None:
        for name, side in (("width", width), ("height", height)):
            if not MIN_SIDE <= side <= MAX_SIDE or side % self._multiple:
                nearest = min(max(round(side / self._multiple) * self._multiple, MIN_SIDE), MAX_SIDE)
                raise UsageError(
                    f"{name} {side} can't be drawn: sides are multiples of {self._multiple} from {MIN_SIDE} to "
                    f"{MAX_SIDE}, the nearest is {nearest}"
                )

    def _prompt_embeds(self, prompt: str, max_length: int) -> np.ndarray:
        """Encode a prompt to f32 [1, max_length, 3 * hidden], or remember it."""
        key = (prompt, max_length)
        if key not in self._prompts:
            tokens = self._tokenizer.encode(prompt, max_length)
            if tokens.cut:
                warnings.warn(
                    f"the prompt is longer than {max_length} tokens; this was cut: {tokens.cut!r}", stacklevel=3
                )
            with self.phases("encode prompt"):
                self._prompts[key] = self._models.prompt_embeds(tokens.input_ids, tokens.attention_mask)
                self._models.release_text_encoder()
        self._prompts.move_to_end(key)
        while len(self._prompts) > PROMPTS_REMEMBERED:
            self._prompts.popitem(last=False)
        return self._prompts[key]

    def release_text_encoder(self) -> None:
        """Give the text encoder's memory back (about 8 GB of mapped weights); a new prompt loads it again."""
        self._models.release_text_encoder()

    def close(self) -> None:
        """Give all memory back; the object can't be used any more."""
        self._models.release_text_encoder()
        self._prompts.clear()

    def __enter__(self) -> Flux:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
