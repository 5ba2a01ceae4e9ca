"""Models by the names of their repositories: the real client against a server in the shape of the hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fluxonnx.checkpoint.hub import download, is_repository, needed_files
from fluxonnx.errors import CheckpointError
from tests.hub import COMMIT, Hub, serving
from tests.support import Case, optional

pytestmark = [pytest.mark.slow, optional("huggingface_hub")]

CASE = Case("tiny-random")
S = ".safetensors"
ID = "black-forest-labs/FLUX.2-klein-4B"


@pytest.fixture
def hub(checkpoints, tmp_path):
    """A repository as the real one is: with a second copy of the transformer, pictures, and an index of a variant."""
    folder = Path(shutil.copytree(checkpoints.get(CASE), tmp_path / "served"))
    save_file({"x": np.zeros(1000, np.float32)}, folder / "flux-2-klein-4b.safetensors")
    (folder / "README.md").write_text("# a model")
    (folder / "teaser.png").write_bytes(bytes(100))
    (folder / "transformer/diffusion_pytorch_model.fp16.safetensors").write_bytes(bytes(100))
    with serving(Hub(ID, folder)) as served:
        yield served


@pytest.fixture
def fluxonnx(hub, tmp_path):
    """Run a command; returns its exit code, output and errors."""

    def run(*arguments: object, **environment: str) -> tuple[int, str, list[str]]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        known = {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        found = subprocess.run(
            [sys.executable, "-m", "fluxonnx", *map(str, arguments)],
            env={**clean, **known, **environment},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        return found.returncode, found.stdout.strip(), found.stderr.strip().splitlines()

    return run


def needed(hub: Hub) -> set[str]:
    names = {path.relative_to(hub.folder).as_posix() for path in hub.files()}
    return {name for name in names if "/" in name and "fp16" not in name} | {"model_index.json"}


def test_only_what_is_needed_and_once(hub, fluxonnx, tmp_path):
    """Then nothing is downloaded again, and nothing is said again."""
    code, output, errors = fluxonnx("download", ID, "-o", "klein")
    assert (code, output) == (0, "klein")
    assert len(errors) == 1
    assert "of black-forest-labs/FLUX.2-klein-4B, licence apache-2.0 (http://127.0.0.1" in errors[0]
    assert {name for name, _ in hub.served} == needed(hub)
    for name in needed(hub):
        assert (tmp_path / "klein" / name).read_bytes() == (hub.folder / name).read_bytes()
    hub.served.clear()
    assert fluxonnx("download", ID, "-o", "klein") == (0, "klein", [])
    assert hub.served == []


def test_a_repository_for_a_directory(hub, fluxonnx, tmp_path):
    """It lies in the hub's cache, whose files are links; and then no network is needed."""
    draw = ["generate", "-d", ID, "-p", "x", "-W", "64", "-H", "64", "-s", "1", "-S", "1", "-o"]
    code, _, errors = fluxonnx(*draw, "a.png")
    assert code == 0, errors
    assert sum(line.startswith("Downloading ") for line in errors) == 1
    snapshot = tmp_path / "hf/hub/models--black-forest-labs--FLUX.2-klein-4B/snapshots" / COMMIT
    assert (snapshot / "transformer.onnx").is_file()
    hub.status = 500
    code, _, errors = fluxonnx(*draw, "b.png", "-q", HF_HUB_OFFLINE="1")
    assert (code, errors) == (0, [])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_download_that_was_cut_goes_on(hub, fluxonnx):
    """The client asks for the rest of a file, not for all of it."""
    with (hub.folder / "transformer/diffusion_pytorch_model.safetensors").open("r+b") as file:
        file.truncate(24 << 20)  # the client writes 10 MB at a time
    hub.cut = 12 << 20
    for _ in range(3):
        code, _, errors = fluxonnx("download", ID, "-o", "klein")
        if code == 0:
            break
        assert "or run the same command again" in errors[-1]
    assert code == 0, errors
    assert any(start > 0 for _, start in hub.served)


