"""What a run knows before it draws: input pictures found again, and errors before anything is exported."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fluxonnx.cli import main
from fluxonnx.errors import ImageError
from fluxonnx.runtime.images import digest
from fluxonnx.runtime.input_files import Inputs, load_inputs, loader
from fluxonnx.runtime.metadata import read_parameters
from tests.support import Case

CASE = Case("odd-heads")


def made(path: Path, colour: str, size: tuple[int, int] = (64, 64)) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def again(known: dict, source: Path | None, **flags: bool) -> Inputs:
    """The inputs of a picture that is made again."""
    return load_inputs([], [], False, known, source, flags.get("absolute_paths", False), loader())


def test_a_picture_knows_the_names_of_its_inputs(tmp_path):
    photo, other = made(tmp_path / "a/photo.png", "red"), made(tmp_path / "b/photo.png", "blue")
    hashes = [digest(Image.open(path)) for path in (photo, other)]
    inputs = load_inputs([photo], [other], True, {}, None, False, loader())
    assert inputs.metadata == {
        "image_file": "photo.png",
        "image_sha256": hashes[0],
        "reference_files": ["photo.png"],
        "reference_sha256": [hashes[1]],
    }
    inputs = load_inputs([photo], [other], False, {}, None, True, loader())
    assert inputs.metadata == {"reference_files": [str(photo), str(other)], "reference_sha256": hashes}


def test_inputs_are_found_beside_the_picture_or_here(tmp_path, monkeypatch, recwarn):
    """The one that did not change, if there are several."""
    beside, here = made(tmp_path / "beside/photo.png", "red"), made(tmp_path / "here/photo.png", "blue")
    monkeypatch.chdir(here.parent)
    source = beside.parent / "made.png"
    for path in (beside, here):
        known = {"image_file": "photo.png", "image_sha256": digest(Image.open(path))}
        inputs = again(known, source)
        assert inputs.metadata == known
        assert inputs.image is not None
        assert inputs.image.tobytes() == Image.open(path).tobytes()
    assert not recwarn.list
    here.unlink()
    with pytest.warns(UserWarning, match=r"photo\.png has changed since"):
        again(known, source)
    beside.unlink()
    with pytest.raises(ImageError, match=r"photo\.png does not exist beside .*made\.png or here: bring it back"):
        again(known, source)


def test_absolute_paths_of_older_pictures(tmp_path):
    photo = made(tmp_path / "a/photo.png", "red")
    known = {"reference_files": [str(photo)], "reference_sha256": [digest(Image.open(photo))]}
    source = tmp_path / "b/made.png"
    assert again(known, source).metadata == known
    photo.rename(made(source, "blue").parent / "photo.png")  # moved together with the picture
    assert again(known, source).metadata == known


def test_a_strangers_picture_does_not_lead_through_folders(tmp_path):
    made(tmp_path / "private/photo.png", "red")
    known = {"image_file": "../private/photo.png", "image_sha256": ""}
    with pytest.raises(ImageError, match="does not exist beside"):
        again(known, tmp_path / "made/made.png")


def test_each_input_is_read_once():
    load = loader()
    path = Path(__file__).parent.parent / "docs/images"
    picture = next(path.glob("*.png"))
    assert load(picture)[0] is load(picture)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "flags"), [((130, 77), []), ((1800, 40), []), ((130, 77), ["-W", "128", "-H", "64"])])
def test_a_copy_of_any_size_is_made_again(checkpoints, tmp_path, monkeypatch, size, flags):
    monkeypatch.chdir(tmp_path)
    made(Path("in.png"), "red", size)
    model = str(checkpoints.exported(CASE))
    arguments = ["generate", "-q", "-d", model]
    assert main([*arguments, "-p", "a", "-i", "in.png", "-t", "0", *flags, "-o", "a.png"]) == 0
    assert main([*arguments, "--from", "a.png", "-o", "b.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert read_parameters("a.png")["image_file"] == "in.png"
    if min(size) >= 64:
        assert main([*arguments, "--from", "a.png", "-t", "0.5", "-o", "c.png"]) == 0
        assert Image.open("c.png").size == (128, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "pattern", "arguments"),
    [
        (2, "seed is -1", ["-p", "x", "-S", "-1"]),
        (2, f"seed is {2**64}", ["-p", "x", "-S", str(2**64 - 1), "-n", "2"]),
        (2, "width 1000 can't be drawn", ["-p", "x", "-W", "1000"]),
        (2, "prompt 3 of p.txt: width 1000 can't be drawn", ["--prompt-file", "p.txt"]),
        (2, "prompt 2 of q.txt: the prompt is not valid text", ["--prompt-file", "q.txt"]),
        (2, "too long", ["-p", "x", "-n", "2", "-o", f"{'a' * 249}.png"]),
        (2, "steps is 0", ["-p", "x", "-s", "0"]),
        (2, "threads is 0", ["-p", "x", "--threads", "0"]),
        (2, "precision 'int3' is unknown", ["-p", "x", "--precision", "int3"]),
        (2, "provider 'abacus' is not", ["-p", "x", "--provider", "abacus"]),
        (2, "cache directory p.txt can't be used", ["-p", "x", "--cache-dir", "p.txt"]),
        (1, "absent.png does not exist", ["-p", "x", "-i", "absent.png"]),
    ],
)
def test_errors_come_before_the_export(copy_of, tmp_path, monkeypatch, fails, code, pattern, arguments):
    root = copy_of(CASE)
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text('a\n\n{"prompt": "b"}\n{"prompt": "c", "width": 1000}\n')
    Path("q.txt").write_text('a\n{"prompt": "\\ud800"}\n')
    before = sorted(tmp_path.rglob("*"))
    fails(code, pattern, "generate", "-q", "-d", root, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_missing_tokenizer_is_found_before_the_export(copy_of, fails):
    root = copy_of(CASE)
    (root / "tokenizer/tokenizer.json").unlink()
    fails(1, "tokenizer.json is missing", "generate", "-q", "-d", root, "-p", "x")
    assert not list(root.glob("*.onnx"))
