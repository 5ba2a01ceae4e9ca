"""Balanced channels: the same function, and outliers of channels that cost int8 and int4 nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fluxonnx.checkpoint.config import Config
from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.checkpoint.safetensors import Scaling, Tensor, read_header
from fluxonnx.contract import open_checkpoint
from fluxonnx.export import export, text_encoder, transformer
from fluxonnx.export.balance import Coupling, Reader, Writer, balanced
from fluxonnx.export.initializers import float_rows, scaled
from fluxonnx.export.precisions import Int4, Int8, Precision, Quantised, rounding
from tests.support import Case, int8_matrix, relative_error, run_graph
from tools.outliers import inject

CASE = Case("odd-heads", "fp32")
WEIGHTS = {
    "text_encoder": "text_encoder/model.safetensors",
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
}
OUTLIERS = (1, 100, 300)


def tensors(folder: Path, **values: np.ndarray) -> dict[str, Tensor]:
    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, folder / "w.safetensors")
    return read_header(folder / "w.safetensors")


def balance(found: dict[str, Tensor], *couplings: Coupling, activations: bool = True) -> dict[str, np.ndarray]:
    scaled_tensors, _ = balanced(found, couplings, lambda tensor: True, activations)
    return {name: float_rows(tensor) for name, tensor in scaled_tensors.items()}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


GAIN = Coupling(96, (Writer("gain"),), (Reader("q"), Reader("k")))


@pytest.mark.parametrize("activations", [True, False], ids=["both", "weights"])
@pytest.mark.parametrize("factor", [1, 64, 300, 1 / 300])
def test_outliers_of_a_gain_are_undone(tmp_path, rng, factor, activations):
    """Whatever a gain and the columns behind it were multiplied by: the result is the same within half a power of 2."""
    gain, q, k = np.ones(96, np.float32), rng.standard_normal((80, 96), np.float32), rng.standard_normal((40, 96))
    expected = balance(tensors(tmp_path, gain=gain, q=q, k=(k / 100).astype(np.float32)), GAIN, activations=activations)
    outliers = [3, 17]
    gain[outliers] *= factor
    q[:, outliers] /= factor
    k[:, outliers] /= factor
    given = tensors(tmp_path, gain=gain, q=q, k=(k / 100).astype(np.float32))
    found = balance(given, GAIN, activations=activations)
    ratio = found["gain"] / expected["gain"]
    assert (ratio[[i for i in range(96) if i not in outliers]] == 1).all()
    assert (np.abs(np.log2(ratio[outliers])) <= 1).all()
    # the same function, to the last bit
    scale = found["gain"] / gain
    np.testing.assert_array_equal(np.frexp(scale)[0], np.full(96, 0.5))
    np.testing.assert_array_equal(found["q"] * scale, q)


def test_channels_that_are_alike_stay(tmp_path, rng):
    given = tensors(
        tmp_path,
        gain=np.ones(96, np.float32),
        q=rng.standard_normal((512, 96), np.float32),
        k=rng.standard_normal((512, 96), np.float32),
    )
    found, inputs = balanced(given, [GAIN], lambda tensor: True, True)
    assert all(tensor.scaling is None for tensor in found.values())
    np.testing.assert_array_equal(inputs["q"], np.ones(96))


@pytest.mark.parametrize("row", [0, 5])
def test_outliers_of_other_rows_are_no_outliers_of_columns(tmp_path, rng, row):
    """A row that is 300 times as large has a step of its own."""
    q = rng.standard_normal((80, 96), np.float32)
    k = rng.standard_normal((80, 96), np.float32)
    given = {"gain": np.ones(96, np.float32), "q": q, "k": k}
    expected = balance(tensors(tmp_path, **given), GAIN)
    q[row] *= 300
    np.testing.assert_array_equal(balance(tensors(tmp_path, **given), GAIN)["gain"], expected["gain"])


@pytest.mark.parametrize("bad", [0, np.nan, np.inf])
def test_values_that_tell_nothing_change_nothing(tmp_path, rng, bad):
    gain, q = np.ones(96, np.float32), rng.standard_normal((80, 96), np.float32)
    gain[3] = bad
    q[:, 5] = bad
    found = balance(tensors(tmp_path, gain=gain, q=q, k=q), GAIN)
    np.testing.assert_array_equal(found["q"][:, [3, 5]], q[:, [3, 5]])


@pytest.mark.parametrize("name", ["gain", "q", "k"])
def test_what_does_not_fit_is_left_to_the_builder(tmp_path, name):
    """A tensor that is missing, or of another shape or type: the builder says what is wrong with it."""
    values = {"gain": np.ones(96, np.float32), "q": np.ones((80, 96), np.float32), "k": np.ones((40, 96), np.float32)}
    values["gain"][3] = 100
    for wrong in (None, np.ones(7, np.float32), np.ones((3, 4, 5), np.float32), values[name].astype(np.int8)):
        changed = {key: value for key, value in values.items() if key != name}
        given = tensors(tmp_path, **(changed if wrong is None else {**changed, name: wrong}))
        assert balanced(given, [GAIN], lambda tensor: True, True)[0] == given


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_scaled_values(tmp_path, rng, dtype):
    """Rows and columns, of all rows or of a slice of them, exactly."""
    values = rng.integers(-127, 128, (300, 8)).astype(dtype)
    rows = np.exp2(rng.integers(-3, 4, 300)).astype(np.float32)
    columns = np.exp2(rng.integers(-3, 4, 8)).astype(np.float32)
    (tensor,) = tensors(tmp_path, w=values).values()
    tensor = Tensor(**{**tensor.__dict__, "scaling": Scaling(rows, columns)})
    expected = values.astype(np.float32) * rows[:, None] * columns
    np.testing.assert_array_equal(scaled(tensor, tensor.dtype).astype(np.float32), expected)
    assert scaled(tensor, tensor.dtype).dtype == dtype
    np.testing.assert_array_equal(float_rows(tensor, row_step=7, column_step=3), expected[::7, ::3])
    first, second = tensor.split([100, 200])
    np.testing.assert_array_equal(scaled(first, first.dtype).astype(np.float32), expected[:100])
    np.testing.assert_array_equal(float_rows(second, 3, 9), expected[103:109])


# Whole graphs


def couplings_of(root: Path, component: str) -> list[Coupling]:
    path = root / component / "config.json"
    config = Config(path, json.loads(path.read_text("utf-8")))
    if component == "transformer":
        return transformer.couplings(transformer.read_config(config))
    return text_encoder.couplings(text_encoder.read_config(config))


def with_outliers(root: Path, component: str, factor: float) -> None:
    """Multiply two channels of every coupling, and divide what reads them; not where a 1 is added."""
    rng = np.random.default_rng(0)
    values = load_file(root / WEIGHTS[component])
    for coupling in (coupling for coupling in couplings_of(root, component) if coupling.size is None):
        channels = rng.choice(coupling.count, 2, replace=False)
        for writer in coupling.writers:
            for name in filter(None, (writer.weight, writer.bias)):
                values[name][writer.start + channels] *= factor
        for reader in coupling.readers:
            size = reader.head_dim
            for i in range(reader.repeat):
                columns = (channels // size * reader.repeat + i) * size + channels % size
                values[reader.weight][:, reader.start + columns] /= factor
    save_file(values, root / WEIGHTS[component])


def found_error(root: Path, component: str, precision: Precision) -> float:
    export(root, precision="fp32", components=[component], force=True)
    export(root, precision=precision, components=[component], force=True)
    return relative_error(run_graph(root, component, precision.name), run_graph(root, component, "fp32"))


@pytest.mark.slow
@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("precision", [Int8(), Int4(block=32)], ids=["int8", "int4"])
def test_outliers_cost_nothing(checkpoints, tmp_path, component, precision):
    """Two channels of every norm, of every value and of every SwiGLU: the function is the same, and so is the error."""
    expected, errors = None, []
    for factor in OUTLIERS:
        root = Path(shutil.copytree(checkpoints.get(CASE), tmp_path / f"{factor}"))
        with_outliers(root, component, factor)
        errors.append(found_error(root, component, precision))
        result = run_graph(root, component, "fp32")
        expected = result if expected is None else expected
        assert relative_error(result, expected) < 1e-4, "the outliers change the function"
    assert max(errors[1:]) < 1.15 * errors[0], errors
    assert not read_manifest(root).builds[precision.name].components[component].kept


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["ort", "portable"])
def test_outliers_of_a_modulation_cost_nothing(checkpoints, tmp_path, flavour):
    """Shifts and scales that are 256 times as large; the 1 beside the scale follows them."""
    case, errors = checkpoints.get(CASE), []
    for factor in (1, 256):
        root = inject(case, tmp_path / f"{factor}", ["modulation"], scale=factor, components=["transformer"])
        export(root, precision="fp32", components=["transformer"])
        export(root, precision="int8", flavour=flavour, components=["transformer"])
        found = run_graph(root, "transformer", "int8", flavour)
        errors.append(relative_error(found, run_graph(root, "transformer", "fp32")))
    assert errors[1] < 1.2 * errors[0], errors


def test_magnitudes_of_a_modulation(checkpoints):
    """One for each channel; unknown where the timestep's weights are missing, which the builder reports."""
    found = open_checkpoint(checkpoints.get(CASE)).tensors("transformer")
    (coupling, *_) = [c for c in couplings_of(checkpoints.get(CASE), "transformer") if c.size]
    assert coupling.size is not None
    size = coupling.size(found)
    assert size.shape == (96,)
    assert np.isfinite(size).all()
    without = {name: tensor for name, tensor in found.items() if "time_guidance" not in name}
    assert np.isnan(coupling.size(without)).all()


