"""Known models, and their pictures: what is drawn is compared with what was published, build by build."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxonnx import api
from fluxonnx.check import architecture, picture
from fluxonnx.check import report as reports
from fluxonnx.check.findings import FAILED, OK, SKIPPED, WARNING, Finding
from fluxonnx.contract import open_checkpoint
from fluxonnx.errors import FluxonnxError
from fluxonnx.export.components import read_architecture
from fluxonnx.runtime.request import Request
from tools.architectures import ARCHITECTURES, Architecture, TextEncoderSize, TransformerSize
from tools.make_checkpoint import model_index, write_json

REFERENCE = picture.known()
TINY = Path(__file__).parent.parent / "models/tiny-klein"


def write_configs(root: Path, sizes: Architecture, distilled: bool = True) -> None:
    write_json(root / "model_index.json", model_index(distilled))
    write_json(root / "text_encoder/config.json", sizes.text_encoder.config("bfloat16"))
    write_json(root / "transformer/config.json", sizes.transformer.config())
    write_json(root / "vae/config.json", sizes.vae.config())


class Drawer:
    """Stands for an opened model that draws the known pictures, changed by `change`."""

    def __init__(self, change) -> None:
        self.change, self.requests = change, []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def run(self, request: Request, seeds: list[int]) -> list[Image.Image]:
        self.requests.append((request, seeds))
        known = next(item for item in REFERENCE.pictures if item.prompt == request.prompt)
        cells = np.repeat(np.repeat(known.colours, known.height // 16, 0), known.width // 16, 1)
        return [Image.fromarray(np.clip(self.change(cells) + 0.5, 0, 255).astype(np.uint8))]


def drawn(changes: dict, looks_random: bool = False) -> tuple[list[Finding], dict[str, Drawer]]:
    drawers = {name: Drawer(change) for name, change in changes.items()}

    def load(root, precision, on_export):
        assert root == Path("model")
        if drawers[precision].change is None:
            raise FluxonnxError("it can't be opened")
        return drawers[precision]

    findings = picture.check(Path("model"), REFERENCE, list(changes), looks_random, lambda text: None, load)
    return list(findings), drawers


def same(cells):
    return cells


def test_known_pictures():
    """The data that the package ships: two pictures, 16 x 16 colours each."""
    assert [(item.width, item.height, item.seed, item.steps) for item in REFERENCE.pictures] == [
        (64, 64, 42, 2),
        (512, 512, 123, 4),
    ]
    assert all(item.colours.shape == (16, 16, 3) for item in REFERENCE.pictures)
    assert all(0 <= item.colours.min() < item.colours.max() <= 255 for item in REFERENCE.pictures)
    assert REFERENCE.allowed == 20


def test_mean_colours():
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    found = picture.mean_colours(Image.fromarray(pixels), 2, 2)
    assert found.shape == (2, 2, 3)
    assert found[1, 0] == pytest.approx(pixels[2:, :3].reshape(-1, 3).mean(0))


def test_right_picture():
    """The request is flux2.c's: its noise, seeds, sizes and steps, and prompts padded to 512 tokens."""
    findings, drawers = drawn({"bf16": same})
    assert [finding.state for finding in findings] == [OK, OK]
    assert all(finding.figures["difference"] < 0.5 for finding in findings)
    (request, seeds), _ = drawers["bf16"].requests
    assert (request.prompt, request.width, request.height) == ("A fluffy orange cat sitting on a windowsill", 64, 64)
    assert (request.steps, request.noise, request.max_sequence_length, seeds) == (2, "flux2c", 512, [42])


@pytest.mark.parametrize(
    "wrong", [lambda c: c * 0 + 128, lambda c: c[:, ::-1], lambda c: 255 - c], ids=["grey", "mirrored", "negative"]
)
def test_wrong_picture(wrong):
    """A grey one, a mirrored one and a negative are all over the bound."""
    findings, drawers = drawn({"bf16": wrong})
    assert [finding.state for finding in findings] == [FAILED, SKIPPED]
    assert "these are not the released weights" in findings[0].text
    assert findings[0].figures["difference"] > 40
    assert len(drawers["bf16"].requests) == 1  # the large one would take minutes and say the same


def test_random_weights_are_named_as_the_cause():
    findings, _ = drawn({"bf16": lambda cells: cells * 0}, looks_random=True)
    assert "not the released weights: they look like random ones" in findings[0].text


