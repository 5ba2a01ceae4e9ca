"""`fluxonnx compare`: figures against plain formulas, layers against the architecture, the page, and errors."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from PIL import Image

from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.cli import main
from fluxonnx.measure import page, quality, similarity
from tests.support import Case

pytestmark = pytest.mark.slow

CASE = Case("one-double-three-single")


@pytest.fixture(scope="module")
def model(checkpoints, tmp_path_factory):
    return shutil.copytree(checkpoints.get(CASE), tmp_path_factory.mktemp("compare") / "model")


@pytest.fixture(scope="module")
def report(model):
    plan = quality.Plan(model, ("int8", "int4", "bf16"), ("a cat", "a dog"), width=64, height=80, steps=2)
    return quality.run(plan, lambda _: None)


def test_distance():
    a, b = np.array([3.0, 4.0], np.float32), np.array([3.0, 4.5], np.float32)
    found = quality.distance(b, a)
    assert found.relative == pytest.approx(0.1)
    assert found.snr == pytest.approx(20)
    assert found.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    assert quality.distance(a, a) == quality.Distance(0.0, 1.0)
    assert quality.distance(a, a).snr == math.inf


def test_psnr():
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    assert quality.psnr(Image.new("RGB", (8, 8), (110, 100, 100)), grey) == pytest.approx(
        10 * math.log10(255**2 / (100 / 3))
    )
    assert quality.psnr(grey, grey) == math.inf


def picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def test_ssim_against_the_formula():
    """One window, so that a plain weighted mean is all there is: Wang et al. 2004, equations 14 to 16."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 255, (2, 11, 11, 3)).astype(np.uint8).astype(np.float64)
    distance = np.arange(11) - 5
    weights = np.exp(-(distance[:, None] ** 2 + distance**2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for a, b in zip(x.transpose(2, 0, 1), y.transpose(2, 0, 1), strict=True):
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        variance_a, variance_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
        covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
        c1, c2 = 6.5025, 58.5225
        numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        values.append(numerator / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)))
    assert similarity.ssim(picture(x), picture(y)) == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_orders_pictures():
    values = np.random.default_rng(0).uniform(60, 190, (24, 32, 3))
    noise = np.random.default_rng(1).normal(0, 1, values.shape)
    one = picture(values)
    assert similarity.ssim(one, one) == 1
    assert (
        1 > similarity.ssim(picture(values + 5 * noise), one) > similarity.ssim(picture(values + 50 * noise), one) > 0
    )
    # between flat pictures only the means count
    a, b, c1 = 100, 120, 6.5025
    flat = similarity.ssim(*(Image.new("RGB", (16, 12), (value,) * 3) for value in (a, b)))
    assert flat == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), rel=1e-9)


def test_velocity_of_each_step(report):
    """The figure of the step that all graphs are compared at is that of the graph."""
    int8, int4 = report.results
    assert len(int8.velocity) == len(int4.velocity) == 2
    assert all(a > b > 0 for a, b in zip(int8.velocity, int4.velocity, strict=True))


def test_steps_of_the_first_picture():
    """A step with guidance runs the transformer twice; the second picture begins at the first timestep again."""

    def call(timestep: float) -> dict[str, np.ndarray]:
        return {"timestep_proj": np.full((1, 4), timestep, np.float32)}

    one = [call(t) for t in (1.0, 1.0, 0.5, 0.5)]
    assert [len(step) for step in quality.first_picture(one + one)] == [2, 2]
    single = [call(t) for t in (1.0, 0.5, 0.25)]
    assert [len(step) for step in quality.first_picture(single * 3)] == [1, 1, 1]
    assert [len(step) for step in quality.first_picture([call(1.0)])] == [1]


def test_what_the_export_estimated(report, model):
    manifest = read_manifest(model)
    for result in report.results:
        assert set(result.roundings) == {"text_encoder", "transformer"}
        for graph, found in result.roundings.items():
            recorded = manifest.builds[result.precision].components[graph]
            assert found == quality.Rounding(recorded.errors, tuple(recorded.kept))
    printed = page.render(report)
    worst = max(report.results[0].roundings["text_encoder"].errors.items(), key=lambda item: item[1])[0]
    assert worst in printed
    assert "of them kept as in the checkpoint" in printed
    assert "SSIM 2" in printed
    assert "24 to 30 dB" in printed


def test_kept_layers_come_first(report):
    result = quality.Result(
        "int8", graphs={}, roundings={"transformer": quality.Rounding({"a": 0.1, "b": 0.3}, ("a",))}
    )
    _, rows = page.rounding_rows(quality.Report(report.plan, [], [result]))
    assert [(row[0], row[3]) for row in rows] == [("a", "checkpoint's"), ("b", "int8")]


