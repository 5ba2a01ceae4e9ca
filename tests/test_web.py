"""The page in examples/web draws fluxonnx's picture in a real browser."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fluxonnx
from fluxonnx.export import export
from fluxonnx.runtime.noise import randn
from tests.conformance.browser import MODULES, chromium, in_thread
from tests.conformance.installed import folder_of, has
from tests.support import IMAGE_TOLERANCE

WEB = Path(__file__).parent.parent / "examples/web"
LACKING = [module for module in (*MODULES, "npm:@huggingface/tokenizers") if not has(module)]
needs_browser = pytest.mark.skipif(bool(LACKING), reason=f"{', '.join(LACKING)} not installed")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node not installed")
# Accents, an emoji, Chinese and a special token: what tokenizers disagree about.
PROMPT = "a red circle on a blue background, été 日本 🙂 <|im_end|>"


@needs_node
@pytest.mark.parametrize(("seed", "size"), [(42, 1536), (0, 16), (7, 17), (2**64 - 1, 100_003)])
def test_noise_is_torchs(tmp_path, seed, size):
    """Bit for bit, whatever the remainder of the size."""
    script = f"""
        import {{ randn }} from {json.dumps((WEB / "noise.mjs").as_uri())};
        import fs from "node:fs";
        fs.writeFileSync({json.dumps(str(tmp_path / "noise"))}, randn({seed}n, {size}));"""
    subprocess.run(["node", "--input-type=module", "-e", script], check=True)
    assert (tmp_path / "noise").read_bytes() == randn(seed, (size,)).tobytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "graphs"
    for precision in ("fp32", "bf16"):
        export(WEB.parents[1] / "models/tiny-klein", folder, precision=precision, flavour="portable")
    return folder


def copy_of_page(folder: Path, libraries: bool = True) -> Path:
    """The page as a person has it, with or without what npm installs."""
    page = Path(shutil.copytree(WEB, folder / "page", ignore=shutil.ignore_patterns("node_modules", "model")))
    if libraries:
        library = folder_of("onnxruntime-web")
        assert library is not None
        (page / "node_modules").symlink_to(library.parent)
    return page


@pytest.fixture
def started() -> Iterator[Callable[..., tuple[subprocess.Popen, str]]]:
    """started(words): a server as a process, and the first line that it prints."""
    processes = []

    def start(*words: object) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-u", *map(str, words)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in processes:
        process.terminate()
        process.communicate()


def with_page(url: str, visit: Callable[[Any], Any]) -> Any:
    """What `visit` returns for a new page at a URL."""

    def opened() -> Any:
        page = chromium().new_page(viewport={"width": 960, "height": 640})
        try:
            page.goto(url)
            return visit(page)
        finally:
            page.close()

    return in_thread(opened)


def submitted(page: Any, **values: str) -> str:
    """Fill in the form, press the button, and return what the page says in the end."""
    page.wait_for_selector("#generate:enabled")
    for name, value in values.items():
        page.fill(f"[name={name}]", value)
    page.click("#generate")
    page.wait_for_selector("#status.done, #status.error", timeout=120_000)
    return page.inner_text("#status")


@needs_browser
@pytest.mark.slow
def test_draws_the_picture_of_fluxonnx(tmp_path, model, started):
    """Prompt and seed typed into the page; the picture as it is shown, and as it is downloaded."""
    _, url = started(copy_of_page(tmp_path) / "serve.py", "--port", 0, "--model", model)

    def visit(page: Any) -> tuple[bool, str, list[int], bytes]:
        said = submitted(page, prompt=PROMPT, seed="7", steps="2", width="96", height="64")
        shown = page.evaluate(
            "() => { const c = picture; return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data] }"
        )
        with page.expect_download() as download:
            page.click("#download")
        return page.evaluate("crossOriginIsolated"), said, shown, download.value.path().read_bytes()

    isolated, said, shown, downloaded = with_page(url, visit)
    assert isolated
    assert said.startswith("96x64 pixels in ")
    with fluxonnx.load(model, provider="cpu", precision="fp32") as flux:
        expected = np.asarray(flux.generate(PROMPT, 96, 64, 2, 7)).astype(int)
    found = np.array(shown, np.uint8).reshape(64, 96, 4)
    assert np.abs(found[..., :3] - expected).max() <= IMAGE_TOLERANCE
    assert (found[..., 3] == 255).all()
    assert (np.asarray(Image.open(io.BytesIO(downloaded)).convert("RGBA")) == found).all()


@needs_browser
@pytest.mark.slow
def test_knows_the_weight_files_of_a_build(tmp_path, model, started):
    """They are those of the build, or for bf16 the checkpoint's, as the graphs name them."""
    _, url = started(copy_of_page(tmp_path) / "serve.py", "--port", 0, "--model", model)
    files = {
        "fp32.portable": ("text_encoder/fp32", "transformer/fp32", "vae/decoder.fp32"),
        "bf16.portable": ("text_encoder/model", "transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model"),
    }
    sizes = {build: sum((model / f"{n}.safetensors").stat().st_size for n in names) for build, names in files.items()}

    def visit(page: Any) -> None:
        for build, size in sizes.items():
            page.wait_for_selector("#generate:enabled")
            page.select_option("[name=build]", build)
            page.wait_for_function("text => size.textContent === text", arg=f"{size / 1e6:.1f} MB of weights")

    with_page(url, visit)


