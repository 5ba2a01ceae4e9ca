"""The five graphs of a build as functions of arrays, each loaded only while it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from fluxonnx.checkpoint.digests import unchanged
from fluxonnx.checkpoint.graphs import graph_architecture
from fluxonnx.checkpoint.manifest import DEFAULT_FLAVOUR, FILE_NAME, Build, depended_on
from fluxonnx.checkpoint.reading import check_readable, shown
from fluxonnx.contract import COMPONENTS, EMBEDDING_TABLE, Architecture, text_ids
from fluxonnx.errors import CheckpointError
from fluxonnx.lora.adapted import Adapted
from fluxonnx.runtime.engine import Runner, SessionOptions
from fluxonnx.runtime.engines import engine_for
from fluxonnx.runtime.events import GraphRan
from fluxonnx.runtime.prefault import Prefault, Span, read_ahead, resident, rows_and_rest, whole_file
from fluxonnx.runtime.sampler import Velocity
from fluxonnx.runtime.schedule import timestep
from fluxonnx.runtime.tiles import Tiling, in_tiles

# graph(name=input, ...) -> outputs
Graph = Callable[..., list[np.ndarray]]


class Models:
    """A build's graphs. A picture never needs two large ones at once, so at most one of them holds memory at a time."""

    def __init__(
        self,
        root: Path,
        build: Build,
        options: SessionOptions,
        sizes: Architecture | None = None,
        *,
        encoder: Build | None = None,
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
            resident: Tells whether weights are in memory; this and the others are parameters for tests.
            read_ahead: Has weights read in the background.
            prefault: Touches weights in the background.

        Raises:
            CheckpointError: A graph of the build was never exported, or is of a model of other sizes.
        """
        self._builds = {name: encoder if encoder and name == "text_encoder" else build for name in COMPONENTS}
        missing = [(name, part) for name, part in self._builds.items() if name not in part.components]
        for name, part in missing:
            raise CheckpointError(
                f"{root} lacks the {name} graph: run fluxonnx export -d {root} --precision {part.precision} "
                f"--flavour {part.flavour}"
            )
        if sizes is not None:
            _check_sizes(root, self._builds, sizes)
        self._root, self._options = root, options
        self._engine = options.engine or engine_for(options.provider)
        self._resident, self._read_ahead, self._prefault = resident, read_ahead, prefault
        self._kept: dict[str, Runner] = {}
        # adapt(component, graph) -> the graph to run instead; None for that one
        self.adapt: Callable[[str, Path], Adapted | None] = lambda component, graph: None
        self._transformer_is_new = False

    def builds(self) -> dict[str, str]:
        """Return the names of the builds, as a picture stores them."""
        encoder, build = self._builds["text_encoder"], self._builds["transformer"]
        mixed = {"text_encoder_precision": encoder.precision} if encoder is not build else {}
        return {"precision": build.precision, "flavour": build.flavour, **mixed}

    def _load(self, component: str) -> Runner:
        build = self._builds[component]
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
    def _loaded(self, component: str) -> Iterator[Graph]:
        """Load a graph for the length of a `with` block."""
        runner = self._load(component)
        try:
            yield partial(self._run, component, runner)
        finally:
            runner.close()

    def _keep(self, component: str) -> Graph:
        """Load a graph until it is released."""
        if component not in self._kept:
            self._kept[component] = self._load(component)
        return partial(self._run, component, self._kept[component])

    def release(self, component: str) -> None:
        """Free the memory of a graph that stays loaded; it is loaded again when it is needed."""
        runner = self._kept.pop(component, None)
        if runner is not None:
            runner.close()

    def prompt_embeds(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """int64 [batch, seq] twice -> f32 [batch, seq, 3 * hidden]; it stays loaded until released."""
        if "text_encoder" not in self._kept:
            encoder, transformer = self._spans("text_encoder", input_ids), self._spans("transformer")
            self._transformer_is_new |= not self._resident(transformer)
            # the transformer's weights are read while the encoder computes
            self._read_ahead([*encoder, *transformer], self._options.free_memory())
        return self._keep("text_encoder")(input_ids=input_ids, attention_mask=attention_mask)[0]

    def encode_images(self, samples: list[np.ndarray], tiling: Tiling) -> list[np.ndarray]:
        """f32 [1, 3, height, width] in [-1, 1] each -> normalised latents f32 [1, channels, height/16, width/16]."""
        with self._loaded("vae_encoder") as graph:

            def encode(sample: np.ndarray) -> np.ndarray:
                return graph(sample=sample)[0]

            return [in_tiles(encode, sample, tiling, tiling.unit, 1) for sample in samples]

    def decode(self, latents: np.ndarray, tiling: Tiling) -> np.ndarray:
        """Latents f32 [1, channels, rows, columns] -> f32 [1, 3, height, width], about in [-1, 1].

        "vae_decoder" stays loaded until it is released.
        """
        graph = self._keep("vae_decoder")

        def decode_tile(tile: np.ndarray) -> np.ndarray:
            return graph(latents=tile)[0]

        return in_tiles(decode_tile, latents, tiling, 1, tiling.unit)

    @contextmanager
    def transformer(self) -> Iterator[Transformer]:
        """Load the transformer for the length of a `with` block."""
        spans, free = self._spans("transformer"), self._options.free_memory()
        self._read_ahead(spans, free)
        with self._prefault(spans if self._transformer_is_new else (), free) as prefault:
            self._transformer_is_new = False
            with self._loaded("conditioning") as conditioning, self._loaded("transformer") as graph:
                prefault.wait()
                yield Transformer(conditioning, graph)

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


def _check_sizes(root: Path, builds: Mapping[str, Build], sizes: Architecture) -> None:
    """Compare the manifest, from which the shapes of inputs are computed, with the graphs: of what both know."""
    for name, build in builds.items():
        graph = build.components[name].graph
        expected = json.loads(sizes.component_json(name))
        for key, value in graph_architecture(root / graph).items():
            if key in expected and expected[key] != value:
                flavour = "" if build.flavour == DEFAULT_FLAVOUR else f" --flavour {build.flavour}"
                raise CheckpointError(
                    f"{root / FILE_NAME} says that {COMPONENTS[name]}.{key} is {shown(expected[key])}, but {graph} was "
                    f"made for {shown(value)}: run fluxonnx export -d {root} --precision {build.precision}{flavour} "
                    "--force"
                )


class Transformer:
    """The transformer, and the sinusoids that it is conditioned on."""

    def __init__(self, conditioning: Graph, graph: Graph) -> None:
        self._conditioning, self._graph = conditioning, graph

    def velocity(self, prompt_embeds: np.ndarray, img_ids: np.ndarray) -> Velocity:
        """Return the velocity as a function of latents and sigma.

        Args:
            prompt_embeds: f32 [batch, text_seq, 3 * hidden].
            img_ids: int64 [image_seq, 4] of the latent tokens.
        """
        txt_ids = text_ids(prompt_embeds.shape[1])

        def velocity(latents: np.ndarray, sigma: np.float32) -> np.ndarray:
            # One row for the whole batch, broadcast in the graph: matrix-vector products are rounded differently from
            # matrix-matrix products, and a picture out of a batch has to be what it is alone.
            time = np.full(1, timestep(sigma), np.float32)
            timestep_proj, cos, sin = self._conditioning(timestep=time, txt_ids=txt_ids, img_ids=img_ids)
            return self._graph(
                hidden_states=latents,
                encoder_hidden_states=prompt_embeds,
                timestep_proj=timestep_proj,
                rotary_cos=cos,
                rotary_sin=sin,
            )[0]

        return velocity
