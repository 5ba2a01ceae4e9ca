"""What is read from LoRA files is what their formats mean, by formulas in float64; other files are named."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from fluxonnx.errors import CheckpointError
from fluxonnx.lora.file import read_lora
from tests.lora.making import CASE, layers_of, pair, random, weight, written

# Products of float32 matrices with few columns.
EXACT = 1e-5
ENCODER_PREFIXES = [
    "text_encoder.model.",
    "text_encoder.",
    "lora_te_",
    "lora_te1_model_",
    "text_encoders.qwen3_4b.model.",
]
A, B = "lora_A.weight", "lora_B.weight"
BLOCK, SINGLE = "transformer_blocks.0", "single_transformer_blocks.2.attn"
# The names of layers in diffusers and in the original, that are one layer in both.
SAME = {
    f"{BLOCK}.attn.to_out.0": "double_blocks.0.img_attn.proj",
    f"{BLOCK}.attn.to_add_out": "double_blocks.0.txt_attn.proj",
    f"{BLOCK}.ff.linear_in": "double_blocks.0.img_mlp.0",
    f"{BLOCK}.ff_context.linear_out": "double_blocks.0.txt_mlp.2",
    f"{SINGLE}.to_qkv_mlp_proj": "single_blocks.2.linear1",
    f"{SINGLE}.to_out": "single_blocks.2.linear2",
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
ENDS = {"lora_A": (".lora_A.weight", ".lora_B.weight"), "lora_down": (".lora_down.weight", ".lora_up.weight")}
PEFT = (".lora_A.default.weight", ".lora_B.default.weight")
# Prefix, whether names are the original's, whether separators are underscores, the ends of keys, whether there is an
# alpha; by who writes so.
STYLES = {
    "diffusers": ("transformer.", False, False, ENDS["lora_A"], False),
    "diffusers-old": ("transformer.", False, False, (".lora.down.weight", ".lora.up.weight"), False),
    "bare": ("", False, False, ENDS["lora_A"], False),
    "peft": ("base_model.model.", False, False, PEFT, False),
    "peft-of-transformer": ("base_model.model.transformer.", False, False, PEFT, False),
    "ai-toolkit": ("diffusion_model.", True, False, ENDS["lora_A"], False),
    "ai-toolkit-expanded": ("diffusion_model.", False, False, ENDS["lora_A"], False),
    "comfyui": ("diffusion_model.", True, False, ENDS["lora_down"], True),
    "fal": ("base_model.model.", True, False, ENDS["lora_A"], False),
    "kohya": ("lora_unet_", True, True, ENDS["lora_down"], True),
    "kohya-diffusers-names": ("lora_unet_", False, True, ENDS["lora_down"], True),
    "onetrainer": ("lora_transformer_", False, True, ENDS["lora_down"], True),
    "onetrainer-dots": ("transformer.", False, False, ENDS["lora_down"], True),
    "lycoris": ("lycoris_", False, True, ENDS["lora_down"], True),
}


@pytest.fixture
def root(checkpoints):
    return checkpoints.get(CASE)


@pytest.fixture
def layers(root):
    return layers_of(root)


@pytest.fixture
def read(root, layers, tmp_path):
    """read(tensors, metadata) -> what each layer's weight is changed by, and the file's `Lora`."""

    def read(tensors, metadata=None, name="a.safetensors"):
        path = written(tmp_path / name, tensors, metadata)
        return read_lora(
            path, layers, "model", lambda component, path: weight(root, path, component).astype(np.float32)
        )

    return read


def product(pair, scale=1.0):
    down, up = (matrix.astype(np.float64) for matrix in pair)
    return scale * up @ down


def check(lora, expected, component="transformer"):
    """The changes are exactly those expected, by path."""
    found = lora.changes[component]
    assert found.keys() == expected.keys()
    for path, wanted in expected.items():
        assert np.abs(found[path].delta.whole() - wanted).max() < EXACT, path
        assert found[path].gain is None


@pytest.mark.parametrize("style", STYLES)
def test_low_rank(read, layers, style):
    prefix, original, joined, ends, has_alpha = STYLES[style]
    tensors, expected = {}, {}
    for seed, (path, name) in enumerate(SAME.items()):
        key = prefix + ((name if original else path).replace(".", "_") if joined else name if original else path)
        matrices = pair(layers.shapes["transformer"][path], seed)
        tensors |= {key + end: matrix for end, matrix in zip(ends, matrices, strict=True)}
        if has_alpha:
            tensors[f"{key}.alpha"] = np.float32(1.5)
        expected[path] = product(matrices, 1.5 / 3 if has_alpha else 1)
    lora = read(tensors)
    check(lora, expected)
    assert lora.unused == ()
    assert lora.about_unused is None


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("diffusion_model.double_blocks.0.img_attn.qkv", ("to_q", "to_k", "to_v")),
        ("lora_unet_double_blocks_0_txt_attn_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ("transformer.transformer_blocks.0.attn.to_qkv", ("to_q", "to_k", "to_v")),
        ("transformer.transformer_blocks.0.attn.to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
    ],
)
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_fused_layers_are_several(read, layers, name, paths, kind):
    dim = layers.shapes["transformer"][f"{BLOCK}.attn.to_q"][0]
    tensors, whole = delta(kind, (3 * dim, dim), name)
    expected = {f"{BLOCK}.attn.{path}": whole[i * dim : (i + 1) * dim] for i, path in enumerate(paths)}
    check(read(tensors), expected)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_the_last_modulation_swaps_its_halves(read, layers, kind):
    """The original stores (shift, scale), diffusers (scale, shift)."""
    shape = layers.shapes["transformer"]["norm_out.linear"]
    tensors, whole = delta(kind, shape, "diffusion_model.final_layer.adaLN_modulation.1")
    check(read(tensors), {"norm_out.linear": np.concatenate([whole[shape[1] :], whole[: shape[1]]])})
    tensors, whole = delta(kind, shape, "transformer.norm_out.linear")
    check(read(tensors), {"norm_out.linear": whole})


def delta(kind, shape, name):
    """The tensors of a layer, and the float64 matrix that they are."""
    n_out, n_in = shape
    if kind == "lora":
        matrices = pair(shape, 5)
        return {f"{name}.lora_A.weight": matrices[0], f"{name}.lora_B.weight": matrices[1]}, product(matrices)
    if kind == "loha":
        first, second = pair(shape, 5), pair(shape, 7)
        ends = zip(("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a"), (*first, *second), strict=True)
        tensors = {f"{name}.{end}": matrix for end, matrix in ends}
        return tensors | {f"{name}.alpha": np.float32(6)}, 2 * product(first) * product(second)
    left, right = random(2, 4, seed=1), random(n_out // 2, n_in // 4, seed=2)
    # an alpha has no effect where both factors are whole
    tensors = {f"{name}.lokr_w1": left, f"{name}.lokr_w2": right, f"{name}.alpha": np.float32(9)}
    return tensors, np.kron(left.astype(np.float64), right)


def test_lokr_of_factors(read, layers):
    path = f"{BLOCK}.attn.to_q"
    n_out, n_in = layers.shapes["transformer"][path]
    left_down, left_up = pair((2, 4), 1, rank=2)
    right_down, right_up = pair((n_out // 2, n_in // 4), 3)
    core = random(3, 3, 1, 1, seed=9)
    tensors = {"w1_a": left_up, "w1_b": left_down, "w2_a": right_up, "w2_b": right_down}
    whole = np.kron(product((left_down, left_up)), product((right_down, right_up)))
    tensors = {f"lycoris_{path.replace('.', '_')}.lokr_{name}": matrix for name, matrix in tensors.items()}
    tensors[f"lycoris_{path.replace('.', '_')}.alpha"] = np.float32(6)
    check(read(tensors), {path: 2 * whole})  # the rank is the second factor's
    tucker = {
        f"{path}.lokr_w1": random(2, 4, seed=1),
        f"{path}.lokr_w2_a": np.ascontiguousarray(right_up.T),
        f"{path}.lokr_w2_b": right_down,
        f"{path}.lokr_t2": core,
    }
    right = right_up.astype(np.float64) @ core[..., 0, 0].astype(np.float64) @ right_down
    check(read(tucker), {path: np.kron(random(2, 4, seed=1).astype(np.float64), right)})


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("name", ["lora_magnitude_vector", "dora_scale"])
def test_dora(read, layers, root, name, axis):
    path = f"{BLOCK}.attn.to_q"
    shape = layers.shapes["transformer"][path]
    matrices = pair(shape, 5)
    changed = weight(root, path) + product(matrices)
    lengths = np.linalg.norm(changed, axis=axis, keepdims=True)
    magnitudes = (1.5 * lengths).astype(np.float32)
    stored = magnitudes.reshape(-1) if name == "lora_magnitude_vector" and axis == 1 else magnitudes
    key = f"transformer.{path}"
    tensors = {f"{key}.lora_A.weight": matrices[0], f"{key}.lora_B.weight": matrices[1], f"{key}.{name}": stored}
    change = read(tensors).changes["transformer"][path]
    assert change.gain.shape == lengths.shape
    assert np.abs(change.gain - 1.5).max() < EXACT


def test_dora_of_a_fused_layer(read, layers, root):
    """Lengths of rows belong to one of the three layers, lengths of columns to all of them."""
    paths = [f"{BLOCK}.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    dim = layers.shapes["transformer"][paths[0]][0]
    matrices, name = pair((3 * dim, dim), 5), "diffusion_model.double_blocks.0.img_attn.qkv"
    whole = np.concatenate([weight(root, path) for path in paths]) + product(matrices)
    tensors = {f"{name}.lora_A.weight": matrices[0], f"{name}.lora_B.weight": matrices[1]}
    for axis in (1, 0):
        lengths = np.linalg.norm(whole, axis=axis, keepdims=True)
        magnitudes = lengths * np.linspace(0.5, 2, lengths.size).reshape(lengths.shape)
        found = read({**tensors, f"{name}.dora_scale": magnitudes.astype(np.float32)}).changes["transformer"]
        for i, path in enumerate(paths):
            part = magnitudes[i * dim : (i + 1) * dim] if axis else magnitudes
            expected = part / (lengths[i * dim : (i + 1) * dim] if axis else lengths)
            assert np.abs(found[path].gain - expected).max() < EXACT


def test_settings_of_peft(read, layers):
    """lora_alpha, its patterns and rslora: in the header by diffusers, beside the file by PEFT."""
    paths = [f"{BLOCK}.attn.to_q", f"{BLOCK}.ff.linear_in"]
    pairs = [pair(layers.shapes["transformer"][path], i) for i, path in enumerate(paths)]

    def tensors(prefix):
        found = {}
        for path, (down, up) in zip(paths, pairs, strict=True):
            found |= {f"{prefix}{path}.lora_A.weight": down, f"{prefix}{path}.lora_B.weight": up}
        return found

    settings = {"r": 3, "lora_alpha": 6, "use_rslora": False, "alpha_pattern": {"attn.to_q": 12}}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}
    expected = dict(zip(paths, [product(pairs[0], 4), product(pairs[1], 2)], strict=True))
    check(read(tensors("transformer."), header), expected)
    lora = read(tensors("base_model.model."), name="peft/adapter_model.safetensors")
    check(lora, dict(zip(paths, map(product, pairs), strict=True)))
    config = lora.file.parent / "adapter_config.json"
    config.write_text(json.dumps({**settings, "use_rslora": True}))
    lora = read(tensors("base_model.model."), name="peft/adapter_model.safetensors")
    scales = (12 / np.sqrt(3), 6 / np.sqrt(3))
    check(lora, {path: product(p, scale) for path, p, scale in zip(paths, pairs, scales, strict=True)})
    for text, what in (("[]", "no JSON object"), ("{", "is not JSON"), ('{"lora_alpha": "x"}', "no number")):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=what):
            read(tensors("base_model.model."), name="peft/adapter_model.safetensors")


@pytest.mark.parametrize(
    "prefix",
    [
        "text_encoder.model.",
        "text_encoder.",
        "lora_te_",
        "lora_te1_model_",
        "text_encoders.qwen3_4b.transformer.model.",
    ],
)
def test_text_encoder(read, layers, prefix):
    path = "model.layers.1.self_attn.q_proj"
    matrices = pair(layers.shapes["text_encoder"][path], 1)
    name = path.removeprefix("model.")
    key = prefix + (name.replace(".", "_") if prefix.startswith("lora_") else name)
    lora = read({f"{key}.lora_down.weight": matrices[0], f"{key}.lora_up.weight": matrices[1]})
    check(lora, {path: product(matrices)}, "text_encoder")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_narrow_dtypes(layers, root, tmp_path, dtype):
    import ml_dtypes

    path = f"{BLOCK}.attn.to_q"
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bf16" else np.dtype(np.float16)
    matrices = [matrix.astype(kind) for matrix in pair(layers.shapes["transformer"][path], 1)]
    file = written(
        tmp_path / "a.safetensors", {f"{path}.lora_A.weight": matrices[0], f"{path}.lora_B.weight": matrices[1]}
    )
    delta = read_lora(file, layers, "model", lambda component, path: np.empty(0)).changes["transformer"][path].delta
    assert (delta.down.dtype, delta.up.dtype) == (kind, kind)  # not copied
    assert np.abs(delta.whole() - product(matrices)).max() < EXACT


def test_what_means_nothing_is_said(read, layers):
    path = f"{BLOCK}.attn.to_q"
    down, up = pair(layers.shapes["transformer"][path], 1)
    odd = {"transformer.transformer_blocks.7.attn.to_q.lora_A.weight": down, "step": np.zeros(1, np.float32)}
    lora = read({f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up, **odd, f"{path}.diff_b": up[:, 0]})
    assert set(lora.unused) == {*odd, f"{path}.diff_b"}
    assert "3 tensors" in lora.about_unused


# What the tensors of a layer are, by the ends of their keys, and what is said of them.
REFUSED = {
    "no LoRA": (lambda down, up: {"weight": up @ down}, "is no LoRA"),
    "another width": (
        lambda down, up: {A: down[:, :8], B: up[:8]},
        r"changes a layer \[8, 8\], which in model is \[64, 64\]",
    ),
    "no counterpart": (lambda down, up: {A: down}, "lacks its counterpart"),
    "other ranks": (lambda down, up: {A: down[:2], B: up}, "do not fit together"),
    "not finite": (lambda down, up: {A: down * np.inf, B: up}, "infinities or NaNs"),
    "integers": (lambda down, up: {A: down.astype(np.int8), B: up}, "'I8', expected F32"),
    "no matrix": (lambda down, up: {A: down[0], B: up}, "expected a matrix"),
    "two adapters": (lambda down, up: {"lora_A.a.weight": down, "lora_A.b.weight": down}, "several adapters"),
    "alpha": (lambda down, up: {A: down, B: up, "alpha": np.float32(np.nan)}, "alpha is nan"),
    "alphas": (lambda down, up: {A: down, B: up, "alpha": np.ones(2, np.float32)}, "expected one number"),
    "magnitudes": (lambda down, up: {A: down, B: up, "dora_scale": up[:2, :2]}, r"shape \[2, 2\], expected"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(read, layers, kind):
    make, message = REFUSED[kind]
    path = f"{BLOCK}.attn.to_q"
    tensors = make(*pair(layers.shapes["transformer"][path], 1))
    with pytest.raises(CheckpointError, match=message):
        read({f"{path}.{end}": array for end, array in tensors.items()})


def test_refused_by_names(read, layers):
    path = f"{BLOCK}.attn.to_q"
    matrices = dict(zip((A, B), pair(layers.shapes["transformer"][path], 1), strict=True))
    with pytest.raises(CheckpointError, match="of another model: model has none of its 1 layers"):
        read({f"unet.down_blocks.0.attn1.to_q.{end}": array for end, array in matrices.items()})
    with pytest.raises(CheckpointError, match="twice, by two names"):
        read({f"{prefix}{path}.{end}": array for prefix in ("", "transformer.") for end, array in matrices.items()})


def test_names_are_of_one_layer(layers):
    """No two layers have the same name once separators are the same; pairs of adjacent layers are not confused."""
    for shapes in layers.shapes.values():
        for one, other in pairwise(shapes):
            assert layers.find(one).places[0].path == one
            assert layers.find(one.replace(".", "_")) == layers.find(one) != layers.find(other)


def test_other_layers_are_unknown(layers):
    for name in (
        "transformer_blocks.99.attn.to_q",
        "single_transformer_blocks.0.attn.to_q",
        "",
        "transformer.",
        "x",
        "...",
    ):
        assert layers.find(name) is None
