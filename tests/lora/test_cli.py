"""LoRA files from the command line and from Python: what a picture says of them, and making it again."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxonnx
from fluxonnx.cli import main
from fluxonnx.errors import CheckpointError, UsageError
from fluxonnx.runtime.lora_files import parse
from fluxonnx.runtime.metadata import read_parameters
from tests.lora.making import CASE, everything, layers_of, pair, written

pytestmark = pytest.mark.slow

SMALL = ("-W", "64", "-H", "64", "-s", "1", "--max-sequence-length", "16", "-S", "1")


@pytest.fixture(scope="module")
def root(checkpoints):
    return checkpoints.exported(CASE)


@pytest.fixture
def lora(root, tmp_path):
    """A LoRA of the transformer."""
    return written(tmp_path / "files/style.safetensors", everything(layers_of(root).shapes["transformer"]))


@pytest.fixture
def encoder_lora(root, tmp_path):
    shapes = layers_of(root).shapes["text_encoder"]
    return written(tmp_path / "files/words.safetensors", everything(shapes, "text_encoder."))


@pytest.fixture
def draw(root, tmp_path):
    """draw(name, *flags): a picture, and its file."""

    def draw(name, *flags):
        path = tmp_path / name
        words = ["generate", "-q", "-d", str(root), "-o", str(path), *map(str, flags)]
        assert main([*words, *([] if "--from" in words else ["-p", "a bird", *SMALL])]) == 0
        return np.asarray(Image.open(path)), path

    return draw


def test_a_picture_names_its_files_and_is_made_again(root, draw, lora, encoder_lora, fails, monkeypatch, tmp_path):
    plain, _ = draw("plain.png")
    both, path = draw("both.png", "--lora", f"{lora}:0.5", encoder_lora)
    one, _ = draw("one.png", "--lora", f"{lora}:0.5")
    assert not np.array_equal(plain, one)
    assert not np.array_equal(both, one)
    values = read_parameters(path)
    assert values["lora_files"] == ["style.safetensors", "words.safetensors"]
    assert values["lora_scales"] == [0.5, 1.0]
    assert values["lora_sha256"] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in (lora, encoder_lora)]

    again = tmp_path / "again.png"
    words = ("generate", "-d", root, "--from", path, "-o", again)
    fails(1, r"style.safetensors is missing, which is the LoRA that .*both.png was made with.*--lora", *words)
    monkeypatch.chdir(lora.parent)
    for picture in ("again.png", "beside.png"):
        assert np.array_equal(draw(picture, "--from", path)[0], both)
        monkeypatch.chdir(tmp_path)
        for file in (lora, encoder_lora):
            shutil.copy(file, tmp_path)
    assert np.array_equal(draw("other.png", "--from", path, "--lora", f"{lora}:0.5")[0], one)
    assert np.array_equal(draw("none.png", "--from", path, "--lora", "none")[0], plain)
    written(tmp_path / "style.safetensors", everything(layers_of(root).shapes["transformer"], rank=1))
    fails(1, "style.safetensors is another file than the LoRA", *words)


def test_without_lora_nothing_changes(draw, lora):
    plain, path = draw("plain.png")
    assert not any(key.startswith("lora") for key in read_parameters(path))
    off, path = draw("off.png", "--lora", f"{lora}:0")
    assert np.array_equal(plain, off)
    assert not any(key.startswith("lora") for key in read_parameters(path))


def test_refused(root, lora, fails, tmp_path):
    words = ("generate", "-q", "-d", root, "-p", "x", "-o", tmp_path / "x.png", "--lora")
    fails(1, "nothing.safetensors does not exist: name a LoRA's", *words, tmp_path / "nothing.safetensors")
    fails(2, "but must be a number from -100 to 100", *words, f"{lora}:1e9")
    fails(2, "but must be a number", *words, f"{lora}:nan")
    fails(2, "--lora has no file", *words, ":0.5")
    fails(2, "'much' is no number", *words, f"{lora}:much")
    fails(1, "does not exist", *words, "files/nothing.safetensors")  # nobody means a repository by that
    fails(1, "is no LoRA", *words, root / "transformer/diffusion_pytorch_model.safetensors")
    fails(1, "is not a whole safetensors file", *words, root / "model_index.json")
    fails(1, r"holds no \.safetensors file", *words, tmp_path)
    shutil.copy(lora, lora.parent / "other.safetensors")
    fails(1, r"holds 2 \.safetensors files", *words, lora.parent)
    fails(1, "does not exist", *words, "none", lora)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(lora.read_bytes()[:-10])
    fails(1, "is truncated", *words, damaged)
    assert not (tmp_path / "x.png").exists()


def test_scales_of_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:2").write_bytes(b"")
    found = {text: parse(text) for text in ("a.safetensors", "a.safetensors:0.5", "C:\\a.safetensors", "a:2", "a:2:-1")}
    assert {text: (item.file, item.scale) for text, item in found.items()} == {
        "a.safetensors": ("a.safetensors", 1),
        "a.safetensors:0.5": ("a.safetensors", 0.5),
        "C:\\a.safetensors": ("C:\\a.safetensors", 1),
        "a:2": ("a:2", 1),
        "a:2:-1": ("a:2", -1),
    }


def test_what_is_not_used_is_said(root, tmp_path, capsys):
    down, up = pair(layers_of(root).shapes["transformer"]["x_embedder"], 1)
    tensors = {"x_embedder.lora_A.weight": down, "x_embedder.lora_B.weight": up, "norm.weight": up[:, 0]}
    path = written(tmp_path / "a.safetensors", tensors)
    words = ["generate", "-d", str(root), "-p", "x", *SMALL, "-o", str(tmp_path / "x.png"), "--lora", str(path)]
    assert main(words) == 0
    assert "1 tensor of" in capsys.readouterr().err


def picture(flux, prompt="a bird"):
    return np.asarray(flux.generate(prompt, 64, 64, steps=1, seed=1, max_sequence_length=16))


def test_from_python(root, lora, encoder_lora, tmp_path):
    """Scales change between pictures; the text encoder's own embeddings come back, from memory and from a cache."""
    with fluxonnx.load(root, cache_dir=tmp_path / "cache") as flux:
        plain = picture(flux)
        assert flux.load_lora(lora) == "style"
        full = picture(flux)
        flux.load_lora(encoder_lora, name="words")
        both = picture(flux)
        flux.set_lora_scale("style", 0)
        words = picture(flux)
        flux.unload_lora("style")
        assert np.array_equal(picture(flux), words)
        flux.set_lora_scale("words", 0.5)
        assert not np.array_equal(picture(flux), words)
        flux.unload_lora()
        assert np.array_equal(picture(flux), plain)
        flux.load_lora(lora.parent / lora.name, np.float32(1), name="again")
        assert np.array_equal(picture(flux), full)
        assert len({image.tobytes() for image in (plain, full, both, words)}) == 4
        for call in (lambda: flux.set_lora_scale("x", 1), lambda: flux.unload_lora("x")):
            with pytest.raises(UsageError, match="there is no LoRA 'x': loaded are 'again'"):
                call()
        with pytest.raises(UsageError, match="there is a LoRA 'again' already"):
            flux.load_lora(lora, name="again")
        for scale in ("1", True, None, float("inf")):
            with pytest.raises(UsageError, match="must be a number"):
                flux.set_lora_scale("again", scale)
        assert np.array_equal(picture(flux), full)


