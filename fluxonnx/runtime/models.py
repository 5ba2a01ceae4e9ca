"""The five graphs of a build as functions of arrays, each loaded only while it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fluxonnx.errors import CheckpointError
from fluxonnx.manifest import COMPONENTS, Build
from fluxonnx.runtime.reading import Span, Touching, is_in_memory, read_ahead, rows_and_rest, whole
from fluxonnx.runtime.sampler import Velocity
from fluxonnx.runtime.schedule import timestep
from fluxonnx.runtime.session import Session, SessionOptions
from fluxonnx.runtime.tiles import Tiling, in_tiles

# The text encoder's largest weight, of which a prompt needs a row per token.
EMBEDDINGS = "model.embed_tokens.weight"


class Models:
    """A build's graphs; at most one of them holds memory at a time, since a picture never needs two at once."""

    def __init__(self, root: Path, build: Build, options: SessionOptions) -> None:
        """Remember where the graphs are; nothing is loaded.

        Raises:
            CheckpointError: A graph of the build was never exported.
        """
        missing = [name for name in COMPONENTS if name not in build.components]
        if missing:
            raise CheckpointError(
                f"{root} lacks the {missing[0]} graph: run fluxonnx export -d {root} --precision {build.precision} "
                f"--flavour {build.flavour}"
            )
        self._root, self._build, self._options = root, build, options
        self._text_encoder: Session | None = None
        self._transformer_is_new = False

    def _open(self, component: str) -> Session:
        graph = self._root / self._build.components[component].graph
        return Session(graph, component, self._options, self._build)

    def prompt_embeds(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """int64 [batch, seq] twice -> f32 [batch, seq, 3 * hidden]; the encoder stays loaded until it is released."""
        if self._text_encoder is None:
            encoder, transformer = self._spans("text_encoder", input_ids), self._spans("transformer")
            self._transformer_is_new |= not is_in_memory(transformer)
            read_ahead([*encoder, *transformer])  # the latter while the former computes
            self._text_encoder = self._open("text_encoder")
        return self._text_encoder.run(input_ids=input_ids, attention_mask=attention_mask)[0]

    def release_text_encoder(self) -> None:
        """Give the text encoder's memory back; it is loaded again when a new prompt needs it."""
        if self._text_encoder is not None:
            self._text_encoder.close()
            self._text_encoder = None

    def encode_images(self, samples: list[np.ndarray], tiling: Tiling) -> list[np.ndarray]:
        """f32 [1, 3, height, width] in [-1, 1] each -> normalised latents f32 [1, 128, height/16, width/16]."""
        with self._open("vae_encoder") as session:

            def encode(sample: np.ndarray) -> np.ndarray:
                return session.run(sample=sample)[0]

            return [in_tiles(encode, sample, tiling, tiling.unit, 1) for sample in samples]

    def decode_latents(self, latents: np.ndarray, tiling: Tiling) -> np.ndarray:
        """f32 [batch, 128, rows, columns] -> samples f32 [batch, 3, 16 * rows, 16 * columns], one by one."""
        with self._open("vae_decoder") as session:

            def decode(one: np.ndarray) -> np.ndarray:
                return session.run(latents=one)[0]

            return np.concatenate([in_tiles(decode, one[None], tiling, 1, tiling.unit) for one in latents])

    @contextmanager
    def transformer(self) -> Iterator[Transformer]:
        """Load the transformer for the length of a `with` block."""
        spans = self._spans("transformer")
        read_ahead(spans)
        with Touching(spans if self._transformer_is_new else ()) as touching:
            self._transformer_is_new = False
            with self._open("conditioning") as conditioning, self._open("transformer") as transformer:
                touching.wait()
                yield Transformer(conditioning, transformer)

    def _spans(self, component: str, input_ids: np.ndarray | None = None) -> list[Span]:
        """Return what a graph needs of its files, in the order in which it does; for the text encoder, of a prompt.

        A build that points into the checkpoint's files has no weights of its own, and needs but a part of those.
        """
        spans = [whole(self._root / self._build.components[component].graph)]
        for file in self._weights(component):
            spans += [whole(file)] if input_ids is None else rows_and_rest(file, EMBEDDINGS, np.unique(input_ids))
        return spans

    def _weights(self, component: str) -> list[Path]:
        return [self._root / name for name in self._build.components[component].weights]


class Transformer:
    """The transformer with the sinusoids it is conditioned on."""

    def __init__(self, conditioning: Session, transformer: Session) -> None:
        self._conditioning, self._transformer = conditioning, transformer

    def velocity(self, prompt_embeds: np.ndarray, img_ids: np.ndarray) -> Velocity:
        """Return the velocity as a function of latents and sigma.

        Args:
            prompt_embeds: f32 [batch, text_seq, 3 * hidden].
            img_ids: int64 [image_seq, 4] of the latent tokens.
        """
        txt_ids = text_ids(prompt_embeds.shape[1])

        def velocity(latents: np.ndarray, sigma: np.float32) -> np.ndarray:
            # One row for the whole batch, broadcast in the graph: matrix-vector products round otherwise than
            # matrix-matrix ones, and a picture out of a batch has to be what it is alone.
            time = np.full(1, timestep(sigma), np.float32)
            timestep_proj, cos, sin = self._conditioning.run(timestep=time, txt_ids=txt_ids, img_ids=img_ids)
            return self._transformer.run(
                hidden_states=latents,
                encoder_hidden_states=prompt_embeds,
                timestep_proj=timestep_proj,
                rotary_cos=cos,
                rotary_sin=sin,
            )[0]

        return velocity


def text_ids(length: int) -> np.ndarray:
    """Return (t, h, w, l) = (0, 0, 0, i) for each text token: int64 [length, 4]."""
    ids = np.zeros((length, 4), np.int64)
    ids[:, 3] = np.arange(length)
    return ids


def grid_ids(height: int, width: int, t: int = 0) -> np.ndarray:
    """Return (t, y, x, 0) for each token of a picture, row by row: int64 [height * width, 4]."""
    ids = np.zeros((height * width, 4), np.int64)
    ids[:, 0] = t
    ids[:, 1], ids[:, 2] = np.divmod(np.arange(height * width), width)
    return ids


def pack(latents: np.ndarray) -> np.ndarray:
    """[batch, channels, height, width] -> tokens [batch, height * width, channels]."""
    batch, channels = latents.shape[:2]
    return np.ascontiguousarray(latents.reshape(batch, channels, -1).transpose(0, 2, 1))


def unpack(tokens: np.ndarray, height: int, width: int) -> np.ndarray:
    """Inverse of `pack`."""
    batch, _, channels = tokens.shape
    return np.ascontiguousarray(tokens.transpose(0, 2, 1)).reshape(batch, channels, height, width)
