"""Every mode of `generate` from the command line, and `info`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxonnx
from fluxonnx.cli import main
from fluxonnx.runtime.metadata import read_parameters
from fluxonnx.runtime.saving import save_image
from tests.support import Case

pytestmark = pytest.mark.slow

CASE, BASE = Case("odd-heads"), Case("odd-heads", is_distilled=False)
SMALL = ["-W", "64", "-H", "64", "-s", "2"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with some pictures in it."""
    monkeypatch.chdir(tmp_path)
    for i, size in enumerate([(100, 70), (64, 64), (80, 96)]):
        values = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(values).save(tmp_path / f"in{i}.png")
    return tmp_path


@pytest.fixture
def generate(checkpoints, folder):
    """generate(*arguments) runs the command in `folder` with a distilled model and returns its exit code."""
    model = str(checkpoints.exported(CASE))

    def generate(*arguments: object, model: str = model) -> int:
        return main(["generate", "-d", model, *map(str, arguments)])

    return generate


@pytest.fixture
def fails(generate, capsys):
    """fails(code, pattern, *arguments): one line on standard error, nothing written."""

    def fails(code: int, pattern: str, *arguments: object) -> None:
        before = set(Path().iterdir())
        assert generate(*arguments) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert re.fullmatch(f"fluxonnx: .*{pattern}.*", line), line
        assert set(Path().iterdir()) == before

    return fails


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir() if not path.name.startswith("in"))


def pixels(name: str) -> bytes:
    with Image.open(name) as image:
        return image.tobytes()


def parameters(name: str) -> dict:
    with Image.open(name) as image:
        return json.loads(image.text["fluxonnx"])


def test_input_alone_is_a_reference(generate):
    """-i without -t edits: the same as -r."""
    assert generate("-p", "a", "-i", "in0.png", "-S", 1, "-o", "a.png") == 0
    assert generate("-p", "a", "-r", "in0.png", "-S", 1, "-o", "b.png") == 0
    assert pixels("a.png") == pixels("b.png")
    assert Image.open("a.png").size == (96, 64)


def test_input_with_strength_is_painted_over(generate, checkpoints):
    assert generate("-p", "a", "-i", "in0.png", "-t", 0.7, "-S", 1, "-o", "a.png") == 0
    with fluxonnx.load(checkpoints.exported(CASE)) as flux:
        expected = flux.img2img("a", Image.open("in0.png"), 0.7, seed=1)
    assert pixels("a.png") == expected.tobytes()
    assert parameters("a.png")["strength"] == 0.7


def test_strength_without_a_number_is_075(generate):
    assert generate("-p", "a", "-i", "in0.png", "-S", 1, "-o", "a.png", "-t") == 0
    assert parameters("a.png")["strength"] == 0.75


def test_strength_0_keeps_every_pixel(generate):
    assert generate("-p", "a", "-i", "in0.png", "-t", 0, "-o", "a.png") == 0
    assert pixels("a.png") == pixels("in0.png")


def test_strength_and_references_together(generate, checkpoints):
    assert (
        generate("-p", "a", "-i", "in0.png", "-t", 0.5, "-r", "in1.png", "-r", "in2.png", "-S", 1, "-o", "a.png") == 0
    )
    references = tuple(Image.open(f"in{i}.png") for i in (1, 2))
    with fluxonnx.load(checkpoints.exported(CASE)) as flux:
        expected = flux.img2img("a", Image.open("in0.png"), 0.5, seed=1, references=references)
    assert pixels("a.png") == expected.tobytes()


def test_several_inputs_are_references_in_order(generate, checkpoints):
    assert generate("-p", "a", "-i", "in1.png", "-i", "in2.png", "-r", "in0.png", "-S", 1, "-o", "a.png") == 0
    with fluxonnx.load(checkpoints.exported(CASE)) as flux:
        expected = flux.edit("a", [Image.open(f"in{i}.png") for i in (1, 2, 0)], seed=1)
    assert pixels("a.png") == expected.tobytes()


