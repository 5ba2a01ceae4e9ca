"""The inputs and outputs of the graphs of a build: names, dtypes and shapes, on which other runtimes depend."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fluxonnx.checkpoint.manifest import Shape
from fluxonnx.contract import Architecture, TransformerConfig, VaeConfig


@dataclass(frozen=True)
class Port:
    """An input or an output of a graph: "F32" or "I64", with symbolic dimensions by name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    doc: str


@dataclass(frozen=True)
class Ports:
    """The inputs and outputs of a graph; names and shapes are fixed, other runtimes depend on them."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def graph_ports(component: str, sizes: Architecture) -> Ports:
    """Return the inputs and outputs of one of `contract.FOLDERS`."""
    return {
        "text_encoder": _text_encoder_ports,
        "conditioning": _conditioning_ports,
        "transformer": _transformer_ports,
        "references": _references_ports,
        "transformer_cached": _cached_ports,
        "vae_encoder": _vae_encoder_ports,
        "vae_decoder": _vae_decoder_ports,
    }[component](sizes)


def _text_encoder_ports(sizes: Architecture) -> Ports:
    c = sizes.text_encoder
    layers = ", ".join(map(str, c.out_layers))
    return Ports(
        (
            Port("input_ids", "I64", ("batch", "text_seq"), "tokens, padded on the right"),
            Port("attention_mask", "I64", ("batch", "text_seq"), "1 for tokens, 0 for padding"),
        ),
        (
            Port(
                "prompt_embeds",
                "F32",
                ("batch", "text_seq", c.embedding_dim),
                f"hidden states {layers}, side by side",
            ),
        ),
    )


def _conditioning_ports(sizes: Architecture) -> Ports:
    c = sizes.transformer
    return Ports(
        (
            Port("timestep", "F32", ("batch",), "sigma of each picture, in [0, 1]"),
            Port("txt_ids", "I64", ("text_seq", 4), "(t, h, w, l) of each text token: (0, 0, 0, i); below 4096"),
            Port("img_ids", "I64", ("image_seq", 4), "(t, h, w, l) of each image token, then each reference token"),
        ),
        (
            Port("timestep_proj", "F32", ("batch", c.timestep_channels), "timestep features"),
            *(
                Port(name, "F32", ("text_seq + image_seq", c.head_dim), "rotary embedding of each token")
                for name in ("rotary_cos", "rotary_sin")
            ),
        ),
    )


def _transformer_ports(sizes: Architecture) -> Ports:
    c = sizes.transformer
    return Ports(
        (
            Port(
                "hidden_states",
                "F32",
                ("batch", "image_seq", c.in_channels),
                "noisy latent tokens, then the tokens of reference images",
            ),
            Port("encoder_hidden_states", "F32", ("batch", "text_seq", c.text_dim), "prompt_embeds of text_encoder"),
            Port("timestep_proj", "F32", ("batch", c.timestep_channels), "timestep features of conditioning"),
            *(
                Port(name, "F32", ("text_seq + image_seq", c.head_dim), f"{name} of conditioning")
                for name in ("rotary_cos", "rotary_sin")
            ),
        ),
        (
            Port(
                "velocity",
                "F32",
                ("batch", "image_seq", c.out_channels),
                "noise minus picture, for every token of hidden_states; keep the noisy ones",
            ),
        ),
    )


def _references_ports(sizes: Architecture) -> Ports:
    c = sizes.transformer
    return Ports(
        (
            Port("hidden_states", "F32", ("batch", "reference_seq", c.in_channels), "the tokens of reference images"),
            Port("timestep_proj", "F32", ("batch", c.timestep_channels), "timestep features of conditioning, at 0"),
            *(
                Port(name, "F32", ("reference_seq", c.head_dim), f"{name} of conditioning")
                for name in ("rotary_cos", "rotary_sin")
            ),
        ),
        _kept(c, "that the reference tokens have in"),
    )


def _cached_ports(sizes: Architecture) -> Ports:
    plain = _transformer_ports(sizes)
    image, *others = plain.inputs
    return Ports(
        (replace(image, doc="noisy latent tokens"), *others, *_kept(sizes.transformer, "of references in")),
        (replace(plain.outputs[0], doc="noise minus picture, for every token of hidden_states"),),
    )


def _kept(c: TransformerConfig, where: str) -> tuple[Port, ...]:
    """Return the keys and values of all blocks: those of two streams, then those of one."""
    shape = ("batch", "reference_seq", c.dim)
    nouns = {"key": "keys, rotated,", "value": "values"}
    return tuple(
        Port(f"{kind}_{i}", "F32", shape, f"{noun} {where} block {i}, heads side by side")
        for i in range(c.double_layers + c.single_layers)
        for kind, noun in nouns.items()
    )


def fixed_dims(sizes: Architecture, shape: Shape) -> dict[str, int]:
    """Return what the symbolic dimensions of `graph_ports` are in a static build."""
    unit = sizes.vae.scale_factor
    rows, columns = shape.height // unit, shape.width // unit
    return {
        "batch": 1,
        "text_seq": shape.text_seq,
        "image_seq": rows * columns,
        "text_seq + image_seq": shape.text_seq + rows * columns,
        "height": shape.height,
        "width": shape.width,
        f"height/{unit}": rows,
        f"width/{unit}": columns,
    }


def plain_symbol(dim: str) -> str:
    """Return a dimension's name in portable graphs: `joint_seq` for text_seq + image_seq, `latent_width` for width/16.

    Other runtimes take arithmetic in a name for a mistake, or for a sum of dimensions that they don't know.
    """
    if "+" in dim:
        return "joint_seq"
    return f"latent_{dim.partition('/')[0]}" if "/" in dim else dim


def _latents(c: VaeConfig, doc: str) -> Port:
    shape = ("batch", c.patch_channels, f"height/{c.scale_factor}", f"width/{c.scale_factor}")
    return Port("latents", "F32", shape, doc)


def _vae_encoder_ports(sizes: Architecture) -> Ports:
    c = sizes.vae
    doc = f"RGB in [-1, 1]; height and width multiples of {c.scale_factor}"
    return Ports(
        (Port("sample", "F32", ("batch", c.in_channels, "height", "width"), doc),),
        (_latents(c, "mode of the posterior, in 2x2 patches, normalised"),),
    )


def _vae_decoder_ports(sizes: Architecture) -> Ports:
    c = sizes.vae
    doc = "RGB, in [-1, 1] but for overshoot: clip it"
    return Ports(
        (_latents(c, "normalised latents in 2x2 patches"),),
        (Port("sample", "F32", ("batch", c.out_channels, "height", "width"), doc),),
    )
