"""Flux: encode the prompt, draw noise, denoise it, decode the picture."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.manifest import FILE_NAME, Build, Manifest
from fluxonnx.contract import Architecture
from fluxonnx.errors import Cancelled, UsageError
from fluxonnx.runtime.adapters import Adapters
from fluxonnx.runtime.denoise import Step, denoise, draw_noise, step_ended
from fluxonnx.runtime.engine import SessionOptions
from fluxonnx.runtime.engines import name_of
from fluxonnx.runtime.events import Event, PhaseBegan
from fluxonnx.runtime.fields import FIELD
from fluxonnx.runtime.images import fit_start
from fluxonnx.runtime.inputs import Picture, several
from fluxonnx.runtime.known_tokens import open_tokenizer
from fluxonnx.runtime.models import Models
from fluxonnx.runtime.phases import Phases
from fluxonnx.runtime.prepare import Prepared, at_once, prepare
from fluxonnx.runtime.prompts import PromptCache, Prompts, encoder_identity
from fluxonnx.runtime.render import Draw, Renderer
from fluxonnx.runtime.request import DEFAULTS, Request, ResolvedRequest, resolve
from fluxonnx.runtime.seeds import checked_seed, random_seed
from fluxonnx.runtime.turns import in_turns
from fluxonnx.version import __version__

# callback(step, steps, sigma, latents f32 [batch, image_seq, channels]); returning False stops the run
Callback = Callable[[int, int, float, np.ndarray], object]


class Flux:
    """A model ready to make pictures; a context manager. Get one from `fluxonnx.load`.

    Threads may share it: their calls run one after the other, and loops over `steps` or `pictures` take turns item by
    item. A callback must not wait for another thread that uses the same model.

    Attributes:
        name: The model's name.
        is_distilled: Whether it was distilled to run in a few steps without guidance.
        builds: The precision and flavour of its graphs, as pictures store them.
        defaults: The width, height and max_sequence_length of a request that names none.
        text_encoder_out_layers: The hidden states that make up prompt embeddings.
        phases: The phases of the last run and the seconds they took.
        watch: Called with every event, see `events`; may be set between runs.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        manifest: Manifest,
        build: Build,
        options: SessionOptions | None = None,
        cache_dir: Path | None = None,
        encoder: Build | None = None,
        static: Sequence[Build] = (),
    ) -> None:
        """Open a build of a checkpoint; no graph is loaded until a picture needs it.

        Args:
            checkpoint: The model directory.
            manifest: Its manifest.
            build: One of the manifest's builds.
            options: How graphs are run.
            cache_dir: A folder for prompt embeddings, so that a known prompt never loads the text encoder.
            encoder: The build whose text encoder is used; None for the same build.
            static: Static builds of the same precision and flavour, for the sizes that they draw.
        """
        options = options or SessionOptions()
        self.name, self.is_distilled = checkpoint.name, checkpoint.is_distilled
        self.text_encoder_out_layers = tuple(manifest.text_encoder_out_layers or ())
        self.watch = options.watch
        self.phases = Phases(self._phase_began)
        self._options = options
        self._sizes = Architecture.from_json(manifest.architecture, checkpoint.root / FILE_NAME)
        self._unit = self._sizes.vae.scale_factor
        watched = replace(options, watch=self._emit)
        self._models = Models(checkpoint.root, build, watched, self._sizes, encoder=encoder, static=static)
        self._renderer = Renderer(self._models, self._unit, self._facts)
        self._lock = threading.RLock()  # a thread may make a picture inside a callback or between two steps of another
        cache = None
        if cache_dir:
            engine = name_of(options.engine) if options.engine else "onnxruntime"
            identify = partial(encoder_identity, checkpoint.root, manifest, encoder or build, engine, options.provider)
            cache = PromptCache(cache_dir, identify, self._sizes.text_encoder.embedding_dim)
        self._prompts = Prompts(open_tokenizer(checkpoint.root / "tokenizer", cache_dir), self._models, cache)
        self._adapters = Adapters(checkpoint, build, encoder or build, self._sizes, options, self._lock)
        self._adapters.attach(self._models, self._prompts)
        self.builds = self._models.builds()
        self.defaults = {**DEFAULTS, "kv": checkpoint.keeps_references, **manifest.defaults, **self._models.defaults()}

    def _resolve(self, request: Request, **options: Any) -> ResolvedRequest:
        resolved = resolve(request, self.is_distilled, self._unit, self.defaults, **options)
        return self._models.fitted(resolved)

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
            prompt: What to draw. Tokens after the first `max_sequence_length` are cut, with a warning that shows them.
            width: In pixels, a multiple of 16 from 64 to 4096; by default the model's own, which is 256 unless
                its manifest says otherwise.
            height: Likewise.
            steps: Denoising steps; by default 4, or 50 with a base model.
            seed: From 0 to 2**64 - 1; by default a random one, which is written into the picture's `info`.
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
        self, prompt: str, image: Picture, strength: float = 0.75, seed: int | None = None, **options: Any
    ) -> Image.Image:
        """Paint `prompt` over `image`: add noise to it up to a point of the schedule, then denoise it.

        At strength 0 the input comes back unchanged. At strength 1 only its size is kept. 0.7 is a good start for a
        change of style. `schedule.start_step` tells which steps run.

        Args:
            prompt: What to draw.
            image: The picture to start from: a PIL image, a path, or uint8 [height, width] or [height, width, 3 or 4].
                The output has its size, floored to multiples of 16; it is scaled if it is larger than can be drawn.
            strength: From 0 to 1.
            seed: As for `generate`.
            **options: `callback`, and any other field of `Request`.

        Raises:
            UsageError: As `generate`, and for a strength out of range or something that is no picture.
            ImageError: The picture can't be read.
        """
        if image is None:
            raise UsageError("there is no image to paint over: pass one")
        return self.generate(prompt, seed=seed, image=image, strength=strength, **options)

    def inpaint(
        self,
        prompt: str,
        image: Picture,
        mask: Picture | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Image.Image:
        """Draw `prompt` where `mask` is white, and keep the rest of `image`, as diffusers' klein inpaint pipeline does.

        Args:
            prompt: What to draw.
            image: The picture, as for `img2img`; the model also looks at it.
            mask: What to draw: a picture that is white there, or an array of bool; scaled to the size of `image`. It
                may be None with `expand`.
            seed: As for `generate`.
            **options: `mask_blur`, `mask_crop`, `keep_unmasked`, `expand`, `strength` (by default 1, all steps),
                `references`, `callback`, and any other field of `Request`.

        Raises:
            UsageError: As `generate`, and for a mask without a white part, or none.
            ImageError: A picture can't be read.
        """
        if image is None or (mask is None and options.get("expand") is None):
            raise UsageError("inpainting takes an image and a mask that is white where to draw (or expand): pass both")
        return self.generate(prompt, seed=seed, image=image, mask=mask, **options)

    def edit(
        self, prompt: str, images: Picture | Iterable[Picture], seed: int | None = None, **options: Any
    ) -> Image.Image:
        """Draw `prompt` while looking at `images`: in-context conditioning, as in diffusers' klein pipeline.

        Args:
            prompt: What to draw, or what to change.
            images: A picture or up to 16, as for `img2img`. The output has the first one's size as the model looks at
                it, at most 1 megapixel, unless `width` and `height` say otherwise.
            seed: As for `generate`.
            **options: `callback`, and any other field of `Request`.

        Raises:
            UsageError: As `generate`, and for a picture too small or too narrow, none, or more than 16.
            ImageError: A picture can't be read.
        """
        references = several(images)
        if not references:
            raise UsageError("there is no image to edit: pass at least one")
        return self.generate(prompt, seed=seed, references=references, **options)

    def run(self, request: Request, seeds: Sequence[int], callback: Callback | None = None) -> list[Image.Image]:
        """Make one picture per seed, as many at once as memory allows.

        Raises:
            UsageError: A value of the request or a seed is out of its range.
            Cancelled: The callback returned False.
            FluxonnxError: A graph could not be loaded or run.
        """
        pictures = self.pictures(request, seeds, callback)
        with self._lock:
            return [image for _, image in pictures]

    def pictures(
        self, request: Request, seeds: Sequence[int], callback: Callback | None = None
    ) -> Generator[tuple[int, Image.Image], None, None]:
        """Make one picture per seed, and hand out each with its seed as soon as it is decoded.

        As many pictures as memory allows are denoised in one pass. Closing the generator frees all memory.

        Raises:
            UsageError: At once, if a value of the request or a seed is out of its range.
            Cancelled: The callback returned False.
            FluxonnxError: A graph could not be loaded or run.
        """
        if not isinstance(seeds, Iterable) or isinstance(seeds, (str, bytes)):
            raise UsageError(f"the seeds are of type {type(seeds).__name__}: pass a list of integers")
        if callback is not None and not callable(callback):
            raise UsageError(f"the callback is of type {type(callback).__name__}: pass a function, or None")
        checked = [checked_seed(seed) for seed in seeds]
        return in_turns(self._lock, self._pictures(self._resolve(request), checked, callback))

    def steps(self, request: Request, seed: int) -> Generator[Step, None, None]:
        """Make a picture step by step: a generator of the state after each denoising step.

            for step in flux.steps(Request(prompt="a cat"), seed=42):
                step.preview().save(f"{step.index}.png")
            step.image().save("cat.png")

        The transformer is loaded until the last step, and freed before that is handed out. Breaking out of the loop
        frees it, too. At strength 0 there are no steps: `pictures` returns the input.

        Raises:
            UsageError: At once, if a value of the request or the seed is out of its range.
            FluxonnxError: A graph could not be loaded or run.
        """
        return in_turns(self._lock, self._steps(self._resolve(request), checked_seed(seed)))

    def check(self, request: Request) -> None:
        """Check a request as `run` does, without running anything.

        Raises:
            UsageError: A value of the request is out of its range.
        """
        self._resolve(request, warn=lambda message: None)  # `run` will warn

    def load_lora(self, path: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """Add a LoRA to the model, from the next picture on; nothing is written, and the graphs stay as they are.

        Args:
            path: A .safetensors file in one of the formats of docs/lora.md, a folder that holds one, or a repository of
                the Hugging Face hub, as OWNER/NAME or OWNER/NAME/FILE.
            scale: How strongly it counts, from -100 to 100: 1 as it was trained, 0 not at all.
            name: What `set_lora_scale` and `unload_lora` call it; by default the file's name without its ending.

        Returns:
            The name.

        Raises:
            UsageError: The scale is out of range, the name is taken, or the build can't be changed so.
            CheckpointError: The file is missing or damaged, is no LoRA, or is one of another model.
        """
        return self._adapters.load(path, scale, name)

    def set_lora_scale(self, name: str, scale: float) -> None:
        """Change how strongly a LoRA counts, from the next picture on.

        Raises:
            UsageError: The scale is out of range, or there is no LoRA of this name.
        """
        self._adapters.set_scale(name, scale)

    def unload_lora(self, name: str | None = None) -> None:
        """Take a LoRA out of the model, from the next picture on; None for all of them.

        Raises:
            UsageError: There is no LoRA of this name.
        """
        self._adapters.unload(name)

    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int | None = None) -> None:
        """Encode prompts ahead, so that a run of many pictures loads the text encoder once.

        Raises:
            UsageError: A prompt is not valid text, or the length is out of range.
            FluxonnxError: The text encoder could not be loaded or run.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        length = self.defaults["max_sequence_length"] if max_sequence_length is None else max_sequence_length
        for name, value in (*(("prompt", prompt) for prompt in prompts), ("max_sequence_length", length)):
            FIELD[name].check(value)
        with self._lock, self.phases("encode prompt"):
            self._prompts.encode(prompts, length)

    def _pictures(
        self, request: ResolvedRequest, seeds: Sequence[int], callback: Callback | None
    ) -> Generator[tuple[int, Image.Image], None, None]:
        self.phases = phases = Phases(self._phase_began)
        if request.image is not None and request.strength == 0:
            for seed in seeds:
                image = request.canvas.whole if request.canvas else request.image
                if request.canvas is None:
                    image = fit_start(image, request.width, request.height, self._unit)
                yield seed, self._renderer.signed(image.copy(), request, seed)
            return
        # 1. Encode the prompts and the input pictures.
        prepared = self._prepare(request, phases)
        for group in _groups(seeds, at_once(prepared, self._sizes.transformer.dim, self._options)):
            # 2. Draw noise.
            latents = noise = draw_noise(prepared, group)
            # 3. Denoise it.
            with closing(denoise(self._models, phases, prepared, noise)) as steps:
                for step in steps:
                    latents = step.latents
                    small = partial(self._renderer.fast_preview, prepared, seed=0, phases=phases)
                    self._emit(step_ended(step, small))
                    if callback and callback(step.index, step.steps, step.sigma, latents) is False:
                        raise Cancelled(f"stopped by the callback after step {step.index} of {step.steps}")
            # 4. Decode the pictures.
            try:
                for seed, tokens in zip(group, latents, strict=True):
                    yield seed, self._renderer.picture(prepared, tokens[None], seed, phases)
            finally:
                self._models.release("vae_decoder")

    def _steps(self, request: ResolvedRequest, seed: int) -> Generator[Step, None, None]:
        self.phases = phases = Phases(self._phase_began)
        if request.image is not None and request.strength == 0:
            return
        prepared = self._prepare(request, phases)
        loop_ended = False

        def look(draw: Draw, tokens: np.ndarray) -> Image.Image:
            with self._lock:
                try:
                    return draw(prepared, tokens, seed, phases)
                finally:
                    if loop_ended:
                        self._models.release("vae_decoder")

        noise = draw_noise(prepared, [seed])
        try:
            with closing(denoise(self._models, phases, prepared, noise)) as steps:
                for state in steps:
                    if state.index == state.steps:
                        steps.close()  # so that the decoder does not need memory beside the transformer
                    looks = {name: partial(look, draw) for name, draw in self._renderer.previews.items()}
                    yield Step(state, partial(look, self._renderer.picture), looks)
        finally:
            loop_ended = True
            self._models.release("vae_decoder")

    def _prepare(self, request: ResolvedRequest, phases: Phases) -> Prepared:
        return prepare(request, self._sizes, self._prompts, self._models, self._options, phases)

    def _facts(self) -> dict[str, Any]:
        """Return what a picture says of the model that made it."""
        facts = {"model": self.name, **self._models.builds(), **self._adapters.metadata()}
        return {**facts, "provider": self._options.provider, "version": __version__}

    def _emit(self, event: Event) -> None:
        if self.watch is not None:
            self.watch(event)

    def _phase_began(self, name: str) -> None:
        self._emit(PhaseBegan(name))

    def release_text_encoder(self) -> None:
        """Free the text encoder's memory, as a run does once its prompts are encoded; a new prompt loads it again."""
        with self._lock:
            self._models.close("text_encoder")

    def close(self) -> None:
        """Free all memory; a new run loads what it needs again."""
        with self._lock:
            self._models.close()
            self._prompts.forget()

    def __enter__(self) -> Flux:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _groups(seeds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for i in range(0, len(seeds), size):
        yield seeds[i : i + size]