@needs_browser
@pytest.mark.slow
def test_says_what_is_wrong_with_the_form(tmp_path, model, started):
    _, url = started(copy_of_page(tmp_path) / "serve.py", "--port", 0, "--model", model)
    good = {"prompt": "a", "seed": "1", "steps": "1", "width": "64", "height": "64"}
    wrong = {
        "prompt": ("", "The prompt is empty."),
        "seed": (str(2**64), "The seed must be a whole number from 0 to 2^64 - 1."),
        "steps": ("0", "Steps must be a whole number from 1 to 100."),
        "width": ("65", "Width must be a multiple of 16, from 16 to 1024."),
        "height": ("1040", "Height must be a multiple of 16, from 16 to 1024."),
    }

    def visit(page: Any) -> tuple[dict[str, str], str, str]:
        said = {name: submitted(page, **{**good, name: wrong[name][0]}) for name in wrong}
        page.select_option("[name=build]", "bf16.portable")
        page.select_option("[name=provider]", "webgpu")
        unfit = submitted(page, **good)
        page.select_option("[name=provider]", "wasm")
        page.click("#generate")
        page.click("#stop")
        page.wait_for_selector("#generate:enabled")
        return said, unfit, page.inner_text("#status")

    said, unfit, stopped = with_page(url, visit)
    assert said == {name: text for name, (_, text) in wrong.items()}
    assert unfit == "This WebGPU adapter can't compute bf16: choose another precision, or the CPU."
    assert stopped == "Stopped."


@needs_browser
@pytest.mark.slow
def test_says_what_is_missing(tmp_path, model, started):
    """On a plain server: no model, no portable build, no libraries, no isolation."""
    page = copy_of_page(tmp_path, libraries=False)
    shutil.copytree(model, page / "model")
    for name in ("none", "ort", "base", "broken"):
        (page / name).mkdir()
    manifest = json.loads((model / "fluxonnx.json").read_text("utf-8"))
    index = (model / "model_index.json").read_text("utf-8")
    (page / "ort/fluxonnx.json").write_text(json.dumps(manifest | {"builds": {}}), "utf-8")
    (page / "ort/model_index.json").write_text(index, "utf-8")
    (page / "base/fluxonnx.json").write_text(json.dumps(manifest), "utf-8")
    (page / "base/model_index.json").write_text('{"is_distilled": false}', "utf-8")
    (page / "broken/fluxonnx.json").write_text("{", "utf-8")
    code = (
        "import http.server as h, functools as f, sys;"
        "s = h.ThreadingHTTPServer(('127.0.0.1', 0), f.partial(h.SimpleHTTPRequestHandler, directory=sys.argv[1]));"
        "print(s.server_port); s.serve_forever()"
    )
    _, port = started("-c", code, page)

    def said(name: str) -> str:
        url = f"http://127.0.0.1:{port}/?model={name}"
        return with_page(url, lambda page: (page.wait_for_selector("#status.error"), page.inner_text("#status"))[1])

    command = "export a model into this folder: fluxonnx export --flavour portable --precision fp32 -o FOLDER"
    assert said("none") == f"fluxonnx.json can't be loaded (404 File not found): {command}"
    assert said("ort") == f"The folder has no portable build: {command}"
    assert said("base") == "This page has no guidance: choose a distilled model."
    assert said("broken") == f"fluxonnx.json is no JSON: {command}"
    notice, lacking = with_page(
        f"http://127.0.0.1:{port}/",
        lambda page: (page.wait_for_selector("#generate:enabled"), page.inner_text("#notice"), submitted(page))[1:],
    )
    assert notice == "One thread only: this server sends no isolation headers."
    assert lacking == "The libraries can't be loaded: run npm install in the folder of this page."


def test_the_server_says_what_is_missing(tmp_path, started):
    page = copy_of_page(tmp_path, libraries=False)

    def fault(*words: object) -> str:
        process, line = started(page / "serve.py", "--port", 0, *words)
        assert line == ""
        assert process.wait() == 1
        return process.stderr.read()

    folder = tmp_path / "nothing"
    command = f"fluxonnx export --flavour portable --precision fp32 -o {folder}"
    assert fault("--model", folder) == f"serve.py: {folder} holds no graphs: {command}\n"
    (page / "model").mkdir()
    (page / "model/fluxonnx.json").write_text("{}", "utf-8")
    assert fault() == f"serve.py: the libraries are missing: npm install --prefix {page}\n"
