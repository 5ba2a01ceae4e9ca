"""`benchmarks/parity_flux2c.py` with a stand-in for the binary, which hands out pictures that are known to be off."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

import fluxonnx
from benchmarks import parity_flux2c
from fluxonnx.errors import FluxonnxError
from fluxonnx.runtime.request import Request
from tests.support import Case

CASE = Case("odd-heads")
SHELL = sys.executable  # any program

# Called with the flags of flux2.c: the picture that it hands out depends on whether it was given a reference.
FLUX2C = """#!/bin/sh
name=text
while [ $# -gt 0 ]; do
    case "$1" in
        -d|-p|-W|-H|-s) ;;
        -S) [ "$2" = 5 ] || exit 4 ;;
        -i) [ -f "$2" ] || exit 5; name=reference ;;
        -o) output="$2" ;;
        *) exit 6 ;;
    esac
    shift 2
done
cp "$(dirname "$0")/$name.png" "$output"
"""


def test_difference():
    one = Image.fromarray(np.full((2, 4, 3), 100, np.uint8))
    other = np.full((2, 4, 3), 100, np.uint8)
    other[0, 0] = 0, 98, 103
    apart = parity_flux2c.difference(Image.fromarray(other), one)
    assert (apart.largest, apart.mean, apart.above_2) == (100, 105 / 24, 2 / 24)
    with pytest.raises(FluxonnxError, match="sizes 4x2 and 2x2"):
        parity_flux2c.difference(Image.new("RGB", (2, 2)), one)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")
def test_both_programs_draw_the_same(checkpoints, tmp_path, capsys):
    model, binary, reference = checkpoints.exported(CASE), tmp_path / "flux", tmp_path / "photo.png"
    binary.write_text(FLUX2C)
    binary.chmod(0o755)
    Image.new("RGB", (96, 64), "red").save(reference)
    request = {"prompt": "a", "width": 96, "height": 64, "steps": 2, "noise": "flux2c"}
    with fluxonnx.load(model) as flux:
        for name, references in {"text": (), "reference": (str(reference),)}.items():
            (image,) = flux.run(Request(**request, references=references), seeds=[5])
            pixels = np.asarray(image).astype(np.int16)
            off = 3 if name == "text" else 0
            Image.fromarray((pixels + np.where(pixels < 128, off, -off)).astype(np.uint8)).save(
                tmp_path / f"{name}.png"
            )
    arguments = ["-d", str(model), "--flux2c", str(binary), "-p", "a", "-S", "5", "--pictures", "96x64:2"]
    arguments += ["--reference", str(reference), "--with-reference", "96x64:2"]
    keep, found = tmp_path / "kept", tmp_path / "found.json"
    assert parity_flux2c.main([*arguments, "--keep", str(keep), "--json", str(found)]) == 0
    plain, with_reference = json.loads(found.read_text())["rows"]
    assert (plain["largest"], plain["mean"], plain["above_2"], plain["precision"]) == (3, 3, 1, "bf16")
    assert (with_reference["largest"], with_reference["reference"]) == (0, str(reference))
    assert "| 96x64 | 2 | yes | bf16 | 0 | 0.00 | 0.0% |" in " ".join(capsys.readouterr().out.split())
    assert len(list(keep.iterdir())) == 4
    binary.write_text("#!/bin/sh\necho 'Error: no weights' >&2\nexit 1\n")
    assert parity_flux2c.main(arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "parity_flux2c: Error: no weights"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--flux2c", "no/such/flux"], "no/such/flux is not a program"),
        (["--pictures", "64x64"], "64x64 is not a size and a number of steps"),
        (["--pictures", "64:1.5"], "64:1.5 is not a size and a number of steps"),
        (["-S", "-1"], "seed -1 is out of range"),
    ],
)
def test_wrong_usage(capsys, flags, message):
    assert parity_flux2c.main(["-d", "no/such/model", "--flux2c", "sh", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--with-reference", "64:1"], "give a picture with --reference"), (["--pictures"], "there is nothing to draw")],
)
def test_missing_arguments(capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        parity_flux2c.main(["-d", "no/such/model", "--flux2c", "sh", *flags])
    assert message in capsys.readouterr().err


def test_missing_model(capsys):
    assert parity_flux2c.main(["-d", "no/such/model", "--flux2c", "sh"]) == 1
    assert "no/such/model" in capsys.readouterr().err
