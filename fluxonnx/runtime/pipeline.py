"""Flux: encode the prompt, draw noise, walk it to a picture, decode."""

from __future__ import annotations

import json
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from fluxonnx import __version__
from fluxonnx.checkpoint import Checkpoint
from fluxonnx.errors import Cancelled, UsageError
from fluxonnx.machine import available_memory
from fluxonnx.manifest import Build, Manifest
from fluxonnx.runtime.images import crop_center, fill, image_to_sample, sample_to_image
from fluxonnx.runtime.models import Models, Transformer, grid_ids, pack, unpack
from fluxonnx.runtime.noise import check_seed, randn, size_independent_randn
from fluxonnx.runtime.phases import Phases
from fluxonnx.runtime.prompts import PromptCache, Prompts
from fluxonnx.runtime.request import DEFAULTS, MAX_SIDE, Request, resolve
from fluxonnx.runtime.sampler import Velocity, sample
from fluxonnx.runtime.schedule import make_sigmas, start_step
from fluxonnx.runtime.session import SessionOptions
from fluxonnx.runtime.text import Tokenizer
from fluxonnx.runtime.tiles import TILE, Tiling, whole_bytes

# callback(step, steps, sigma, latents f32 [batch, image_seq, channels]); returning False stops the run
Callback = Callable[[int, int, float, np.ndarray], object]

# Between the T coordinates of pictures (_prepare_image_ids, pipeline_flux2_klein.py).
REFERENCE_T = 10

# onnxruntime's matrix product (MLAS sgemm) changes its order of summation when a thread gets this many columns or
# fewer, and how many it gets depends on the number of rows. Narrow models are drawn one picture at a time, so that a
# picture out of a batch is bitwise what it is alone.
BITWISE_COLUMNS = 64

# A single-stream block holds 9 widths of projections, their halves, and copies of the residual stream at once.
BYTES_PER_TOKEN_AND_WIDTH = 4 * 36
MOST_AT_ONCE = 8


def random_seed() -> int:
    """Draw a seed a person can type again."""
    return secrets.randbelow(2**32)