def test_text_encoder_of_another_precision(model):
    plan = quality.Plan(model, ("int8",), ("a cat",), width=64, height=64, steps=1, text_encoder_precision="bf16")
    (result,) = quality.run(plan, lambda _: None).results
    assert result.graphs["text_encoder"].relative == 0
    assert result.graphs["transformer"].relative > 0
    assert set(result.roundings) == {"transformer"}
    plain = quality.run(replace(plan, text_encoder_precision=None), lambda _: None).results[0]
    assert result.graphs["transformer"] == plain.graphs["transformer"]
    assert result.megabytes > plain.megabytes


def test_every_layer_is_compared(report, model):
    """Double blocks have two outputs, single blocks one, the last of them without text; tokens are in brackets."""
    found = [layer.name for layer in report.results[0].layers]
    text = [f"model/layers.{i} [512]" for i in range(3)]
    double = ["transformer_blocks.0 picture [20]", "transformer_blocks.0 text [512]"]
    single = [f"single_transformer_blocks.{i} [{tokens}]" for i, tokens in enumerate((532, 532, 20))]
    assert found == [*text, *double, *single]
    graph = onnx.load(model / "transformer.onnx", load_external_data=False)
    assert len(quality.layer_outputs(graph)) == 5


def test_int8_is_better_than_int4(report):
    int8, int4 = report.results
    assert [int8.precision, int4.precision] == ["int8", "int4"]
    for graph in ("text_encoder", "transformer"):
        assert 0 < int8.graphs[graph].relative < int4.graphs[graph].relative < 0.2
    for graph in ("vae_encoder", "vae_decoder"):
        assert int8.graphs[graph].relative == 0
    assert all(a > b > 20 for a, b in zip(int8.psnr, int4.psnr, strict=True))
    assert 0 < int4.megabytes < int8.megabytes


def test_last_layer_has_the_error_of_the_graph(report):
    """The text encoder returns the outputs of its layers side by side."""
    for result in report.results:
        layers = [layer.relative for layer in result.layers if layer.graph == "text_encoder"]
        assert min(layers) <= result.graphs["text_encoder"].relative <= max(layers)
        for before, after in zip([0.0, *layers], layers, strict=False):
            assert after <= before + 1.0001 * next(x.added for x in result.layers if x.relative == after)


def test_streams_of_equal_length_are_told_apart():
    """The second block adds no error to either stream."""
    one = np.ones((1, 64, 4), np.float32)
    errors = {"/transformer_blocks.0/Add_2": 0.3, "/transformer_blocks.0/Add_3": 0.1}
    errors |= {"/transformer_blocks.1/Add_2": 0.3, "/transformer_blocks.1/Add_3": 0.1}
    found = {name: np.float32(1 + error) * one for name, error in errors.items()}
    layers = quality.layer_errors("transformer", found, dict.fromkeys(errors, one))
    assert [layer.added for layer in layers] == pytest.approx([0.3, 0.1, 0, 0], abs=1e-6)
    names = [f"transformer_blocks.{i} {stream} [64]" for i in (0, 1) for stream in ("picture", "text")]
    assert [layer.name for layer in layers] == names


def test_nothing_is_left_behind(report, model):
    assert not [path for path in model.rglob("*") if path.name.endswith((".tmp", ".partial"))]


def test_command(model, tmp_path, capsys):
    output = tmp_path / "report.html"
    arguments = ["compare", "-d", str(model), "--precision", "int8", "-o", str(output)]
    assert main([*arguments, "-W", "64", "-H", "64", "-s", "1", "-p", "a <b>"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| transformer +\| int8 +\| +0\.\d{3}% ", printed)
    text = output.read_text()
    assert text.count("data:image/png;base64,") == 2
    assert text.count("<svg") == 2
    assert "a &lt;b&gt;" in text


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--precision", "bf16"], "nothing to compare with bf16"),
        (["--precision", "int3"], "precision 'int3' is unknown"),
        (["--text-encoder-precision", "int3"], "precision 'int3' is unknown"),
        (["-W", "65"], "width 65 can't be drawn"),
        (["-p", " "], "the prompt is empty"),
        (["-o", "missing/report.html"], "does not exist: create it, or choose another with -o"),
    ],
)
def test_usage_errors(model, fails, tmp_path, monkeypatch, arguments, pattern):
    monkeypatch.chdir(tmp_path)
    fails(2, pattern, "compare", "-d", model, *arguments)
    assert not list(tmp_path.iterdir())
