"""The five graphs of a build: their sizes, from the config files, and how each is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.manifest import Shape
from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.contract import COMPONENT_CLASSES, COMPONENTS, FOLDERS, KV_COMPONENTS, MAX_SEQUENCE_LENGTH, Architecture
from fluxonnx.errors import CheckpointError, UsageError
from fluxonnx.export import conditioning, text_encoder, transformer, vae
from fluxonnx.export.balance import Coupling
from fluxonnx.export.graph import Graph
from fluxonnx.export.ops import ModelBuilder
from fluxonnx.export.precisions import Precision, Prepared, make_precision
from fluxonnx.ports import fixed_dims, graph_ports
from fluxonnx.version import __version__

# Opset 23 has RMSNormalization; 17 is the oldest with LayerNormalization, and the newest that all other runtimes load.
FLAVOURS = {"ort": 23, "portable": 17}
OPSETS = {"ort": range(17, 24), "portable": range(17, 22)}


@dataclass(frozen=True)
class Target:
    """What graphs are built for.

    Attributes:
        precision: How weights are stored and linear layers computed.
        flavour: "ort" or "portable".
        opset: The ai.onnx opset.
        shape: What a static build draws; None for any size.
        shard_size: The most bytes of weights in a file of the build; None for no limit.
    """

    precision: Precision
    flavour: str
    opset: int
    shape: Shape | None = None
    shard_size: int | None = None

    def settings(self) -> dict[str, str]:
        """Return what tells a build for it from others of the same precision and flavour."""
        own = {"shape": str(self.shape) if self.shape else "", "shard_size": str(self.shard_size or "")}
        return {**self.precision.settings(), **{key: value for key, value in own.items() if value}}


def make_target(
    precision: str | Precision,
    flavour: str,
    opset: int | None,
    keep: str | None = None,
    block: int | None = None,
    rotate: bool = False,
    shape: Shape | None = None,
    shard_size: int | None = None,
) -> Target:
    """Validate the options.

    Raises:
        UsageError: The precision or the flavour is unknown, the precision does not have one of the options, the flavour
            does not support the opset, the text is longer than any, or there are no weight files to divide.
    """
    if shape and not 1 <= shape.text_seq <= MAX_SEQUENCE_LENGTH:
        raise UsageError(f"--text-seq {shape.text_seq} is out of range: 1 to {MAX_SEQUENCE_LENGTH} tokens")
    chosen = precision if isinstance(precision, Precision) else make_precision(precision, keep, block, rotate)
    if shard_size is not None and not (chosen.self_contained or chosen.converts):
        raise UsageError(f"--shard-size is for builds that write weights, but {chosen.name} leaves them where they are")
    if shard_size is not None and shard_size < 1:
        raise UsageError(f"--shard-size {shard_size} is out of range: 1 byte at least")
    if flavour not in FLAVOURS:
        raise UsageError(f"flavour {flavour!r} is unknown: choose one of {', '.join(FLAVOURS)}")
    if flavour not in chosen.flavours:
        raise UsageError(f"{chosen.name} graphs are of the flavour {' or '.join(chosen.flavours)}, not {flavour}")
    lowest = max(OPSETS[flavour][0], chosen.lowest_opset(flavour))
    allowed = range(lowest, OPSETS[flavour][-1] + 1)
    opset = max(FLAVOURS[flavour], lowest) if opset is None else opset
    if opset not in allowed:
        which = f"{chosen.name} {flavour}" if lowest > OPSETS[flavour][0] else flavour
        raise UsageError(f"opset {opset} is out of range: {which} graphs can be {allowed[0]} to {allowed[-1]}")
    return Target(chosen, flavour, opset, shape, shard_size)


def select(components: Sequence[str] | None, kv: bool, shape: object = None) -> list[str]:
    """Return the components to export, in order.

    Args:
        components: Their names; None for all.
        kv: Whether those that keep keys and values of references are among all.
        shape: What a static build draws, which has no references; None for a build of any size.

    Raises:
        UsageError: One of them does not exist, or not in a static build.
    """
    for name in components or ():
        if name not in FOLDERS:
            raise UsageError(f"component {name!r} is unknown: choose from {', '.join(FOLDERS)}")
        if name in KV_COMPONENTS and shape:
            raise UsageError(
                f"component {name} is for pictures with references, which static builds do not draw: leave out --shape"
            )
    whole = FOLDERS if kv and not shape else COMPONENTS
    return [name for name in FOLDERS if (name in components if components else name in whole)]


def make_passes(
    precision: str | Precision,
    text_encoder_precision: str | None,
    names: list[str],
    flavour: str,
    opset: int | None,
    *,
    keep: str | None = None,
    block: int | None = None,
    rotate: bool = False,
    shape: Shape | None = None,
    shard_size: int | None = None,
) -> list[tuple[Target, list[str]]]:
    """Validate the options, and return the graphs to export for each build.

    Args:
        precision: See `exporter.export`.
        text_encoder_precision: Likewise.
        names: The graphs that are wanted.
        flavour: Likewise.
        opset: Likewise.
        keep: Likewise. This and the others apply to the build that has them, and to both if both have.
        block: Likewise.
        rotate: Likewise.
        shape: What a static build draws; of both.
        shard_size: The most bytes of weights in a file; of both, but for a build that writes none.

    Raises:
        UsageError: As `make_target`.
    """
    first = precision if isinstance(precision, str) else precision.name
    second = text_encoder_precision or first
    if second == first:
        return [(make_target(precision, flavour, opset, keep, block, rotate, shape, shard_size), names)]

    def settings(name: str, other: str) -> tuple[str | None, int | None, bool]:
        """Leave out what the other build has and this one has not."""

        def foreign(*having: str) -> bool:
            return name not in having and other in having

        return (
            None if foreign("int8", "int4") else keep,
            None if foreign("int4") else block,
            rotate and not foreign("int8"),
        )

    encoder = make_target(second, flavour, opset, *settings(second, first), shape, _if_written(second, shard_size))
    rest = make_target(precision, flavour, opset, *settings(first, second), shape, _if_written(first, shard_size))
    passes = [
        (encoder, [name for name in names if name == "text_encoder"]),
        (rest, [name for name in names if name != "text_encoder"]),
    ]
    return [item for item in passes if item[1]]


def _if_written(precision: str, shard_size: int | None) -> int | None:
    """Return the size of shards for a build that writes weights; None for one of two builds that does not."""
    return None if precision == Precision.name else shard_size


def read_architecture(checkpoint: Checkpoint, out_layers: tuple[int, ...] | None) -> Architecture:
    """Read the config files of all parts.

    Args:
        checkpoint: The model directory.
        out_layers: The hidden states that make up prompt_embeds; by default as `text_encoder.read_config` chooses.

    Raises:
        CheckpointError: One of them is wrong, or they do not fit together.
    """
    text, flux, autoencoder = (checkpoint.config(*item) for item in _CONFIGS)
    sizes = Architecture(
        text_encoder.read_config(text, out_layers), transformer.read_config(flux), vae.read_config(autoencoder)
    )
    if sizes.transformer.text_dim != sizes.text_encoder.embedding_dim:
        raise CheckpointError(
            f'{checkpoint.root}: transformer "joint_attention_dim" is {sizes.transformer.text_dim}, but the text '
            f"encoder gives {sizes.text_encoder.embedding_dim}: the folders come from different models"
        )
    if sizes.transformer.in_channels != sizes.vae.patch_channels:
        raise CheckpointError(
            f'{checkpoint.root}: transformer "in_channels" is {sizes.transformer.in_channels}, but the VAE gives '
            f"{sizes.vae.patch_channels}: the folders come from different models"
        )
    return sizes


_CONFIGS = [(name, COMPONENT_CLASSES[name]) for name in ("text_encoder", "transformer", "vae")]


def prepare(component: str, sizes: Architecture, target: Target, tensors: dict[str, Tensor]) -> Prepared:
    """Return what a precision makes of the weights of a graph; of all graphs of the transformer it is the same."""
    couplings: list[Coupling] = []
    unused: tuple[str, ...] = ()
    if component in ("transformer", *KV_COMPONENTS):
        couplings = transformer.couplings(sizes.transformer)
    elif component == "text_encoder":
        couplings, unused = text_encoder.couplings(sizes.text_encoder), text_encoder.unused(sizes.text_encoder)
    used = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}
    return target.precision.prepared(used, couplings)


def build_graph(
    component: str,
    sizes: Architecture,
    target: Target,
    tensors: dict[str, Tensor],
    metadata: Mapping[str, str],
    prepared: Prepared | None = None,
) -> Graph:
    """Build a graph and check that it uses every tensor of the checkpoint that it should.

    Args:
        component: One of `contract.FOLDERS`.
        sizes: The model's.
        target: What it is built for.
        tensors: The checkpoint's weights of its part.
        metadata: What it says about itself.
        prepared: What `prepare` returned; None for doing that here.

    Raises:
        CheckpointError: A tensor is missing, left over, or of the wrong shape.
    """
    unused: tuple[str, ...] = ()
    prepared = prepared or prepare(component, sizes, target, tensors)
    opset = target.precision.opset(component, target.opset)
    dims = fixed_dims(sizes, target.shape) if target.shape else None
    g = ModelBuilder(component, prepared.precision, target.flavour, opset, {**tensors, **prepared.tensors}, dims)
    ports = graph_ports(component, sizes)
    if component == "conditioning":
        conditioning.build(g, sizes.transformer, ports)
        unused = ("",)  # it has no weights
    elif component == "transformer":
        transformer.build(g, sizes.transformer, ports)
    elif component == "transformer_cached":
        transformer.build_cached(g, sizes.transformer, ports)
    elif component == "references":
        transformer.build_references(g, sizes.transformer, ports)
        unused = ("",)  # it has those of one stream, which the transformer has, too
    elif component == "text_encoder":
        text_encoder.build(g, sizes.text_encoder, ports)
        unused = text_encoder.unused(sizes.text_encoder)
    elif component == "vae_encoder":
        vae.build_encoder(g, sizes.vae, ports)
        unused = vae.UNUSED_BY_ENCODER
    else:
        vae.build_decoder(g, sizes.vae, ports)
        unused = vae.UNUSED_BY_DECODER
    left_over = [name for name in tensors if name not in g.used and not name.startswith(unused)]
    if left_over:
        more = f" and {len(left_over) - 1} more" if len(left_over) > 1 else ""
        raise CheckpointError(
            f"{component}: tensor {left_over[0]} {list(tensors[left_over[0]].shape)}{more} is not part of the model "
            "that config.json describes: config.json and weights do not belong together"
        )
    doc = f"{component} of {metadata['model']}, exported by fluxonnx {__version__}"
    graph = g.finish(doc, dict(metadata))
    return graph if component in KV_COMPONENTS else replace(graph, errors=prepared.errors, kept=prepared.kept)