class Flux:
    """A model ready to make pictures; a context manager. Get one from `fluxonnx.load`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        manifest: Manifest,
        build: Build,
        options: SessionOptions | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        """Open a build of a checkpoint; no graph is loaded until a picture needs it.

        Args:
            checkpoint: The model directory.
            manifest: Its manifest.
            build: One of the manifest's builds.
            options: How graphs are run.
            cache_dir: A folder for prompt embeddings, so that a known prompt never loads the text encoder.
        """
        self.name = checkpoint.name
        self.is_distilled = checkpoint.is_distilled
        self.text_encoder_out_layers = tuple(manifest.text_encoder_out_layers or ())
        #: The phases of the last run and the seconds they took.
        self.phases = Phases()
        #: Called with the name of each phase of a run as it begins.
        self.on_phase: Callable[[str], None] | None = None
        options = options or SessionOptions()
        self._models = Models(checkpoint.root, build, options)
        cache = PromptCache(cache_dir, _encoder_identity(manifest, build, options)) if cache_dir else None
        self._prompts = Prompts(Tokenizer(checkpoint.root / "tokenizer"), self._models, cache)
        self._build = build
        self._channels = manifest.architecture["transformer"]["in_channels"]
        self._dim = manifest.architecture["transformer"]["heads"] * manifest.architecture["transformer"]["head_dim"]
        self._options = options
        self._vae_width = max(manifest.architecture["vae"]["decoder_channels"][:2])
        self._defaults = {**DEFAULTS, **manifest.defaults}
        self._multiple = 2 ** len(manifest.architecture["vae"]["decoder_channels"])

    def generate(
        self,
        prompt: str,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        seed: int | None = None,
        *,
        callback: Callback | None = None,
        **options: Any,
    ) -> Image.Image:
        """Make a picture of `prompt`.

        The same seed gives the same picture as diffusers' `Flux2KleinPipeline` in float32.

        Args:
            prompt: What to draw. Past `max_sequence_length` tokens it is cut, with a warning that shows what was cut.
            width: In pixels, a multiple of 16 from 64 to 1792; by default the model's own, which is 256 unless
                its manifest says otherwise.
            height: Likewise.
            steps: Denoising steps; by default 4, or 50 with a base model.
            seed: From 0 to 2**64 - 1; by default a random one, to be found in the picture's `info`.
            callback: Called after each step with (step, steps, sigma, latents); returning False stops the run.
            **options: Any other field of `Request`.

        Returns:
            An RGB picture whose `info` holds the parameters that made it.

        Raises:
            UsageError: A value is out of its range.
            Cancelled: The callback returned False.
            FluxonnxError: A graph could not be loaded or run.
        """
        request = Request(prompt=prompt, width=width, height=height, steps=steps, **options)
        return self.run(request, [random_seed() if seed is None else seed], callback)[0]

    def img2img(
        self, prompt: str, image: Image.Image, strength: float = 0.75, seed: int | None = None, **options: Any
    ) -> Image.Image:
        """Paint `prompt` over `image`: noise it up to a point of the schedule, then denoise it.

        At strength 0 the input comes back unchanged; at 1 only its size is kept; 0.7 is a good start for a change of
        style. `schedule.start_step` tells which steps run.

        Args:
            prompt: What to draw.
            image: The picture to start from; the output has its size, floored to multiples of 16.
            strength: From 0 to 1.
            seed: As for `generate`.
            **options: `callback`, and any other field of `Request`.

        Raises:
            UsageError: As `generate`, and for a strength out of range.
        """
        return self.generate(prompt, seed=seed, image=image, strength=strength, **options)

    def edit(self, prompt: str, images: Sequence[Image.Image], seed: int | None = None, **options: Any) -> Image.Image:
        """Draw `prompt` while looking at `images`: in-context conditioning, as diffusers' klein pipeline does it.

        Args:
            prompt: What to draw, or what to change.
            images: Up to 10 pictures; the output has the first one's size unless `width` and `height` say otherwise.
            seed: As for `generate`.
            **options: `callback`, and any other field of `Request`.

        Raises:
            UsageError: As `generate`, and for a picture too small or too narrow, none, or more than 10.
        """
        if not images:
            raise UsageError("there is no image to edit: pass at least one")
        return self.generate(prompt, seed=seed, references=tuple(images), **options)

    def run(self, request: Request, seeds: Sequence[int], callback: Callback | None = None) -> list[Image.Image]:
        """Make one picture per seed, as many at once as memory allows.

        Raises:
            UsageError: A value of the request or a seed is out of its range.
            Cancelled: The callback returned False.
            FluxonnxError: A graph could not be loaded or run.
        """
        for seed in seeds:
            check_seed(seed)
        request = resolve(request, self.is_distilled, self._multiple, self._defaults)
        self.phases = Phases(self.on_phase)
        if request.image is not None and request.strength == 0:
            return [self._sign(self._start_image(request), request, seed) for seed in seeds]
        assert request.max_sequence_length is not None
        with self.phases("encode prompt"):
            prompts = [request.prompt, request.negative_prompt] if request.guided else [request.prompt]
            embeds = self._prompts.encode(prompts, request.max_sequence_length)
        request = replace(request, tile=self._tile(request))
        start, references = self._encode_inputs(request)
        images = []
        for group in _groups(seeds, self._at_once(request, references)):
            latents = self._denoise(request, group, embeds, start, references, callback)
            with self.phases("decode"):
                samples = self._models.decode_latents(latents, Tiling(request.tile, self._multiple))
            images += [
                self._sign(sample_to_image(sample), request, seed) for sample, seed in zip(samples, group, strict=True)
            ]
        return images

    def check(self, request: Request) -> None:
        """Refuse what `run` would refuse, without running anything.

        Raises:
            UsageError: A value of the request is out of its range.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `run` will say it
            resolve(request, self.is_distilled, self._multiple, self._defaults)

    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int | None = None) -> None:
        """Encode prompts ahead, so that a run of many pictures loads the text encoder once."""
        with self.phases("encode prompt"):
            self._prompts.encode(prompts, max_sequence_length or self._defaults["max_sequence_length"])

    def _denoise(
        self,
        request: Request,
        seeds: Sequence[int],
        embeds: list[np.ndarray],
        start: np.ndarray | None,
        references: list[np.ndarray],
        callback: Callback | None,
    ) -> np.ndarray:
        """Return clean latents f32 [len(seeds), channels, rows, columns]."""
        rows, columns = self._grid(request)
        noise = pack(np.concatenate([self._draw(request, seed, rows, columns) for seed in seeds]))
        sigmas = make_sigmas(request.schedule, rows * columns, request.steps or 0, request.power_alpha, request.sigmas)
        latents = noise
        if request.image is not None:
            sigmas = sigmas[start_step(len(sigmas) - 1, request.strength) :]
        if start is not None:
            latents = sigmas[0] * noise + (1 - sigmas[0]) * pack(start)
        with self.phases("load transformer"), self._models.transformer() as transformer:
            velocity = _velocity(transformer, request, embeds, (rows, columns), references, len(seeds))
            with self.phases("denoise"):
                for step in sample(velocity, latents, sigmas, request.sampler):
                    latents = step.latents
                    if callback and callback(step.index, step.steps, step.sigma, latents) is False:
                        raise Cancelled(f"stopped by the callback after step {step.index} of {step.steps}")
        return unpack(latents, rows, columns)

    def _draw(self, request: Request, seed: int, rows: int, columns: int) -> np.ndarray:
        shape = (1, self._channels, rows, columns)
        if request.noise == "size-independent":
            return size_independent_randn(seed, shape, MAX_SIDE // self._multiple)
        return randn(seed, shape)

    def _grid(self, request: Request) -> tuple[int, int]:
        """Return the rows and columns of latent tokens."""
        assert request.width is not None
        assert request.height is not None
        return request.height // self._multiple, request.width // self._multiple

    def _encode_inputs(self, request: Request) -> tuple[np.ndarray | None, list[np.ndarray]]:
        """Return the latents to start from, if any, and those of each reference: f32 [1, channels, rows, columns]."""
        painted_over = [self._start_image(request)] if request.image is not None and request.strength < 1 else []
        images = [*painted_over, *request.references]
        if not images:
            return None, []
        with self.phases("encode image"):
            samples = [image_to_sample(image) for image in images]
            latents = self._models.encode_images(samples, Tiling(request.tile, self._multiple))
        return (latents[0], latents[1:]) if painted_over else (None, latents)

    def _tile(self, request: Request) -> int | None:
        """Return the side of the tiles for the autoencoder; None if no picture needs any.

        What is decided is written into the picture, since tiles change it a little.
        """
        assert request.width is not None
        assert request.height is not None
        sizes = [(request.width, request.height), *(reference.size for reference in request.references)]
        tile = request.tile or TILE
        if max(map(max, sizes)) <= tile:
            return None
        if request.tile or self._options.low_memory:
            return tile
        largest = max(width * height for width, height in sizes)
        needed, available = whole_bytes(largest, self._vae_width), available_memory()
        if needed <= available:
            return None
        short = f"memory is short ({needed / 1e9:.1f} GB needed, {available / 1e9:.1f} GB free)"
        warnings.warn(f"{short}: the picture is decoded in tiles, with small differences", stacklevel=4)
        return tile

    def _start_image(self, request: Request) -> Image.Image:
        """Return the picture that image-to-image starts from, at the size of the output.

        A rim of less than a token is cropped, so that what is left keeps its pixels; other sizes are scaled to fill.
        """
        image, width, height = request.image, request.width, request.height
        assert image is not None
        assert width is not None
        assert height is not None
        if 0 <= image.width - width < self._multiple and 0 <= image.height - height < self._multiple:
            return crop_center(image, width, height)
        return fill(image, width, height)

    def _at_once(self, request: Request, references: list[np.ndarray]) -> int:
        """Return how many pictures to make in one pass: what fits into memory, by a guess, and stays reproducible."""
        if self._options.low_memory or self._dim // (self._options.threads or os.cpu_count() or 1) <= BITWISE_COLUMNS:
            return 1
        rows, columns = self._grid(request)
        assert request.max_sequence_length is not None
        tokens = request.max_sequence_length + rows * columns + sum(reference[0, 0].size for reference in references)
        each = tokens * self._dim * BYTES_PER_TOKEN_AND_WIDTH
        return max(1, min(MOST_AT_ONCE, available_memory() // 2 // each))

    def _sign(self, image: Image.Image, request: Request, seed: int) -> Image.Image:
        """Write into the picture's `info` what it takes to make it again."""
        info: dict[Any, Any] = {
            **request.parameters(),
            "seed": seed,
            "model": self.name,
            "precision": self._build.precision,
            "flavour": self._build.flavour,
            "provider": self._options.provider,
            "version": __version__,
        }
        image.info = info
        return image

    def release_text_encoder(self) -> None:
        """Give the text encoder's memory back (about 8 GB of mapped weights); a new prompt loads it again.

        This happens by itself once the prompts of a run are encoded.
        """
        self._models.release_text_encoder()

    def close(self) -> None:
        """Give all memory back; a new run loads what it needs again."""
        self._models.release_text_encoder()
        self._prompts.forget()

    def __enter__(self) -> Flux:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _encoder_identity(manifest: Manifest, build: Build, options: SessionOptions) -> str:
    """Return all that prompt embeddings depend on besides the tokens."""
    encoder = build.components["text_encoder"]
    sources = sorted(encoder.sources.items())
    made = [encoder.graph, encoder.exporter_version, sources, manifest.text_encoder_out_layers, options.provider]
    return json.dumps(made)


def _velocity(
    transformer: Transformer,
    request: Request,
    embeds: list[np.ndarray],
    grid: tuple[int, int],
    references: list[np.ndarray],
    batch: int,
) -> Velocity:
    """Return what the sampler walks along: the transformer, with references and guidance around it."""
    grids = [(*grid, 0)] + [(*reference.shape[2:], REFERENCE_T * (i + 1)) for i, reference in enumerate(references)]
    img_ids = np.concatenate([grid_ids(rows, columns, t) for rows, columns, t in grids])
    reference_tokens = [np.repeat(pack(reference), batch, axis=0) for reference in references]
    passes = [transformer.velocity(np.repeat(embed, batch, axis=0), img_ids) for embed in embeds]

    def velocity(latents: np.ndarray, sigma: np.float32) -> np.ndarray:
        tokens = np.concatenate([latents, *reference_tokens], axis=1) if reference_tokens else latents
        found = [run(tokens, sigma)[:, : latents.shape[1]] for run in passes]
        if not request.guided:
            return found[0]
        conditional, unconditional = found
        return unconditional + np.float32(request.guidance_scale) * (conditional - unconditional)

    return velocity


def _groups(seeds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for i in range(0, len(seeds), size):
        yield seeds[i : i + size]
