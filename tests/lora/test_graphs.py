"""A graph with a LoRA computes what the graph of the changed weights does, in every precision and flavour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fluxonnx.checkpoint.manifest import build_name, graph_file, read_manifest, unpacked_scaling
from fluxonnx.contract import open_checkpoint
from fluxonnx.errors import CheckpointError, FluxonnxError
from fluxonnx.export import export
from fluxonnx.export.components import read_architecture
from fluxonnx.lora.file import read_lora
from fluxonnx.lora.graph import Active, Scales, adapt
from fluxonnx.runtime.engine import SessionOptions
from fluxonnx.runtime.engines import engine_for
from tests.lora.making import CASE, everything, layers_of, merged, pair, random, weight, written
from tests.support import GRAPH_TOLERANCE, optional, relative_error
from tools.architectures import Architecture, TextEncoderSize, TransformerSize, VaeSize
from tools.make_checkpoint import make_checkpoint
from tools.outliers import inject

pytestmark = pytest.mark.slow

ALL = tuple(kind + by for by in ("", " by rows", " by columns") for kind in ("lora", "loha", "lokr"))
# Feed-forwards in panels of columns, and inputs that are rotated.
WIDE = Architecture(
    TextEncoderSize(hidden=32, layers=3, heads=2, kv_heads=1, head_dim=16, intermediate=48),
    TransformerSize(4, 64, 1, 2, text_dim=96, in_channels=32, axes=(16, 16, 16, 16)),
    VaeSize((16, 24, 32, 32), latent_channels=8, layers_per_block=1, groups=4),
)
# What rounding to 8 and to 4 bits costs may differ between two sets of weights that are about the same.
ALIKE = 1.5


def run(
    root: Path,
    precision: str,
    flavour="ort",
    lora: Path | None = None,
    strength=1.0,
    provider="cpu",
    component="transformer",
):
    """The output of a graph on the same inputs, with a LoRA or without."""
    import onnx

    build = read_manifest(root).builds[build_name(precision, flavour)]
    path, adapted = root / graph_file(component, precision, flavour), None
    if lora is not None:
        found = read_lora(lora, layers_of(root), "model", lambda c, p: weight(root, p, c).astype(np.float32))
        layers = {path: [Active(change, strength)] for path, change in found.changes[component].items()}
        scaling = build.components[component].scaling
        scales = {name: Scales(**unpacked_scaling(value)) for name, value in scaling.items()}
        adapted = adapt(onnx.load(path, load_external_data=False), layers, scales, precision)
    options = SessionOptions(provider=provider, adapted=adapted)
    runner = engine_for(provider)(path, component, build, options)
    try:
        return runner.run(**inputs(root, component))[0]
    finally:
        runner.close()


def inputs(root: Path, component: str) -> dict[str, np.ndarray]:
    """Twelve tokens of a picture and eight of a prompt, at random; angles are those of no rotation."""
    if component == "text_encoder":
        return {"input_ids": np.arange(8)[None], "attention_mask": np.ones((1, 8), np.int64)}
    c = read_architecture(open_checkpoint(root), None).transformer
    return {
        "hidden_states": random(1, 12, c.in_channels, size=c.in_channels**0.5),
        "encoder_hidden_states": random(1, 8, c.text_dim, size=c.text_dim**0.5),
        "timestep_proj": random(1, c.timestep_channels, size=c.timestep_channels**0.5),
        "rotary_cos": np.ones((20, c.head_dim), np.float32),
        "rotary_sin": np.zeros((20, c.head_dim), np.float32),
    }


class Kinds:
    """Files of each kind for all layers of a checkpoint, and the weights that they make of its own."""

    def __init__(self, root: Path, folder: Path, component: str = "transformer") -> None:
        self.root, self.folder, self.component = root, folder, component
        self.shapes = layers_of(root).shapes[component]

    def make(self, *kinds: str) -> tuple[Path, dict[str, np.ndarray]]:
        """A file whose layers are of these kinds in turn."""
        tensors, changes = {}, {}
        for seed, (path, shape) in enumerate(self.shapes.items()):
            kind, _, axis = kinds[seed % len(kinds)].partition(" by ")
            own = weight(self.root, path, self.component)
            added, delta = self._delta(kind, path, shape, seed)
            changes[path] = own + delta
            if axis:
                lengths = np.linalg.norm(changes[path], axis=1 if axis == "rows" else 0, keepdims=True)
                gain = np.exp(0.2 * np.sin(np.arange(lengths.size))).reshape(lengths.shape)
                added[f"{path}.dora_scale"] = (gain * lengths).astype(np.float32)
                changes[path] *= gain
            tensors |= added
        prefix = "text_encoder." if self.component == "text_encoder" else "transformer."
        name = "-".join(kinds).replace(" ", "-")
        return written(self.folder / f"{name}.safetensors", {prefix + k: v for k, v in tensors.items()}), changes

    @staticmethod
    def _delta(kind: str, path: str, shape: tuple[int, int], seed: int):
        n_out, n_in = shape
        down, up = pair(shape, 4 * seed)
        if kind == "lora":
            return {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}, up.astype(np.float64) @ down
        if kind == "loha":
            other_down, other_up = 2 * pair(shape, 4 * seed + 2)[0], pair(shape, 4 * seed + 2)[1]
            names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
            added = dict(zip(names, (up, down, other_up, other_down), strict=True))
            delta = (up.astype(np.float64) @ down) * (other_up.astype(np.float64) @ other_down)
            return {f"{path}.{name}": array for name, array in added.items()}, delta
        left, right = random(2, 2, seed=seed), random(n_out // 2, n_in // 2, seed=seed + 1)
        return {f"{path}.lokr_w1": left, f"{path}.lokr_w2": right}, np.kron(left.astype(np.float64), right)


@pytest.fixture(scope="module")
def kinds(checkpoints, tmp_path_factory):
    """Exported in every float precision."""
    folder = tmp_path_factory.mktemp("kinds")
    root = merged(checkpoints.get(CASE), folder / "model", {})
    for precision, flavour in (
        ("fp32", "ort"),
        ("bf16", "ort"),
        ("fp16", "ort"),
        ("bf16", "portable"),
        ("fp16", "portable"),
    ):
        export(root, precision=precision, flavour=flavour, components=["transformer"])
    return Kinds(root, folder)


def test_float_builds(kinds, tmp_path):
    """As merged weights do in float32, whatever the build; half a LoRA is halfway."""
    file, changes = kinds.make(*ALL)
    root = merged(kinds.root, tmp_path / "merged", changes)
    export(root, precision="fp32", components=["transformer"], force=True)
    expected = run(root, "fp32")
    assert relative_error(run(kinds.root, "fp32"), expected) > 0.1, "the LoRA changes nothing"
    for precision, flavour in (("fp32", "ort"), ("bf16", "ort"), ("bf16", "portable")):
        assert relative_error(run(kinds.root, precision, flavour, file), expected) < GRAPH_TOLERANCE, (
            precision,
            flavour,
        )
    plain = run(kinds.root, "bf16")
    assert np.array_equal(run(kinds.root, "bf16", lora=file, strength=0), plain)
    half = {path: (weight(kinds.root, path) + changed) / 2 for path, changed in changes.items()}
    root = merged(kinds.root, tmp_path / "half", half)
    export(root, precision="fp32", components=["transformer"], force=True)
    assert relative_error(run(kinds.root, "bf16", lora=file, strength=0.5), run(root, "fp32")) < GRAPH_TOLERANCE


@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_half_precision(kinds, flavour):
    """Its products are rounded, the LoRA's are not."""
    file, _ = kinds.make(*ALL)
    expected = run(kinds.root, "fp32", lora=file)
    assert relative_error(run(kinds.root, "fp16", flavour, file), expected) < 2e-3


