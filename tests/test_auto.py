"""`--precision auto`: the choice follows from sizes, memory and processor, and its reason is printed."""

from __future__ import annotations

from dataclasses import replace

import pytest

import fluxonnx
from fluxonnx import api
from fluxonnx.auto import Surroundings, choose, choose_for, fastest_provider
from fluxonnx.checkpoint.manifest import read_manifest
from fluxonnx.cli import main
from fluxonnx.contract import open_checkpoint
from tests.support import Case

CASE = Case("odd-heads")
FOUR_BILLION = 7_750_000_000
LARGE_CPU = Surroundings(exact_int8_dot=True, providers=("cpu",), works=lambda provider: False)


@pytest.mark.parametrize(
    ("exact", "reason"), [(True, "this CPU has exact 8-bit dot products"), (False, "this CPU lacks VNNI")]
)
def test_large_model(exact, reason):
    here = replace(LARGE_CPU, exact_int8_dot=exact)
    choice = choose_for(FOUR_BILLION, native=None, provider=None, here=here)
    assert (choice.precision, choice.provider) == ("int8", "cpu")
    assert reason in choice.reason


@pytest.mark.parametrize(("works", "provider", "precision"), [(True, "cuda", "bf16-native"), (False, "cpu", "int8")])
def test_gpu_is_chosen_where_it_works(works, provider, precision):
    providers = ("tensorrt", "cuda", "coreml", "cpu")
    here = replace(LARGE_CPU, providers=providers, works=lambda name: works)
    choice = choose_for(FOUR_BILLION, native=None, provider=None, here=here)
    assert (choice.provider, choice.precision) == (provider, precision)


def test_given_provider_gets_what_suits_it():
    assert choose_for(FOUR_BILLION, native=None, provider="coreml", here=LARGE_CPU).precision == "fp16"


def test_small_model_stays_as_it_is(checkpoints):
    assert choose(open_checkpoint(checkpoints.get(CASE))).precision == "bf16"
    assert choose_for(10**8, native=None, provider=None, here=LARGE_CPU).precision == "bf16"


def test_commands_print_the_choice(copy_of, tmp_path, capsys):
    root = copy_of(CASE)
    output = tmp_path / "x.png"
    arguments = ["-p", "x", "-o", str(output), "-W", "64", "-H", "64", "-s", "1"]
    assert main(["generate", "-d", str(root), "--precision", "auto", *arguments]) == 0
    assert "Precision bf16, provider cpu: " in capsys.readouterr().err
    assert set(read_manifest(root).builds) == {"bf16"}
    assert main(["export", "-d", str(root), "--precision", "auto"]) == 0
    assert "Precision bf16, provider cpu: " in capsys.readouterr().err


def test_only_build_of_a_directory_is_taken(copy_of):
    root = copy_of(CASE)
    api.load(root, precision="int8").close()
    for file in root.glob("*/*.safetensors"):
        if "int8" not in file.name:
            file.unlink()
    with api.load(root, precision="auto") as flux:
        assert flux.generate("x", 64, 64, steps=1, seed=1).info["precision"] == "int8"


@pytest.mark.parametrize("native", ["int8", "int4"])
def test_integers_stay_what_they_are(native):
    choice = choose_for(FOUR_BILLION, native=native, provider=None, here=LARGE_CPU)
    assert choice.precision == native
    assert f"{native[3:]}-bit integers already" in choice.reason


@pytest.mark.parametrize(
    ("providers", "works", "expected", "reason"),
    [
        (("cuda", "cpu"), True, "cuda", "GPUs compute faster"),
        (("cuda", "cpu"), False, "cpu", "cuda does not work here"),
        (("coreml", "cpu"), True, "cpu", "there is no cuda here"),
    ],
)
def test_provider_auto(providers, works, expected, reason):
    chosen, why = fastest_provider(replace(LARGE_CPU, providers=providers, works=lambda name: works))
    assert chosen == expected
    assert reason in why


def test_provider_auto_draws_and_says_why(checkpoints, tmp_path, capsys):
    root, size = checkpoints.exported(CASE), ["-W", "64", "-H", "64", "-s", "1", "-S", "1"]
    output = str(tmp_path / "x.png")
    assert main(["generate", "-d", str(root), "-p", "x", "--provider", "auto", "-o", output, *size]) == 0
    assert "provider cpu: there is no cuda here" in capsys.readouterr().err
    assert main(["info", output]) == 0
    assert '"provider": "cpu"' in capsys.readouterr().out


def test_both_auto_are_one_line(checkpoints, tmp_path):
    said = []
    fluxonnx.load(checkpoints.exported(CASE), provider="auto", precision="auto", on_choice=said.append).close()
    (choice,) = said
    assert "there is no cuda here" in choice.reason
    assert "of weights cost nothing as they are" in choice.reason