def test_base_model_with_guidance(generate, checkpoints, capsys):
    model = str(checkpoints.exported(BASE))
    assert generate("-p", "a", *SMALL, "-g", 3, "--negative-prompt", "b", "-S", 1, "-o", "a.png", model=model) == 0
    assert (parameters("a.png")["guidance_scale"], parameters("a.png")["negative_prompt"]) == (3.0, "b")
    assert generate("-p", "a", *SMALL, "-g", 3, "-S", 1, "-o", "b.png") == 0
    assert "guidance scale 3 on a model that was distilled to need none" in capsys.readouterr().err
    assert parameters("b.png")["guidance_scale"] == 3.0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--schedule", "power", "--power-alpha", 1.5], {"schedule": "power", "power_alpha": 1.5, "steps": 4}),
        (["--schedule", "linear", "-s", 3], {"schedule": "linear", "steps": 3}),
        (["--sigmas", 1, 0.6, 0.3], {"schedule": "custom", "sigmas": [1, 0.6, 0.3], "steps": 3}),
        (["--sampler", "heun"], {"sampler": "heun"}),
        (["--sampler", "dpmpp-2m"], {"sampler": "dpmpp-2m"}),
        (["--noise", "size-independent"], {"noise": "size-independent"}),
        (["--noise", "flux2c"], {"noise": "flux2c"}),
    ],
)
def test_sampling_flags(generate, flags, expected):
    assert generate("-p", "a", "-W", 64, "-H", 64, "-S", 1, "-o", "plain.png") == 0
    assert generate("-p", "a", "-W", 64, "-H", 64, "-S", 1, "-o", "a.png", *flags) == 0
    assert expected.items() <= parameters("a.png").items()
    assert pixels("a.png") != pixels("plain.png")


def test_count_numbers_files_and_never_overwrites(generate, capsys):
    assert generate("-p", "a", *SMALL, "-S", 7, "-n", 2, "-o", "cat.png") == 0
    assert names() == ["cat-0001.png", "cat-0002.png"]
    first = Path("cat-0001.png").read_bytes()
    assert generate("-p", "a", *SMALL, "-S", 9, "-n", 2, "-o", "cat.png") == 0
    assert names() == [f"cat-000{i}.png" for i in (1, 2, 3, 4)]
    assert Path("cat-0001.png").read_bytes() == first
    assert [parameters(name)["seed"] for name in names()] == [7, 8, 9, 10]
    assert "Seed: 7, 8" in capsys.readouterr().err


def test_list_of_seeds(generate):
    assert generate("-p", "a", *SMALL, "-S", 5, 100, "-o", "cat.png") == 0
    assert [parameters(name)["seed"] for name in names()] == [5, 100]
    assert generate("-p", "a", *SMALL, "-S", 100, "-o", "alone.png") == 0
    assert Path("alone.png").read_bytes() == Path("cat-0002.png").read_bytes()


def test_prompt_file_of_lines(generate):
    Path("in.txt").write_text("a cat\n\n  a dog ☂ \n", "utf-8")
    assert generate("--prompt-file", "in.txt", *SMALL, "-S", 3, "-o", "x.png") == 0
    assert names() == ["x-0001.png", "x-0002.png"]
    assert [parameters(name)["prompt"] for name in names()] == ["a cat", "a dog ☂"]


def test_prompt_file_of_json(generate):
    lines = [
        {"prompt": "a", "seed": 5, "width": 96, "output": "named.png"},
        {"prompt": "b", "steps": 1, "sampler": "heun"},
    ]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert generate("--prompt-file", "in.jsonl", "-H", 64, "-o", "x.png") == 0
    assert names() == ["named.png", "x-0001.png"]
    found = parameters("named.png")
    assert (found["prompt"], found["seed"], found["width"], found["height"]) == ("a", 5, 96, 64)
    assert (parameters("x-0001.png")["steps"], parameters("x-0001.png")["sampler"]) == (1, "heun")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_picture_is_made_again_byte_for_byte(generate, suffix):
    """From nothing but itself - and its input pictures, whose names it knows."""
    first, again = f"a.{suffix}", f"b.{suffix}"
    assert (
        generate(
            "-p", "ä “cat”", "-i", "in0.png", "-t", 0.6, "-r", "in1.png", "-S", 4, "--sampler", "heun", "-o", first
        )
        == 0
    )
    assert generate("--from", first, "-o", again) == 0
    assert Path(first).read_bytes() == Path(again).read_bytes()


@pytest.mark.parametrize(
    "flags", [[], ["--sigmas", 1, 0.5], ["-n", 2], ["--noise", "size-independent"], ["--noise", "flux2c"]]
)
def test_made_again_in_every_mode(generate, flags):
    assert generate("-p", "a", "-W", 64, "-H", 96, "-S", 4, "-o", "a.png", *flags) == 0
    for name in names():
        assert generate("--from", name, "-o", "again.png") == 0
        assert Path(name).read_bytes() == Path("again.png").read_bytes()
        Path("again.png").unlink()


def test_flags_override_a_picture(generate):
    assert generate("-p", "a", *SMALL, "-S", 4, "-o", "a.png") == 0
    assert generate("--from", "a.png", "-p", "b", "-W", 96, "-S", 5, "-o", "b.png") == 0
    found = parameters("b.png")
    assert (found["prompt"], found["width"], found["height"], found["seed"], found["steps"]) == ("b", 96, 64, 5, 2)
    assert generate("--from", "a.png", "--sigmas", 1, 0.4, 0.2, "-o", "c.png") == 0
    assert (parameters("c.png")["schedule"], parameters("c.png")["steps"]) == ("custom", 3)