@optional("threadpoolctl")
def test_openblas(kinds, rounded):
    for some, precision in ((kinds, "bf16"), (rounded, "int8")):
        file, _ = some.make(*ALL)
        expected = run(some.root, precision, lora=file)
        found = run(some.root, precision, lora=file, provider="openblas")
        # of integers, few are rounded to a neighbour
        assert relative_error(found, expected) < (GRAPH_TOLERANCE if precision == "bf16" else 1e-2), precision


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """In int8 and int4, with outliers, so that channels are scaled for rounding, and wide enough for panels."""
    folder = tmp_path_factory.mktemp("rounded")
    source = make_checkpoint(folder / "source", WIDE, dtype="fp32")
    outliers = ["values", "swiglu", "modulation"]
    root = inject(source, folder / "model", outliers, channels=2, scale=64, components=["transformer"])
    for precision in ("int8", "int4"):
        for flavour in ("ort", "portable"):
            export(root, precision=precision, flavour=flavour, components=["transformer"])
    return Kinds(root, folder)


@pytest.mark.parametrize("some", [ALL, ("lora by columns",)], ids=["all", "columns"])
def test_rounded_builds(rounded, tmp_path, some):
    """About as far from float32 as a build of the merged weights is: the change itself is not rounded."""
    file, changes = rounded.make(*some)
    root = merged(rounded.root, tmp_path / "merged", changes)
    export(root, precision="fp32", components=["transformer"], force=True)
    expected = run(root, "fp32")
    for precision in ("int8", "int4"):
        export(root, precision=precision, components=["transformer"], force=True)
        bound = ALIKE * relative_error(run(root, precision), expected)
        assert read_manifest(rounded.root).builds[precision].components["transformer"].scaling
        for flavour in ("ort", "portable"):
            assert relative_error(run(rounded.root, precision, flavour, file), expected) < bound, (precision, flavour)


