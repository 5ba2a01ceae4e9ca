"""The graphs of a build as functions of arrays, each loaded only while it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from fluxonnx.checkpoint.digests import unchanged
from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.graphs import graph_architecture
from fluxonnx.checkpoint.manifest import FILE_NAME, Build, Shape, depended_on
from fluxonnx.checkpoint.reading import check_readable, shown
from fluxonnx.contract import (
    BAND_CHANNELS,
    BANDS_SINCE,
    COMPONENTS,
    EMBEDDING_TABLE,
    FOLDERS,
    KV_COMPONENTS,
    PRECISIONS_IN_BANDS,
    Architecture,
    text_ids,
)
from fluxonnx.errors import CheckpointError, UsageError
from fluxonnx.lora.adapted import Adapted
from fluxonnx.runtime.engine import Runner, SessionOptions
from fluxonnx.runtime.engines import engine_for
from fluxonnx.runtime.events import GraphRan
from fluxonnx.runtime.prefault import Prefault, Span, read_ahead, resident, rows_and_rest, whole_file
from fluxonnx.runtime.request import ResolvedRequest
from fluxonnx.runtime.sampler import Velocity
from fluxonnx.runtime.schedule import timestep
from fluxonnx.runtime.tiles import Tiling, in_tiles

# graph(name=input, ...) -> outputs
Graph = Callable[..., list[np.ndarray]]
# The keys and values of reference tokens in each block, by the names of a graph's inputs.
Kept = dict[str, np.ndarray]


class Models:
    """A build's graphs.

    A picture never needs two large ones at once, so at most one of them holds memory at a time, unless the options have
    all of them stay loaded.
    """

    def __init__(
        self,
        root: Path,
        build: Build,
        options: SessionOptions,
        sizes: Architecture | None = None,
        *,
        encoder: Build | None = None,
        static: Sequence[Build] = (),
        resident: Callable[[Sequence[Span]], bool] = resident,
        read_ahead: Callable[[Sequence[Span], int], object] = read_ahead,
        prefault: Callable[[Sequence[Span], int], Prefault] = Prefault,
    ) -> None:
        """Find the graphs; nothing is loaded yet.

        Args:
            root: The model directory.
            build: One of its builds.
            options: How graphs are run.
            sizes: What the manifest says about the model, which has to be what its graphs say; None for no check.
            encoder: The build whose text encoder is used; None for the same build.
            static: Static builds of the same precision and flavour, which are used for what they draw.
            resident: Tells whether weights are in memory; this and the others are parameters for tests.
            read_ahead: Has weights read in the background.
            prefault: Touches weights in the background.

        Raises:
            CheckpointError: A graph of the build was never exported, or is of a model of other sizes.
        """
        self._builds = {name: encoder if encoder and name == "text_encoder" else build for name in FOLDERS}
        missing = [(name, self._builds[name]) for name in COMPONENTS if name not in self._builds[name].components]
        for name, part in missing:
            raise CheckpointError(f"{root} lacks the {name} graph: run fluxonnx export -d {root} {part.flags}")
        self._static = [found for found in (build, *static) if found.shape]
        if sizes is not None:
            known = [(name, part) for name, part in self._builds.items() if name in part.components]
            _check_sizes(root, [*known, *((name, b) for b in static for name in b.components)], sizes)
        self._root, self._options = root, options
        self._engine = options.engine or engine_for(options.provider)
        self._resident, self._read_ahead, self._prefault = resident, read_ahead, prefault
        self._kept: dict[str, tuple[Build, Runner]] = {}
        self._unit = sizes.vae.scale_factor if sizes else 1
        # adapt(component, graph) -> the graph to run instead; None for that one
        self.adapt: Callable[[str, Path], Adapted | None] = lambda component, graph: None
        self._transformer_is_new = False

    def builds(self) -> dict[str, str]:
        """Return the names of the builds, as a picture stores them."""
        encoder, build = self._builds["text_encoder"], self._builds["transformer"]
        mixed = {"text_encoder_precision": encoder.precision} if encoder is not build else {}
        return {"precision": build.precision, "flavour": build.flavour, **mixed}

    def in_bands(self, channels: int) -> bool:
        """Whether the autoencoder's graphs compute bands of rows, if it has that many channels at full size."""
        build = self._builds["vae_decoder"]
        current = build.components["vae_decoder"].graph_format >= BANDS_SINCE and build.flavour == "ort"
        return current and build.precision in PRECISIONS_IN_BANDS and channels >= BAND_CHANNELS

    @property
    def only_static(self) -> bool:
        """Whether there are only static builds, which draw nothing but their own sizes."""
        return self._builds["transformer"].shape is not None

    @property
    def keeps_references(self) -> bool:
        """Whether there are the graphs that keep keys and values of references."""
        return all(name in self._builds[name].components for name in KV_COMPONENTS)

    def defaults(self) -> dict[str, int]:
        """Return the width, height and max_sequence_length of a static build that is the only one; else nothing."""
        shape = self._builds["transformer"].shape
        if shape is None:
            return {}
        return {"width": shape.width, "height": shape.height, "max_sequence_length": shape.text_seq}

    def fitted(self, request: ResolvedRequest) -> ResolvedRequest:
        """Check that there are graphs for a request; where there are only static ones, whole pictures are encoded.

        Raises:
            UsageError: There are only static builds, and it asks for something else than one of them draws.
        """
        encoder = self._builds["text_encoder"].shape
        if request.kv and request.looks_at_pictures and not (self.only_static or self.keeps_references):
            raise UsageError(
                f"kv keeps what is read of references, but {self._root} has no graphs for that: add them with fluxonnx "
                f"export {Checkpoint(self._root).export_place} {self._builds['transformer'].flags} --kv, or turn it off"
            )
        if not self.only_static:
            if encoder and encoder.text_seq != request.max_sequence_length:
                raise UsageError(self._unfit(f"a prompt of {request.max_sequence_length} tokens"))
            return request
        if request.image is not None and request.strength == 0:
            return request
        if request.references:
            raise UsageError(self._unfit("a picture with references"))
        if request.tile is not None and request.tile < max(request.width, request.height):
            raise UsageError(self._unfit("decoding in tiles"))
        wanted = Shape(request.width, request.height, request.max_sequence_length)
        if all(build.shape != wanted for build in self._static):
            what = f"{wanted.width}x{wanted.height} from a prompt of {wanted.text_seq} tokens"
            raise UsageError(self._unfit(what, wanted))
        return replace(request, tile=max(request.width, request.height))  # tiles as large as the picture are none

    def _unfit(self, what: str, wanted: Shape | None = None) -> str:
        """Return the message for something that static builds can't draw, with the commands that help."""
        build = self._static[0] if self._static else self._builds["text_encoder"]
        drawn = ", ".join(
            f"{b.shape.width}x{b.shape.height} from {b.shape.text_seq} tokens" for b in self._static if b.shape
        )
        export = f"fluxonnx export {Checkpoint(self._root).export_place}"
        other = f", or for that size with {export} {build.flags_for(wanted)}" if wanted else ""
        return (
            f"{what} was asked for, but the {build.precision} {build.flavour} graphs of {self._root} are static, for "
            f"{drawn or build.shape} without references: add graphs for everything with {export} "
            f"{build.flags_for(None)}{other}"
        )

    def _build_for(self, component: str, fits: Callable[[Shape], bool]) -> Build:
        """Return the static build with a graph for what is wanted, else the one for any size."""
        static = (b for b in self._static if b.shape and component in b.components and fits(b.shape))
        return next(static, self._builds[component])

    def _load(self, component: str, build: Build) -> Runner:
        found = build.components[component]
        # onnxruntime would only say "system error number 13"
        for name in (found.graph, *found.weights, *depended_on(found)):
            check_readable(self._root / name)
        # Another process may export the build again while this one uses it.
        with unchanged({self._root / name: digest for name, digest in found.files.items()}):
            options = replace(self._options, adapted=self.adapt(component, self._root / found.graph))
            return self._engine(self._root / found.graph, component, build, options)

    def _run(self, component: str, runner: Runner, /, **inputs: np.ndarray) -> list[np.ndarray]:
        outputs = runner.run(**inputs)
        if self._options.watch is not None:
            self._options.watch(GraphRan(component, inputs, outputs))
        return outputs

    @contextmanager
    def _loaded(self, component: str, build: Build) -> Iterator[Graph]:
        """Load a graph for the length of a `with` block."""
        if self._options.keep_loaded:
            yield self._keep(component, build)
            return
        runner = self._load(component, build)
        try:
            yield partial(self._run, component, runner)
        finally:
            runner.close()

    def _keep(self, component: str, build: Build) -> Graph:
        """Load a graph until it is released, or that of another build is wanted."""
        if component in self._kept and self._kept[component][0] is not build:
            self.close(component)
        if component not in self._kept:
            self._kept[component] = build, self._load(component, build)
        return partial(self._run, component, self._kept[component][1])

    def release(self, component: str) -> None:
        """Free the memory of a graph that is no more needed for now; it is loaded again when it is."""
        if not self._options.keep_loaded:
            self.close(component)

    def close(self, *components: str) -> None:
        """Free the memory of some graphs, or of all; they are loaded again when they are needed."""
        for component in components or tuple(self._kept):
            if component in self._kept:
                self._kept.pop(component)[1].close()

    def prompt_embeds(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """int64 [batch, seq] twice -> f32 [batch, seq, 3 * hidden]; it stays loaded until released."""
        build = self._encoder_for(input_ids.shape[1])
        if "text_encoder" not in self._kept:
            encoder, transformer = self._spans("text_encoder", input_ids), self._spans("transformer")
            self._transformer_is_new |= not self._resident(transformer)
            # the transformer's weights are read while the encoder computes
            self._read_ahead([*encoder, *transformer], self._options.free_memory())
        graph = self._keep("text_encoder", build)
        if build.shape is None:
            return graph(input_ids=input_ids, attention_mask=attention_mask)[0]
        rows = zip(input_ids, attention_mask, strict=True)
        return np.concatenate([graph(input_ids=ids[None], attention_mask=mask[None])[0] for ids, mask in rows])

    def _encoder_for(self, length: int) -> Build:
        own = self._builds["text_encoder"]
        if own.precision != self._builds["transformer"].precision:  # static builds have another one's encoder
            return own
        found = self._build_for("text_encoder", lambda shape: shape.text_seq == length)
        if found.shape and found.shape.text_seq != length:
            raise UsageError(self._unfit(f"a prompt of {length} tokens"))
        return found

    def encode_images(self, samples: list[np.ndarray], tiling: Tiling) -> list[np.ndarray]:
        """f32 [1, 3, height, width] in [-1, 1] each -> normalised latents f32 [1, channels, height/16, width/16]."""
        sizes = {sample.shape[2:] for sample in samples}

        def fits(shape: Shape) -> bool:
            return {(shape.height, shape.width)} == sizes and not _divides(tiling, shape)

        with self._loaded("vae_encoder", self._build_for("vae_encoder", fits)) as graph:

            def encode(sample: np.ndarray) -> np.ndarray:
                return graph(sample=sample)[0]

            return [in_tiles(encode, sample, tiling, tiling.unit, 1) for sample in samples]

    def decode(self, latents: np.ndarray, tiling: Tiling) -> np.ndarray:
        """Latents f32 [1, channels, rows, columns] -> f32 [1, 3, height, width], about in [-1, 1].

        "vae_decoder" stays loaded until it is released.
        """
        size = tuple(self._unit * side for side in latents.shape[2:])

        def fits(shape: Shape) -> bool:
            return (shape.height, shape.width) == size and not _divides(tiling, shape)

        build = self._build_for("vae_decoder", fits)
        graph = self._keep("vae_decoder", build)
        if build.shape and not fits(build.shape):  # a preview, and there is no other decoder
            rows, columns = build.shape.height // self._unit, build.shape.width // self._unit
            return graph(latents=_repeated(latents, rows, columns))[0][..., : size[0], : size[1]]

        def decode_tile(tile: np.ndarray) -> np.ndarray:
            return graph(latents=tile)[0]

        return in_tiles(decode_tile, latents, tiling, 1, tiling.unit)

    @contextmanager
    def transformer(self, shape: Shape | None = None, cached: bool = False) -> Iterator[Transformer]:
        """Load the transformer for the length of a `with` block.

        Args:
            shape: What is drawn, if that is one picture without references; its batches are drawn one by one by a
                static build.
            cached: Whether it is the one that attends to references by what `kept` returned.
        """
        name = "transformer_cached" if cached else "transformer"
        build = self._builds[name] if cached else self._build_for(name, lambda known: known == shape)
        spans, free = self._spans(name), self._options.free_memory()
        self._read_ahead(spans, free)
        with self._prefault(spans if self._transformer_is_new else (), free) as prefault:
            self._transformer_is_new = False
            with self._loaded("conditioning", build) as conditioning, self._loaded(name, build) as graph:
                prefault.wait()
                yield Transformer(conditioning, graph, static=build.shape is not None)

    def kept(self, tokens: np.ndarray, ids: np.ndarray) -> Kept:
        """Return the keys and values of reference tokens, for all steps of all pictures that look at them.

        Args:
            tokens: f32 [1, reference_seq, channels].
            ids: int64 [reference_seq, 4].

        Returns:
            f32 [1, reference_seq, dim] each, by the names of the graph's outputs.
        """
        build = self._builds["references"]
        self._read_ahead(self._spans("references"), self._options.free_memory())
        with self._loaded("conditioning", build) as conditioning:
            # no matter in which of the two inputs an id is, and few runtimes like empty ones
            tables = conditioning(timestep=np.full(1, timestep(np.float32(0))), txt_ids=ids[:1], img_ids=ids[1:])
        proj, cos, sin = tables
        with self._loaded("references", build) as graph:
            found = graph(hidden_states=tokens, timestep_proj=proj, rotary_cos=cos, rotary_sin=sin)
        names = [f"{kind}_{i}" for i in range(len(found) // 2) for kind in ("key", "value")]
        return dict(zip(names, found, strict=True))

    def _spans(self, component: str, input_ids: np.ndarray | None = None) -> list[Span]:
        """Return the parts of files that a graph needs, in the order in which it does.

        A build that points into the checkpoint's files has no weights of its own, and needs only a part of those. Of
        the text encoder's table of embeddings, only the rows of `input_ids` are needed.
        """
        files = self._builds[component].components[component]
        spans = [whole_file(self._root / files.graph)]
        for name in files.weights:
            if input_ids is None:
                spans.append(whole_file(self._root / name))
            else:
                spans += rows_and_rest(self._root / name, EMBEDDING_TABLE, np.unique(input_ids))
        return spans


def _divides(tiling: Tiling, shape: Shape) -> bool:
    """Whether pictures are divided into tiles."""
    return tiling.tile is not None and tiling.tile < max(shape.width, shape.height)


def _repeated(latents: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Fill [1, channels, rows, columns] with latents that are smaller, mirrored: norms over them change little."""
    missing = [(0, 0), (0, 0), (0, rows - latents.shape[2]), (0, columns - latents.shape[3])]
    return np.pad(latents, missing, mode="symmetric")


def _check_sizes(root: Path, builds: Sequence[tuple[str, Build]], sizes: Architecture) -> None:
    """Compare the manifest, from which the shapes of inputs are computed, with the graphs: of what both know."""
    for name, build in builds:
        graph = build.components[name].graph
        expected = json.loads(sizes.component_json(name))
        for key, value in graph_architecture(root / graph).items():
            if key in expected and expected[key] != value:
                raise CheckpointError(
                    f"{root / FILE_NAME} says that {FOLDERS[name]}.{key} is {shown(expected[key])}, but {graph} was "
                    f"made for {shown(value)}: run fluxonnx export -d {root} {build.flags} --force"
                )


class Transformer:
    """The transformer, and the sinusoids that it is conditioned on."""

    def __init__(self, conditioning: Graph, graph: Graph, static: bool = False) -> None:
        """Wrap the graphs; static ones take one picture at a time, and tables of one size."""
        self._conditioning, self._graph, self._static = conditioning, graph, static

    def velocity(self, prompt_embeds: np.ndarray, img_ids: np.ndarray, kept: Kept | None = None) -> Velocity:
        """Return the velocity as a function of latents and sigma.

        Args:
            prompt_embeds: f32 [batch, text_seq, 3 * hidden].
            img_ids: int64 [image_seq, 4] of the latent tokens.
            kept: Of `Models.kept`, f32 [batch, reference_seq, dim] each; None for a transformer without.
        """
        txt_ids = text_ids(prompt_embeds.shape[1])
        rotary: list[np.ndarray] = []

        def velocity(latents: np.ndarray, sigma: np.float32) -> np.ndarray:
            # One row for the whole batch, broadcast in the graph: matrix-vector products are rounded differently from
            # matrix-matrix products, and a picture out of a batch has to be what it is alone.
            time = np.full(1, timestep(sigma), np.float32)
            # The tables are the same at each step: they are made once, and may stay in the memory of a device.
            rows = 1 if rotary and not self._static else None
            timestep_proj, *made = self._conditioning(timestep=time, txt_ids=txt_ids[:rows], img_ids=img_ids[:rows])
            rotary[:] = rotary or made
            tables = {"timestep_proj": timestep_proj, "rotary_cos": rotary[0], "rotary_sin": rotary[1]}

            def run(latents: np.ndarray, embeds: np.ndarray) -> np.ndarray:
                return self._graph(hidden_states=latents, encoder_hidden_states=embeds, **tables, **(kept or {}))[0]

            if not self._static:
                return run(latents, prompt_embeds)
            rows_of_batch = zip(latents, prompt_embeds, strict=True)
            return np.concatenate([run(tokens[None], embeds[None]) for tokens, embeds in rows_of_batch])

        return velocity