@pytest.mark.slow
@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("keep", ["[qk]_proj|to_out", "v_proj|to_v|linear_in|to_qkv", "."])
def test_kept_layers_are_scaled_with_the_others(checkpoints, tmp_path, component, keep):
    """A layer that is kept reads, or makes, the same channels as one that is not."""
    root = Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "model"))
    with_outliers(root, component, 300)
    assert found_error(root, component, Int8(keep)) < (1e-6 if keep == "." else 0.02)


@pytest.mark.slow
def test_layers_above_the_threshold_are_kept(copy_of):
    """The record says which, and the export says it in a line."""
    root = copy_of(CASE)
    export(root, precision="int8", components=["text_encoder"])
    component = read_manifest(root).builds["int8"].components["text_encoder"]
    assert component.kept == []
    assert len(component.errors) == 21
    assert 0.003 < min(component.errors.values()) <= max(component.errors.values()) < 0.02
    # errors are recorded with four digits
    highest, second, *_ = sorted(set(component.errors.values()), reverse=True)
    worst = [name for name, error in component.errors.items() if error == highest]

    class Strict(Int8):
        most_error = (highest + second) / 2

    with pytest.warns(UserWarning, match=rf"text_encoder: {worst[0]}.* would be more than .*int8, and so stays? as in"):
        export(root, precision=Strict(), components=["text_encoder"], force=True)
    component = read_manifest(root).builds["int8"].components["text_encoder"]
    assert component.kept == worst
    (file,) = component.weights
    stored = read_header(root / file)
    assert all(stored[f"{name}.weight"].dtype == "F32" for name in worst)
    assert sum(tensor.dtype == "I8" for tensor in stored.values()) == 21 - len(worst)
    assert np.isfinite(run_graph(root, "text_encoder", "int8")).all()