def test_changed_input_is_reported(generate, capsys):
    assert generate("-p", "a", "-i", "in1.png", "-S", 4, "-o", "a.png") == 0
    Image.open("in2.png").save("in1.png")
    assert generate("--from", "a.png", "-o", "b.png") == 0
    assert "has changed since" in capsys.readouterr().err


def test_another_model_is_reported(generate, checkpoints, capsys):
    assert generate("-p", "a", *SMALL, "-S", 4, "-o", "a.png") == 0
    other = str(checkpoints.exported(Case("one-double-three-single")))
    assert generate("--from", "a.png", "-o", "b.png", model=other) == 0
    assert "a.png was made with odd-heads" in capsys.readouterr().err


def with_parameters(name: str, **changes: object) -> None:
    """Change parameters in a picture; None removes one."""
    known = {key: value for key, value in {**read_parameters(name), **changes}.items() if value is not None}
    with Image.open(name) as image:
        save_image(image.convert("RGB"), name, known)


def test_picture_says_its_provider(generate, capsys):
    assert generate("-p", "a", *SMALL, "-S", 4, "-o", "a.png") == 0
    assert parameters("a.png")["provider"] == "cpu"
    with_parameters("a.png", provider="no-such-provider")
    assert generate("--from", "a.png", "-o", "b.png") == 0
    assert "a.png was made on no-such-provider, which is not available" in capsys.readouterr().err
    assert parameters("b.png")["provider"] == "cpu"


@pytest.mark.parametrize("older", [True, False])
def test_picture_is_made_again_with_its_flavour(generate, copy_of, older):
    """Also one from before pictures said their provider."""
    root = copy_of(CASE)
    with fluxonnx.load(root, flavour="portable") as flux:
        image = flux.generate("x", 64, 64, 1, 1)
    save_image(image, "a.png", image.info)
    if older:
        with_parameters("a.png", provider=None)
    assert generate("--from", "a.png", "-o", "b.png", model=str(root)) == 0
    assert parameters("b.png")["flavour"] == "portable"
    assert pixels("b.png") == pixels("a.png")


def test_pictures_are_saved_one_by_one(generate, monkeypatch):
    """What is finished before a run is interrupted is kept."""
    save = Image.Image.save
    saved: list[object] = []

    def interrupt_the_second(self: Image.Image, target: object, **options: object) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(target)
        save(self, target, **options)

    monkeypatch.setattr(Image.Image, "save", interrupt_the_second)
    assert generate("-p", "a", *SMALL, "-S", 7, "-n", 3, "-o", "cat.png") == 130
    assert names() == ["cat-0001.png"]


def test_info_prints_json(generate, capsys):
    assert generate("-p", "a ☂", *SMALL, "-S", 4, "-o", "a.webp", "-q") == 0
    assert main(["info", "a.webp"]) == 0
    printed = capsys.readouterr().out
    assert "☂" in printed
    assert {"prompt": "a ☂", "seed": 4, "precision": "bf16", "flavour": "ort"}.items() <= json.loads(printed).items()
    assert main(["info", "in0.png"]) == 1
    assert "no fluxonnx parameters" in capsys.readouterr().err


def test_cache_dir(generate):
    for name in ("a.png", "b.png"):
        assert generate("-p", "a", *SMALL, "-S", 4, "--cache-dir", "cache", "-o", name) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert len(list(Path("cache").glob("*.npy"))) == 1