def test_gated_models(hub, fluxonnx):
    hub.token, hub.card = "hf_secret", {"license_name": "flux-non-commercial", "license_link": "LICENSE.md"}
    code, _, errors = fluxonnx("download", ID, "-o", "klein")
    assert code == 1
    assert errors[-1].startswith("fluxonnx: black-forest-labs/FLUX.2-klein-4B is gated: accept its licence at http")
    code, _, errors = fluxonnx("download", ID, "-o", "klein", HF_TOKEN="hf_secret")
    assert code == 0, errors
    assert "hf_secret" not in "".join(errors)
    assert "licence flux-non-commercial (LICENSE.md)" in errors[0]


def test_wrong_lora_files(hub, fluxonnx):
    for name, message in (
        ("nobody/nothing", "neither a folder here nor a repository"),
        (f"{ID}/none.safetensors", "has no such file: look for one at"),
        (ID, ".safetensors files"),
    ):
        code, output, errors = fluxonnx("generate", "-d", hub.folder, "-p", "x", "--lora", name)
        assert (code, output) == (1, "")
        assert message in errors[-1]
        assert len(errors) == 1
    code, _, errors = fluxonnx("generate", "-d", hub.folder, "-p", "x", "--lora", "a/b", HF_HUB_OFFLINE="1")
    assert code == 1
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["download", "nobody/nothing"], "neither a folder here nor a repository"),
        (["download", ID, "--revision", "v9"], "has no revision v9"),
        (["generate", "-d", "nobody/nothing", "-p", "x"], "neither a folder here nor a repository"),
    ],
)
def test_wrong_names(fluxonnx, arguments, message):
    code, output, errors = fluxonnx(*arguments)
    assert (code, output) == (1, "")
    assert message in errors[-1]
    assert len(errors) == 1


@pytest.mark.parametrize("name", ["klein", "../klein", "a/b/c", "", "-/b"])
def test_names_that_no_repository_has(name):
    with pytest.raises(CheckpointError, match="is no name of a repository: pass OWNER/NAME"):
        download(name)


def test_revisions(hub, fluxonnx):
    assert fluxonnx("download", ID, "--revision", "v1", "-o", "klein", "-q") == (0, "klein", [])


def test_repositories_that_are_no_models(hub, fluxonnx):
    (hub.folder / "model_index.json").unlink()
    code, _, errors = fluxonnx("download", ID)
    assert code == 1
    assert "has no model_index.json, so it is not a whole model: download the file that you want" in errors[-1]


def test_servers_that_fail(hub, fluxonnx):
    hub.status = 403
    code, _, errors = fluxonnx("download", ID)
    assert code == 1
    assert "which answered 403: try again later" in errors[-1]
    code, _, errors = fluxonnx("download", ID, HF_HUB_OFFLINE="1")
    assert code == 1
    assert "is not whole in the hub's cache, and HF_HUB_OFFLINE is set" in errors[-1]


def test_a_disk_that_is_too_small(hub, fluxonnx):
    """Found before anything is downloaded: the server says how large a file is."""
    hub.claimed["diffusion_pytorch_model.safetensors"] = 1 << 50
    code, _, errors = fluxonnx("download", ID, "-o", "klein")
    assert code == 1
    assert "GB are free in klein: free some" in errors[-1]
    assert hub.served == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["vae/model.safetensors", "vae/model.fp16.safetensors"], ["vae/model.safetensors"]),
        (["vae/model.fp16.safetensors", "vae/model.bin"], ["vae/model.fp16.safetensors"]),
        (
            ["vae/model-00001-of-00002.safetensors", "vae/model.safetensors.index.json"],
            ["vae/model-00001-of-00002.safetensors", "vae/model.safetensors.index.json"],
        ),
        (
            [
                "vae/model.safetensors",
                "vae/model.fp16-00001-of-00002.safetensors",
                "vae/model.fp16.safetensors.index.json",
            ],
            ["vae/model.safetensors"],
        ),
        (
            ["a.safetensors", "README.md", "model_index.json", "vae/config.json", "vae/x/config.json"],
            ["model_index.json", "vae/config.json"],
        ),
        (["tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/chat_template.jinja"], None),
    ],
)
def test_needed_files(names, expected):
    assert needed_files(names) == (names if expected is None else expected)


def test_folders_go_before_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert is_repository(ID)
    for name in ("models/klein", "klein", "./models/klein", "/models/klein", "a/b/c", "../b"):
        assert not is_repository(name), name