@pytest.mark.parametrize("precision", [Int8(saturating=False), Int8(saturating=True), Int8(rotate=True), Int4()])
@pytest.mark.parametrize("outlier", [1, 30])
def test_estimated_errors_are_near_the_measured_ones(tmp_path, rng, precision, outlier):
    """A product of 512 normal activations, rounded as the graph does; also where one of them is an outlier."""
    inputs = np.ones(512)
    inputs[7] = outlier
    (tensor,) = tensors(tmp_path, w=rng.standard_normal((600, 512), np.float32)).values()
    expected = product_error(precision, tensor, rng.standard_normal((256, 512)) * inputs)
    # where one input outweighs all others, the rows of the sample have few weights that matter
    assert precision.error(tensor, inputs) == pytest.approx(expected, rel=0.25 if outlier == 1 else 0.5)


def product_error(precision: Quantised, tensor: Tensor, x: np.ndarray) -> float:
    weights = float_rows(tensor)
    if isinstance(precision, Int4):
        integers, scales = rounding.int4_blocks(tensor, 64)
        rounded = integers * scales.repeat(64, 1)
        return relative_error(x @ rounded.T, x @ weights.T)
    rotation = precision.rotation(tensor)
    columns, scales = int8_matrix(tensor, precision.limit, rotation)
    mixed = (x.reshape(-1, rotation) @ rounding.hadamard(rotation)).reshape(x.shape) if rotation else x
    step = np.abs(mixed).max(1, keepdims=True) / precision.levels
    return relative_error((np.rint(mixed / step) * step) @ (columns * scales), x @ weights.T)


def test_weights_of_zeros_have_no_error(tmp_path):
    (tensor,) = tensors(tmp_path, w=np.zeros((96, 64), np.float32)).values()
    assert np.isnan(Int8().error(tensor, np.ones(64)))
    assert np.isnan(Int4().error(tensor, np.ones(64)))