def test_text_encoder(checkpoints, tmp_path):
    root = merged(checkpoints.get(CASE), tmp_path / "model", {})
    export(root, precision="fp32", components=["text_encoder"])
    kinds = Kinds(root, tmp_path, "text_encoder")
    file, changes = kinds.make("lora")
    other = merged(root, tmp_path / "merged", changes, "text_encoder")
    export(other, precision="fp32", components=["text_encoder"], force=True)
    expected = run(other, "fp32", component="text_encoder")
    assert relative_error(run(root, "fp32", lora=file, component="text_encoder"), expected) < GRAPH_TOLERANCE
    assert relative_error(run(root, "fp32", component="text_encoder"), expected) > 0.1


def test_nothing_else_changes(kinds, tmp_path):
    """One layer of a LoRA adds a few nodes; a graph by other tools is refused."""
    import onnx

    file = written(tmp_path / "a.safetensors", everything({"x_embedder": kinds.shapes["x_embedder"]}))
    found = read_lora(file, layers_of(kinds.root), "model", lambda c, p: np.empty(0))
    layers = {path: [Active(change, 1)] for path, change in found.changes["transformer"].items()}
    path = kinds.root / graph_file("transformer", "bf16", "ort")
    before = onnx.load(path, load_external_data=False)
    after = adapt(onnx.load(path, load_external_data=False), layers, {}, "bf16")
    assert len(after.model.graph.node) == len(before.graph.node) + 2
    kept = {node.name for node in before.graph.node}
    assert kept < {node.name for node in after.model.graph.node}
    assert len(after.arrays) == 2
    half = onnx.load(kinds.root / graph_file("transformer", "fp16", "ort"), load_external_data=False)
    for node in half.graph.node:
        if node.op_type == "Mul":
            node.op_type = "Add"
    layers = {f"transformer_blocks.0.attn.{name}": layers["x_embedder"] for name in ("to_q",)}
    with pytest.raises(CheckpointError, match="not as fluxonnx wrote it"):
        adapt(half, layers, {}, "fp16")


def test_graphs_of_bfloat16_stay_so(checkpoints, tmp_path):
    """onnxruntime checks the types of all nodes before it finds that a CPU has no kernels for them."""
    root = merged(checkpoints.get(CASE), tmp_path / "model", {})
    export(root, precision="bf16-native", components=["transformer"])
    file, _ = Kinds(root, tmp_path).make(*ALL)
    message = r"the cpu provider can't compute this .*Could not find an implementation"
    with pytest.raises(FluxonnxError, match=message):
        run(root, "bf16-native", lora=file)
