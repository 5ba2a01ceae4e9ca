"""A session without a terminal: lines in, pictures and messages out."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("prompt_toolkit")

from fluxonnx.cli.flags import find_model
from fluxonnx.cli.repl import plan_values
from fluxonnx.runtime.metadata import read_parameters
from fluxonnx.terminal.prompt import summary, talk
from fluxonnx.terminal.session import Session
from fluxonnx.terminal.studio import Choice, Keeping, Studio, keeping
from tests.lora.making import everything, layers_of, written
from tests.support import Case

pytestmark = pytest.mark.slow

CASE = Case("odd-heads")


class Bar:
    """Progress that is not shown; at a step, it does what a test wants."""

    def __init__(self) -> None:
        self.at_step = lambda step: None
        self.steps = 0

    def event(self, event) -> None:
        pass

    def step(self, step, steps, sigma, latents) -> None:
        self.steps += 1
        self.at_step(step)

    def close(self) -> None:
        pass


class Talk:
    """A session, and what it said."""

    def __init__(self, model: Path, free: int = 2**40) -> None:
        self.said: list[str] = []
        studio = Studio(
            Choice(dir=str(model)),
            lambda directory: find_model(directory, self.said.append),
            self.said.append,
            lambda event: self.session.watch(event),
            lambda: free,
        )
        self.begin(studio)

    def begin(self, studio: Studio) -> None:
        """Begin a session with the model of the last one."""
        self.bar = Bar()
        self.session = Session(
            plan=plan_values, say=self.said.append, complain=self.said.append, bar=self.bar, studio=studio
        )

    def __call__(self, *lines: str) -> str:
        """Type lines; returns what was said to them."""
        self.said.clear()
        left = list(lines)

        def read() -> str:
            if not left:
                raise EOFError
            return left.pop(0)

        studio = self.session.studio
        close, studio.close = studio.close, lambda: None  # the session goes on with the next lines
        try:
            talk(self.session, read)
        finally:
            studio.close = close
        return "\n".join(self.said)


@pytest.fixture(scope="module")
def shared(checkpoints):
    """A session whose model stays loaded from one test to the next."""
    found = Talk(checkpoints.exported(CASE))
    yield found
    found.session.studio.close()


@pytest.fixture
def say(shared, tmp_path, monkeypatch):
    """say(*lines) types them in a session in an empty folder, for small pictures of two steps."""
    monkeypatch.chdir(tmp_path)
    studio = shared.session.studio
    choice = studio.choice
    shared.begin(studio)
    shared("!size 64x96", "!steps 2")
    yield shared
    if studio.choice != choice:
        studio.change(**vars(choice))


def files() -> list[str]:
    return sorted(path.name for path in Path().glob("*.*"))


def parameters(name: str) -> dict:
    return read_parameters(Path(name))


def test_a_line_is_a_prompt_and_a_picture(say):
    assert "$1: out-0001.png 64x96" in say("a cat")
    assert parameters("out-0001.png") | {"prompt": "a cat", "steps": 2} == parameters("out-0001.png")
    assert "$2: out-0002.png" in say("!seed 7", "a dog")
    assert parameters("out-0002.png")["seed"] == 7
    assert say("", "   ") == ""
    assert "$3:" in say(" !wow, a prompt")
    assert parameters("out-0003.png")["prompt"] == "!wow, a prompt"


def test_nothing_is_overwritten(say):
    Path("out-0001.png").write_bytes(b"mine")
    assert "$1: out-0002.png" in say("a cat")
    assert Path("out-0001.png").read_bytes() == b"mine"


def test_the_same_picture_as_generate_makes(say, checkpoints):
    from fluxonnx.cli import main

    say("!seed 5", "!negative-prompt a dog", "!guidance 2", "a cat")
    flags = ["-S", "5", "--negative-prompt", "a dog", "-g", "2", "-W", "64", "-H", "96", "-s", "2"]
    model = str(checkpoints.exported(CASE))
    assert main(["generate", "-q", "-d", model, "-p", "a cat", "-o", "other.png", *flags]) == 0
    assert Path("out-0001.png").read_bytes() == Path("other.png").read_bytes()


def test_the_model_stays_loaded_and_a_known_prompt_is_not_encoded_again(say, monkeypatch):
    say("a cat")
    flux = say.session.studio.flux()
    ran = []
    monkeypatch.setattr(flux, "watch", lambda event: ran.append(getattr(event, "component", "")))
    say("!again")
    assert say.session.studio.flux() is flux
    assert "text_encoder" not in ran
    assert "transformer" in ran


def test_again_has_another_seed_and_the_present_values(say):
    assert "no prompt yet" in say("!again")
    say("a cat", "!again", "!steps 1", "!again 1")
    first, second, third = (parameters(f"out-000{i}.png") for i in (1, 2, 3))
    assert first["prompt"] == second["prompt"] == third["prompt"] == "a cat"
    assert len({first["seed"], second["seed"], third["seed"]}) == 3
    assert (second["steps"], third["steps"]) == (2, 1)


def test_pictures_are_referred_to(say):
    say("a cat", "a dog", "!seed 3", "$1 with the tail of $2")
    found = parameters("out-0003.png")
    assert found["prompt"] == "with the tail of image 2"
    assert found["reference_files"] == ["out-0001.png", "out-0002.png"]
    say("!strength 0.5", "$3 in oil")
    found = parameters("out-0004.png")
    assert (found["image_file"], found["strength"]) == ("out-0003.png", 0.5)
    say("!input $2", "like $1")
    found = parameters("out-0005.png")
    assert (found["image_file"], found["reference_files"]) == ("out-0002.png", ["out-0001.png"])
    assert "there is no picture $9: there are 5" in say("$9 x")


def test_files_with_spaces_are_inputs(say):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), np.uint8)).save("my cat.png")
    assert "input: 'my cat.png'" in say(r"!input my\ cat.png")
    assert "input: 'my cat.png'" in say("!input 'my cat.png'")
    assert "$1:" in say("!strength 0.5", "!size default", "a dog")
    assert parameters("out-0001.png")["image_file"] == "my cat.png"


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ("!", "! begins a command"),
        ("!stesp 4", "!stesp is unknown: did you mean !steps?"),
        ("!steps x", "steps is 'x', expected an integer"),
        ("!size 500x500", "width 500 can't be drawn"),
        ("!input no.png", "no.png"),
        ("!set quit 1", "quit is a command, and no value"),
        ("!reset quit", "has no value"),
        ("!lora no.safetensors", "no.safetensors does not exist"),
        ("!lora 'a", "a quote without its other half"),
        ("!model no/such/folder", "does not exist"),
        ("!precision int3", "int3"),
        ("!provider nope", "nope"),
        ("!threads x", "expected an integer"),
        ("!threads 0", "threads is 0"),
        ("!low-memory x", "say on or off"),
        ("!open 3", "there is no picture 3: there is none yet"),
        ("!save x.png", "there is no picture"),
        ("!show 2", "there is no picture 2"),
        ("!show kitty", "not one"),
        ("!help nothing", "!nothing is unknown"),
        ("!strength 0.5", "strength: 0.5"),
    ],
)
def test_bad_lines_are_said_in_one_line_and_change_nothing(say, line, pattern):
    before = dict(say.session.values), say.session.studio.choice
    said = say(line)
    *exporting, last = said.splitlines()
    assert pattern in last
    assert all(line.startswith("Exporting") for line in exporting)
    if not line.startswith("!strength"):
        assert (say.session.values, say.session.studio.choice) == before


def test_what_contradicts_itself_is_said_when_it_is_drawn(say):
    assert "give the picture with !input" in say("!strength 0.5", "a cat")
    assert "$1:" in say("!strength default", "a cat")


def test_the_session_goes_on_after_a_failure(say, checkpoints, tmp_path):
    copy = shutil.copytree(checkpoints.exported(CASE), tmp_path / "copy")
    say(f"!model {copy}", "a cat")
    (copy / "transformer.onnx").write_bytes(b"no graph")
    say.session.studio.close()
    assert "$2:" in say("a dog")  # exported again
    assert "model_index.json" in say("!model .")
    assert "$3:" in say("a bird")
    assert say.session.studio.choice.dir == str(copy)


def test_values_are_shown_and_reset(say):
    assert say("!steps") == "steps: 2"
    assert say("!steps default") == "steps: default"
    assert say("!seed 7", "!seed", "!seed random").splitlines() == ["seed: 7", "seed: 7", "seed: random"]
    assert say("!size") == "size: 64x96"
    assert say("!width 128", "!size").splitlines() == ["width: 128", "size: 128x96"]
    assert say("!set sampler heun") == "sampler: heun"
    listed = say("!set")
    assert "sampler                 heun" in listed
    assert "precision               default" in listed
    assert summary(say.session).split("  ")[1:] == [
        "size 128x96",
        "sampler heun",
        f"model {say.session.studio.choice.dir}",
    ]
    say("!reset")
    assert say.session.values == {}


def test_several_pictures_of_a_line(say):
    assert "Seed: 3, 4" in say("!seed 3", "!count 2", "a cat")
    assert [parameters(name)["seed"] for name in files()] == [3, 4]
    assert "$4:" in say("!count default", "!seed 1 9", "a dog")


def test_out_makes_a_folder_and_other_formats(say):
    say("!out pictures/today", "a cat", "!out b.webp", "a dog")
    assert [str(made.path) for made in say.session.made] == ["pictures/today/out-0001.png", "b-0001.webp"]
    Path("file").touch()
    assert "file" in say("!out file/below")


def test_save_copies_and_overwrites_nothing(say):
    say("a cat")
    assert "Saved cat.png" in say("!save cat.png")
    assert Path("cat.png").read_bytes() == Path("out-0001.png").read_bytes()
    assert "Saved my cat.jpg" in say("!save 1 my cat.jpg")
    assert parameters("my cat.jpg") == parameters("cat.png")
    assert "is there already" in say("!save cat.png")
    assert "needs a name" in say("!save")
    assert "must end in one of" in say("!save 1 cat.gif")


def test_list_and_help(say):
    assert "no picture yet" in say("!list")
    say("!seed 5", "a cat")
    assert say("!list") == "$1: out-0001.png 64x96, seed 5: a cat"
    helped = say("help")
    assert "!lora FILE[:SCALE]..." in helped
    assert "Ctrl-C" in helped
    assert "default: 4" in say("!help steps")
    assert "!save [N] FILE" in say("!help save")


@pytest.mark.parametrize("line", ["!quit", "!q", "exit", "quit"])
def test_ends(say, line):
    assert say(line, "a cat") == ""


def test_lora_files(say, checkpoints):
    written(Path("my lora.safetensors"), everything(layers_of(checkpoints.get(CASE)).shapes["transformer"]))
    say("!seed 1", "a cat")
    assert "lora: my lora.safetensors:0.5" in say("!lora 'my lora.safetensors:0.5'", "a cat")
    assert parameters("out-0002.png")["lora_scales"] == [0.5]
    assert "no number" in say("!lora 'my lora.safetensors':x")
    say("a cat", "!lora none", "a cat")
    assert parameters("out-0003.png")["lora_scales"] == [0.5]
    pixels = [np.asarray(Image.open(name)) for name in files() if name.endswith("png")]
    assert (pixels[0] != pixels[1]).any()
    assert (pixels[1] == pixels[2]).all()
    assert (pixels[0] == pixels[3]).all()


def test_the_text_encoder_is_kept_by_memory(checkpoints, tmp_path, monkeypatch):
    """The model fits, but nothing besides: the text encoder is freed before the transformer runs."""
    monkeypatch.chdir(tmp_path)
    model = checkpoints.exported(CASE)
    size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    say = Talk(model, size)
    released = []
    flux = say.session.studio.flux()
    monkeypatch.setattr(flux, "release_text_encoder", lambda: released.append(True))
    assert "$1:" in say("!steps 1", "!size 64", "a cat")
    assert released
    assert "does not fit" not in say("!again")


def test_a_model_that_does_not_fit_is_loaded_part_by_part(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    say = Talk(checkpoints.exported(CASE), 1000)
    said = say("!steps 1", "!size 64", "a cat", "a dog")
    assert said.count("does not fit into free memory") == 1
    assert "$2:" in said


def test_what_stays_in_memory():
    assert keeping(10, 30, 5) == Keeping(model=True, text_encoder=True)
    assert keeping(10, 12, 5) == Keeping(model=True, text_encoder=False)
    assert keeping(10, 9, 5) == Keeping(model=False, text_encoder=False)