def test_other_builds_are_compared_with_the_first():
    noise = np.random.default_rng(0).normal(0, 10, (512, 512, 3))
    findings, _ = drawn({"bf16": same, "int8": lambda c: c + noise[: len(c), : len(c)], "int4": lambda c: 255 - c})
    states = [(finding.figures.get("precision"), finding.state) for finding in findings]
    assert states == [
        *[("bf16", OK)] * 2,
        *[("int8", OK)] * 4,
        *[("int4", FAILED), ("int4", WARNING), (None, SKIPPED)],
    ]
    psnr = [finding.figures["psnr"] for finding in findings if "psnr" in finding.figures]
    assert psnr[0] == pytest.approx(28.2, abs=0.5)
    assert all(finding.figures["against"] == "bf16" for finding in findings if "psnr" in finding.figures)


def test_build_that_cannot_be_opened():
    findings, _ = drawn({"bf16": None, "int8": same})
    assert [finding.state for finding in findings] == [FAILED, OK, OK]
    assert findings[0].text == "bf16: it can't be opened"


@pytest.mark.slow
def test_real_model_draws(tmp_path):
    """The bundled model does not draw the published picture; its own one is the same again, and nearly so in int8."""
    root = tmp_path / "model"
    shutil.copytree(TINY, root, ignore=shutil.ignore_patterns("training", "*.png", "*.onnx"))
    said: list[str] = []
    first, second = picture.check(root, REFERENCE, ["bf16"], True, said.append)
    assert (first.state, second.state) == (FAILED, SKIPPED)
    assert "not the released weights: they look like random ones" in first.text
    assert said == [f"Exporting {root} ...", 'bf16 draws "A fluffy orange cat sitting on a windowsill" at 64x64']

    known = REFERENCE.pictures[0]
    with api.load(root) as flux:
        image = flux.generate(known.prompt, 64, 64, 2, 42, noise="flux2c", max_sequence_length=512)
    own = replace(REFERENCE, pictures=(replace(known, colours=picture.mean_colours(image, 16, 16)),), allowed=0.0)
    (same,) = picture.check(root, own, ["bf16"], True, said.append)
    assert (same.state, same.figures["difference"]) == (OK, 0.0)
    *_, distance = picture.check(root, replace(own, allowed=20.0), ["bf16", "int8"], True, said.append)
    assert distance.state == OK
    assert 20 < distance.figures["psnr"] < 100


@pytest.mark.parametrize(
    ("asked", "words"),
    [(False, "as --no-picture says"), (True, "no picture of this model is known"), (None, "no picture of this model")],
)
def test_nothing_to_draw(tmp_path, asked, words):
    *_, last = reports.run(reports.Plan(tmp_path, picture=asked)).findings
    assert (last.state, last.subject) == (SKIPPED, "picture")
    assert words in last.text


def test_nothing_is_drawn_of_a_model_without_weights(tmp_path):
    """The configs are those of the model whose pictures are known, but files are missing."""
    write_configs(tmp_path, FOUR)
    report = reports.run(reports.Plan(tmp_path))
    assert report.model == "FLUX.2-klein-4B"
    assert report.findings[-1].text == "not drawn, because the check of files failed: mend that first"


FOUR = ARCHITECTURES["4b"]
NINE = Architecture(
    TextEncoderSize(4096, 36, 32, 8, 128, 12288, vocab=151936, tied=False),
    TransformerSize(32, 128, 8, 24, text_dim=12288, in_channels=128, axes=(32, 32, 32, 32)),
    FOUR.vae,
)


@pytest.mark.parametrize(
    ("sizes", "distilled", "name", "state"),
    [
        (FOUR, True, "FLUX.2-klein-4B", OK),
        (FOUR, False, "FLUX.2-klein-base-4B", OK),
        (NINE, True, "FLUX.2-klein-9B", OK),
        (NINE, False, "FLUX.2-klein-base-9B", OK),
        (replace(FOUR, vae=replace(FOUR.vae, decoder_channels=(96, 192, 384, 384))), True, "FLUX.2-klein-4B", OK),
        (replace(FOUR, text_encoder=replace(FOUR.text_encoder, layers=30)), True, None, WARNING),
        (replace(FOUR, transformer=replace(FOUR.transformer, single_layers=12)), True, None, SKIPPED),
        (ARCHITECTURES["odd-heads"], True, None, SKIPPED),
    ],
)
def test_known_architectures(tmp_path, sizes, distilled, name, state):
    write_configs(tmp_path, sizes, distilled)
    checkpoint = open_checkpoint(tmp_path)
    found = read_architecture(checkpoint, None)
    known = architecture.recognise(checkpoint, found)
    (finding,) = architecture.check(known, found)
    assert (known.name, finding.state) == (name, state)


def test_kv_models_have_their_own_name():
    assert architecture.Known("9B", "Qwen3-8B", "FLUX.2's", False, kv=True).name == "FLUX.2-klein-9B-KV"
