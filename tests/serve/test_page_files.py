"""The files of the page: all in the package, none from elsewhere, no word without a translation."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

from fluxonnx.runtime.fields import FIELDS

FOLDER = resources.files("fluxonnx.serve") / "page"
FILES = {path.name: path.read_text("utf-8") for path in FOLDER.iterdir()}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}
INDEX = FILES["index.html"]
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node not installed")
# Keys of words that are put together: the name of a phase, of a parameter, of a state of the connection.
MADE = re.compile(r"phase_|parameter_|connecting|connected|reconnecting")


def words() -> dict[str, dict]:
    """The words of each language, as Node.js reads them."""
    names = {name[6:8]: name for name in SCRIPTS if re.fullmatch(r"words-..\.js", name)}
    folder = Path(str(FOLDER))
    imports = "".join(f"import {lang} from {json.dumps((folder / name).as_uri())};" for lang, name in names.items())
    script = f"{imports} console.log(JSON.stringify({{ {', '.join(names)} }}));"
    done = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_every_file_that_is_named_is_there():
    named = set(re.findall(r'(?:src|href)="static/([^"]+)"', INDEX))
    named |= {name for text in SCRIPTS.values() for name in re.findall(r'from "\./([^"]+)"', text)}
    assert named <= FILES.keys()
    assert {"index.html", *named} == FILES.keys()


def test_nothing_comes_from_elsewhere():
    """No address of another machine, no script or style inside of the page, which its policy would refuse."""
    for name, text in FILES.items():
        assert set(re.findall(r"https?://[^\s\"'`)]+", text)) <= {"http://www.w3.org/2000/svg"}, name
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=|javascript:", INDEX)
    for name, text in SCRIPTS.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )


def test_files_are_small():
    assert {name for name, text in FILES.items() if text.count("\n") > 420} == set()


@needs_node
def test_every_word_is_in_every_language():
    found = words()
    assert found.keys() == {"en", "de", "zh"}
    english = found["en"]
    for language, texts in found.items():
        assert texts.keys() == english.keys(), language
        for key, text in texts.items():
            forms = text.values() if isinstance(text, dict) else [text]
            wanted = places(english[key])
            assert all(form.strip() for form in forms), (language, key)
            assert places(text) == wanted, (language, key)
            assert all(set(re.findall(r"\{(\w+)\}", form)) <= wanted for form in forms), (language, key)


def places(text: str | dict) -> set[str]:
    """The names of the values that a word takes."""
    return set(re.findall(r"\{(\w+)\}", text["other"] if isinstance(text, dict) else text))


@needs_node
def test_every_word_that_is_said_is_known():
    """And every known one is said somewhere."""
    english = words()["en"]
    said = set(re.findall(r'data-word(?:-\w+)?="(\w+)"', INDEX))
    quoted = {
        word for name, text in SCRIPTS.items() if not name.startswith("words-") for word in re.findall(r'"(\w+)"', text)
    }
    assert said <= english.keys()
    assert {key for key in english if not MADE.match(key)} <= said | quoted
    calls = r'(?:say|speak|notify|confirmed)\((?:[^"(),]+(?:\([^)]*\))?, )?"(\w+)"|\b(?:word|label): \[?"(\w+)"'
    named = {a or b for text in SCRIPTS.values() for a, b in re.findall(calls, text)}
    assert named - {"label"} <= english.keys()


@needs_node
def test_every_parameter_has_a_name():
    """Those of pictures, but for the prompt, names of files and their digests, which are not listed."""
    hidden = re.compile(r"prompt|image_file|mask_file|.*_files|.*_sha256|lora_scales")
    names = {field.name for field in FIELDS if "picture" in field.places and not hidden.fullmatch(field.name)}
    assert {f"parameter_{name}" for name in names} <= words()["en"].keys()


@needs_node
@pytest.mark.parametrize("number", [0, 2**53, 2**53 + 1, 2**64 - 1, 1.5, 1e300])
def test_numbers_are_exact(number):
    """Whole numbers that JavaScript would round come back as their digits; seeds are sent as numbers."""
    text = json.dumps({"seed": number, "prompt": f'say "seed":"{number}" or \\"{number}', "list": [number]})
    module = json.dumps((Path(str(FOLDER)) / "exact.js").as_uri())
    script = f"import * as exact from {module}; console.log(exact.write(exact.parse({json.dumps(text)})))"
    done = subprocess.run(["node", "--input-type=module", "-e", script], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    given = json.loads(text)
    assert found["seed"] == given["seed"]
    assert found["prompt"] == given["prompt"]
    assert found["list"][0] in (number, str(number))
