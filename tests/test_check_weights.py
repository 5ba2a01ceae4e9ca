"""Statistics of weights against plain formulas, and what tells trained weights, random ones and damaged ones apart."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fluxonnx.check import statistics, weights
from fluxonnx.check.findings import FAILED, OK, WARNING
from fluxonnx.checkpoint.directory import read_tensors
from fluxonnx.checkpoint.safetensors import Quantisation, Tensor, read_header
from tests.support import Case

TINY = Path(__file__).parent.parent / "models/tiny-klein"
NAMES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.int8): "I8"}


def stored(path: Path, **arrays: np.ndarray) -> dict[str, Tensor]:
    """Write a safetensors file; returns its tensors."""
    header, end = {}, 0
    for name, array in arrays.items():
        offsets = [end, end := end + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in arrays.values()))
    return read_header(path)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def trained(*shape: int, seed: int = 0) -> np.ndarray:
    """Random values whose rows and columns are of different sizes, as training makes them."""
    rows = np.exp(0.2 * normal(shape[0], 1, seed=seed + 1))
    return 0.05 * normal(*shape, seed=seed) * rows * np.exp(0.2 * normal(1, shape[1], seed=seed + 2))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_against_plain_formulas(tmp_path, monkeypatch, dtype):
    """All of a tensor, in chunks of which the last is shorter."""
    monkeypatch.setattr(statistics, "CHUNK", 1000)
    array = (trained(70, 130) + 0.01).astype(dtype)
    found = statistics.measure(stored(tmp_path / "a", w=array)["w"], whole=True)
    assert found is not None
    values = array.astype(np.float64)
    square = values**2
    kurtosis = (square**2).mean() / square.mean() ** 2
    spreads = [
        square.sum(axis).std() / square.sum(axis).mean() / ((kurtosis - 1) / n) ** 0.5
        for axis, n in ((1, 130), (0, 70))
    ]
    assert (found.values, found.read, found.not_finite, found.zero_rows) == (9100, 9100, 0, 0)
    assert found.std == pytest.approx(values.std(), rel=1e-4)
    assert found.kurtosis == pytest.approx(kurtosis, rel=1e-4)
    assert found.largest == np.abs(values).max()
    assert found.spread == pytest.approx(max(spreads), rel=1e-3)
    assert not found.constant


def test_sample_is_whole_rows_with_the_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "SAMPLE", 5000)
    array = trained(1000, 100)
    array[0], array[500], array[999] = np.nan, np.inf, 0
    found = statistics.measure(stored(tmp_path / "a", w=array)["w"])
    assert found is not None
    assert found.values == 100_000
    assert found.read == 50 * 100
    assert found.not_finite in (100, 200)  # the row in the middle may fall between two that are read
    assert found.zero_rows >= 1
    whole = statistics.measure(stored(tmp_path / "a", w=array)["w"], whole=True)
    assert whole is not None
    assert (whole.read, whole.not_finite) == (100_000, 200)


def test_huge_values_do_not_overflow(tmp_path):
    array = trained(32, 32)
    array[3, 3] = 3e38
    found = statistics.measure(stored(tmp_path / "a", w=array)["w"])
    assert found is not None
    assert found.largest == pytest.approx(3e38)
    assert np.isfinite([found.std, found.kurtosis, found.spread]).all()


def test_integers_count_with_their_scales(tmp_path):
    """Those of a quantised layer are weights, others are none."""
    scale = np.exp(normal(40, 1)).astype(np.float32)
    integers = np.clip(normal(40, 64) * 40, -127, 127).astype(np.int8)
    tensors = stored(tmp_path / "a", w=integers, s=scale)
    assert statistics.measure(tensors["w"]) is None
    quantised = Tensor(**{**vars(tensors["w"]), "quantisation": Quantisation(tensors["s"])})
    found = statistics.measure(quantised)
    assert found is not None
    assert found.std == pytest.approx((integers * scale).std(), rel=1e-4)


def judged(path: Path, **arrays: np.ndarray) -> tuple[str, str]:
    tensors = stored(path, **{name.replace("__", "."): array for name, array in arrays.items()})
    (finding,) = weights.verdict(weights.look("transformer", tensors))
    return finding.state, finding.text


@pytest.mark.parametrize(
    "draw",
    [
        normal,
        lambda *shape, seed: np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32) * 0.02,
        lambda *shape, seed: np.random.default_rng(seed).laplace(size=shape).astype(np.float32),
    ],
    ids=["normal", "uniform", "heavy tails"],
)
def test_random_numbers_of_any_distribution(tmp_path, draw):
    layers = {f"layers__{i}__weight": draw(64 + i, 96, seed=i) for i in range(30)}
    state, text = judged(tmp_path / "a", **layers, norm__weight=np.ones(64, np.float32))
    assert state == WARNING
    assert "these look like random weights: in 30 of 30 matrices" in text
    assert "1 of 1 norms have one gain throughout" in text


def test_structured_weights_are_good(tmp_path):
    state, text = judged(tmp_path / "a", **{f"layers__{i}__weight": trained(64, 96, seed=i) for i in range(10)})
    assert state == OK
    assert "10 of 10 matrices with structure" in text


def changed(array: np.ndarray, place: object, value: float) -> np.ndarray:
    array = array.copy()
    array[place] = value  # type: ignore[index]
    return array


@pytest.mark.parametrize(
    ("array", "state", "words"),
    [
        (changed(trained(64, 96), (5, 7), np.nan), FAILED, "holds 1 values that are NaN or infinite"),
        (changed(trained(64, 96), (5, 7), -np.inf), FAILED, "holds 1 values that are NaN or infinite"),
        (changed(trained(64, 96), (5, 7), -2e7), FAILED, "holds a value of 2e+07"),
        (changed(trained(64, 96), (5, 7), 500), WARNING, "where 99 % of the values are below"),
        (changed(trained(64, 96), (5, 7), 60), WARNING, "where 99 % of the values are below"),
        (np.zeros((64, 96), np.float32), FAILED, "is all zero"),
        (np.full((64, 96), 0.5, np.float32), FAILED, "has one value (0.5) throughout"),
        (changed(trained(64, 96), slice(8, 20), 0), WARNING, "has 12 rows that are all zero"),
        (trained(64, 96) * 100, WARNING, "has a standard deviation of"),
    ],
)
def test_damage(tmp_path, array, state, words):
    good = {f"layers__{i}__weight": trained(64, 96, seed=i) for i in range(5)}
    found, text = judged(tmp_path / "a", **good, layers__5__weight=array)
    assert (found, words in text) == (state, True), text
    assert "layers.5.weight" in text


def test_trained_and_random_models_are_far_apart(checkpoints):
    """The bundled model's least trained part is at half of its matrices; random ones are at none."""
    random = checkpoints.get(Case("odd-heads"))
    for part in weights.PARTS:
        good = weights.look(part, read_tensors(TINY / part))
        bad = weights.look(part, read_tensors(random / part))
        assert good.structured > 0.4 * len(good.telling) > 10
        assert bad.structured == 0
        assert bad.looks_random
        assert not good.looks_random
