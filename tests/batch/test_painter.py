"""Painters: batches in every form that engines have, their results, and what is wrong with a row."""

from __future__ import annotations

import hashlib
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

import fluxonnx
from fluxonnx.batch import Painter
from fluxonnx.batch.names import derived_seed
from fluxonnx.batch.painter import close
from fluxonnx.cli import main
from fluxonnx.errors import UsageError
from tests.support import Case

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")
SMALL = {"width": [64, 64], "height": [64, 64], "steps": [1, 1]}


@pytest.fixture
def painter(checkpoints):
    yield Painter(checkpoints.exported(CASE), threads=1)
    close()


def test_pictures_are_those_of_generate(painter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 80), "red").save("a.png")
    flags = ["-W", "64", "-H", "64", "-s", "1", "-S", "7", "--threads", "1", "-q", "-d", painter.model]
    for name, extra in (("one.png", []), ("two.jpg", ["-i", "a.png"]), ("three.webp", ["-i", "a.png", "-t", "0.5"])):
        assert main(["generate", "-p", "a cat", *flags, *extra, "-o", name]) == 0
    batch = painter(
        {
            "prompt": ["a cat"] * 3,
            "seed": [7] * 3,
            "output": ["one.png", "two.jpg", "three.webp"],
            "input": [None, ["a.png"], "a.png"],
            "strength": [None, float("nan"), 0.5],
            **{name: [*values, values[0]] for name, values in SMALL.items()},
        }
    )
    assert batch["error"] == [None] * 3
    for name, data, digest in zip(batch["output"], batch["picture"], batch["sha256"], strict=True):
        assert data == (tmp_path / name).read_bytes()
        assert digest == hashlib.sha256(data).hexdigest()
    assert json.loads(batch["parameters"][1])["reference_files"] == ["a.png"]


def batches() -> list:
    """The same batch as engines hold it; columns with empty cells become floats."""
    columns = {"prompt": ["a", "b"], "seed": [5, 6], "strange": [1, 2], **SMALL, "mask_crop": [None, None]}
    found = [columns, {name: np.array(values) for name, values in columns.items()}]
    pandas = pytest.importorskip("pandas")
    pyarrow = pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({**columns, "width": [64.0, float("nan")], "height": [64, pandas.NA]})
    return [*found, frame, pyarrow.table(columns)]


def test_batches_in_every_form(painter):
    expected = None
    for batch in batches():
        made = painter(batch)
        assert type(made) is type(batch)
        pictures = made["picture"].to_pylist() if hasattr(made, "to_pylist") else list(made["picture"])
        expected = expected or pictures
        assert pictures[0] == expected[0]
        assert Image.open(io.BytesIO(pictures[1])).size[0] in (64, 256)
        assert [str(value) for value in made["strange"]] == ["1", "2"]
        assert [int(value) for value in made["seed"]] == [5, 6]


def test_a_painter_is_its_settings(painter):
    painter({"prompt": ["a"], **{name: values[:1] for name, values in SMALL.items()}})
    assert pickle.loads(pickle.dumps(painter)) == painter
    assert len(pickle.dumps(painter)) < 2000
    flux = painter.open()
    assert pickle.loads(pickle.dumps(painter)).open() is flux  # opened once in a process
    assert Painter(painter.model, threads=2).open() is not flux


def test_wrong_rows_have_an_error(painter):
    made = painter(
        {
            "prompt": ["fine", "", 5, "x", "x", "x", "\ud800"],
            "width": [64, 64, 64, 1000, 64, "wide", 64],
            "height": [64] * 7,
            "steps": [1] * 7,
            "input": [None, None, None, None, "absent.png", None, None],
        }
    )
    assert [error is None for error in made["error"]] == [True] + [False] * 6
    words = [
        "",
        'no "prompt"',
        "expected a string",
        "1000x64 can't be drawn",
        "absent.png does not exist",
        "expected an integer",
        "not valid text",
    ]
    for error, word in zip(made["error"], words, strict=True):
        assert word in (error or "")
    assert [data is None for data in made["picture"]] == [False] + [True] * 6


def test_a_model_that_is_not_there_is_the_error_of_each_row(tmp_path):
    made = Painter(tmp_path / "nowhere")({"prompt": ["a", "b"]})
    assert len(set(made["error"])) == 1
    assert "nowhere" in made["error"][0]
    assert made["worker"][0].count(":") == 1


def test_warnings_are_a_column(painter):
    made = painter({"prompt": ["a", "b"], "guidance_scale": [2.0, 1.0], **SMALL})
    assert "distilled" in made["warning"][0]
    assert made["warning"][1] is None


def test_pictures_in_a_shared_folder(painter, tmp_path):
    shared = Painter(painter.model, threads=1, folder=tmp_path, format="ppm")
    made = shared({"prompt": ["a", "b"], "id": ["x", None], "seed": [1, 2], **SMALL})
    assert made["file"][0] == "x.ppm"
    assert "picture" not in made
    for file, digest in zip(made["file"], made["sha256"], strict=True):
        assert hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() == digest


def test_a_lora_that_is_missing_is_an_error(painter):
    made = Painter(painter.model, lora="absent.safetensors")({"prompt": ["a"]})
    assert "absent.safetensors does not exist" in made["error"][0]


def test_wrong_batches_and_settings():
    with pytest.raises(UsageError, match="different lengths: 1, 2"):
        Painter()({"prompt": ["a"], "seed": [1, 2]})
    with pytest.raises(UsageError, match="type list: pass columns"):
        Painter()([{"prompt": "a"}])
    with pytest.raises(UsageError, match="format 'bmp' is unknown: choose one of png"):
        Painter(format="bmp")


def test_seeds_are_the_same_everywhere(painter):
    """What a row draws does not count where it has a number or an id."""
    assert derived_seed(0, 1) == 4011020074
    rows = {"prompt": ["a", "b"], **SMALL}
    first = painter({**rows, "row": [1, 2]})["seed"]
    assert first[0] == 4011020074
    assert painter({**rows, "prompt": ["c", "b"], "row": [1, 2]})["seed"] == first
    assert painter(rows)["seed"] == painter(rows)["seed"]
    assert len({*first, *painter(rows)["seed"]}) == 4


def test_a_library_caller_may_paint_beside_a_model_of_its_own(painter):
    with fluxonnx.load(painter.model, threads=1) as flux:
        image = flux.generate("a", 64, 64, 1, seed=5)
        made = painter({"prompt": ["a"], "seed": [5], **{name: values[:1] for name, values in SMALL.items()}})
        assert Image.open(io.BytesIO(made["picture"][0])).tobytes() == image.tobytes()