def test_exif_rotated_input(generate):
    """A phone's upright picture gives an upright output."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open("in0.png").save("in-phone.jpg", exif=exif)
    assert generate("-p", "a", "-i", "in-phone.jpg", "-s", 1, "-o", "a.png") == 0
    assert Image.open("a.png").size == (64, 96)


# Bad input


@pytest.mark.parametrize(
    ("code", "pattern", "arguments"),
    [
        (2, "nothing to draw", []),
        (2, "choose one", ["-p", "a", "--prompt-file", "in.txt"]),
        (1, "absent.png does not exist", ["-p", "a", "-i", "absent.png"]),
        (1, "in.txt is not an image", ["-p", "a", "-r", "in.txt"]),
        (2, "strength is 1.5, but must be from 0", ["-p", "a", "-i", "in0.png", "-t", "1.5"]),
        (2, "give the picture with -i", ["-p", "a", "-t", "0.5"]),
        (2, "give one -i", ["-p", "a", "-i", "in0.png", "-i", "in1.png", "-t", "0.5"]),
        (2, "17 reference images are too many", ["-p", "a", *(["-r", "in0.png"] * 17)]),
        (2, "guidance_scale is 0.2", ["-p", "a", "-g", "0.2"]),
        (2, "sampler 'ddim' is unknown", ["-p", "a", "--sampler", "ddim"]),
        (2, "schedule 'x' is unknown", ["-p", "a", "--schedule", "x"]),
        (2, "go together", ["-p", "a", "--schedule", "custom"]),
        (2, "each must be lower", ["-p", "a", "--sigmas", "0.5", "0.7"]),
        (2, "leave steps out", ["-p", "a", "--sigmas", "1", "0.5", "-s", "4"]),
        (2, "power_alpha is -1.0", ["-p", "a", "--schedule", "power", "--power-alpha", "-1"]),
        (2, "noise 'pink' is unknown", ["-p", "a", "--noise", "pink"]),
        (2, "count is 0", ["-p", "a", "-n", "0"]),
        (2, "-n counts up from one seed", ["-p", "a", "-n", "2", "-S", "1", "2"]),
        (2, "precision 'int3' is unknown", ["-p", "a", "--precision", "int3"]),
        (2, "prompt file absent.txt can't be read", ["--prompt-file", "absent.txt"]),
        (2, "in0.png can't be read: it is not UTF-8 text", ["--prompt-file", "in0.png"]),
        (2, "in-empty.txt holds no prompt", ["--prompt-file", "in-empty.txt"]),
        (2, 'in.jsonl, line 2 has an unknown key "promt"', ["--prompt-file", "in.jsonl"]),
        (1, "no fluxonnx parameters", ["--from", "in0.png"]),
        (1, "absent.png does not exist", ["--from", "absent.png"]),
        (2, "cache directory in.txt can't be used", ["-p", "a", "--cache-dir", "in.txt"]),
    ],
)
def test_impossible_flags(folder, fails, code, pattern, arguments):
    Path("in.txt").write_text("a cat")
    Path("in-empty.txt").touch()
    Path("in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "promt": "c"}\n')
    fails(code, pattern, "-q", *arguments)


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ('{"', "line 1 is not valid JSON"),
        ('{"seed": 1}', 'line 1 has no "prompt"'),
        ('{"prompt": ["a"]}', r"line 1: \"prompt\" is \['a'\], expected a string"),
        (f'{{"prompt": "a", "seed": {"9" * 5000}}}', "line 1 is not valid JSON"),
        (f'{{"prompt": "a", "seed": {2**64}}}', f"seed is {2**64}, but must be from 0 to {2**64 - 1}"),
        ('{"prompt": "a", "seed": "x"}', "\"seed\" is 'x', expected an integer"),
        ('{"prompt": "a", "width": true}', '"width" is True'),
        ('{"prompt": "a", "output": "no/a.png"}', "folder no does not exist"),
        ('{"prompt": "a", "width": 70}', "width 70 can't be drawn"),
    ],
)
def test_bad_line_of_a_prompt_file(folder, fails, line, pattern):
    Path("in.jsonl").write_text(line)
    fails(2, pattern, "-q", "--prompt-file", "in.jsonl")


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"width": "64"}, "\"width\" is '64', expected an integer"),
        ({"prompt": ["a"]}, r"\"prompt\" is \['a'\], expected a string"),
        ({"seed": 1.5}, '"seed" is 1.5, expected an integer'),
        ({"sigmas": "1, 0.5"}, "\"sigmas\" is '1, 0.5', expected a list of numbers"),
        ({"reference_files": "in0.png"}, "\"reference_files\" is 'in0.png', expected a list of strings"),
        ({"precision": 8}, '"precision" is 8, expected a string'),
    ],
)
def test_damaged_parameters_of_a_picture(folder, fails, changes, pattern):
    save_image(Image.new("RGB", (64, 64)), "in-made.png", {"prompt": "a", **changes})
    fails(1, f"in-made.png holds damaged fluxonnx parameters: {pattern}", "-q", "--from", "in-made.png")


def test_parameters_that_are_unknown_are_ignored(generate):
    save_image(
        Image.new("RGB", (64, 64)), "in-made.png", {"prompt": "a", "output": "b.png", "image": "in0.png", "mood": {}}
    )
    assert generate("--from", "in-made.png", *SMALL, "-o", "a.png") == 0
    assert names() == ["a.png"]


def test_a_bad_line_is_found_before_the_first_picture(folder, fails):
    Path("in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "width": 70}')
    fails(2, "width 70", "-q", "--prompt-file", "in.jsonl")