def test_two_files_add_up(root, lora):
    with fluxonnx.load(root) as flux:
        flux.load_lora(lora, 1)
        expected = picture(flux).astype(np.int16)
        flux.unload_lora()
        flux.load_lora(lora, 0.75, name="a")
        flux.load_lora(lora, 0.25, name="b")
        assert np.abs(picture(flux) - expected).max() <= 1


def test_engines_of_programs_are_refused(root, lora):
    with fluxonnx.load(root, engine=lambda *words: None) as flux, pytest.raises(UsageError, match="without engine="):
        flux.load_lora(lora)


def test_builds_of_older_versions(checkpoints, lora):
    """Without a record of how channels were scaled, a rounded build says so; others need none."""
    root = checkpoints.exported(CASE, "int4")
    manifest = root / "fluxonnx.json"
    before = manifest.read_text()
    values = json.loads(before)
    for build in values["builds"].values():
        for component in build["components"].values():
            del component["scaling"]
    try:
        manifest.write_text(json.dumps(values))
        with fluxonnx.load(root) as flux:
            flux.load_lora(lora)
        with (
            fluxonnx.load(root, precision="int4") as flux,
            pytest.raises(CheckpointError, match=r"knew no LoRA: run fluxonnx export .* --precision int4 .*--force"),
        ):
            flux.load_lora(lora)
    finally:
        manifest.write_text(before)


class Hub(SimpleHTTPRequestHandler):
    """A repository as the hub serves it: a list of files, and files by their names."""

    def do_GET(self):
        if "/tree/" in self.path:
            paths = sorted(Path(self.directory).iterdir())
            files = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40} for path in paths
            ]
            body = json.dumps(files).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.serve(True)

    def do_HEAD(self):
        self.serve(False)

    def serve(self, whole):
        path = Path(self.directory, self.path.rpartition("/")[2])
        body = path.read_bytes() if path.is_file() else b""
        self.send_response(200 if path.is_file() else 404)
        for name, value in (("X-Repo-Commit", "0" * 40), ("ETag", '"1"'), ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        if whole:
            self.wfile.write(body)

    def log_message(self, *words):
        pass


def test_from_the_hub(root, lora, tmp_path):
    """With the hub's own client, in a process of its own, since that reads its settings when it is imported."""
    import os
    import subprocess
    import sys

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(lora.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    settings = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
    }
    settings |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    words = [sys.executable, "-m", "fluxonnx", "generate", "-q", "-d", str(root)]

    def run(*more):
        return subprocess.run([*words, *more], capture_output=True, text=True, env=settings, cwd=tmp_path)

    try:
        done = run("-p", "a bird", *SMALL, "-o", "a.png", "--lora", "some/style:0.5")
        assert done.returncode == 0, done.stderr
        assert read_parameters(tmp_path / "a.png")["lora_files"] == ["some/style/style.safetensors"]
    finally:
        server.shutdown()
        server.server_close()
    done = run("--from", "a.png", "-o", "c.png")  # from the hub's cache
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(Image.open(tmp_path / "c.png")))
