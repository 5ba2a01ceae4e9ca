"""The programs that `rivals.py` compares: how each is started, and where the seconds of its steps come from.

    python benchmarks/contenders.py PROGRAM JOB

makes a picture with one of the Python programs, in a process of its own. JOB is the arguments as JSON. The script
prints the seconds of each step except the first as JSON.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from fluxonnx.checkpoint.manifest import Build, read_manifest
from fluxonnx.contract import OUT_LAYERS
from fluxonnx.measure.picture import SEED, measure_picture
from fluxonnx.measure.process import Finished
from fluxonnx.measure.tables import known_median
from fluxonnx.runtime.engine import SessionOptions

FIGURES = ("step", "total", "resident", "anonymous")


@dataclass
class Contender:
    """A program that makes the picture.

    Attributes:
        name: Its name in the tables.
        command: How to start it.
        steps: Reads the seconds of each step except the first from what it printed.
        runs: A value for each of `FIGURES` per round.
        error: Why runs are missing; None if none are.
        remark: What it printed about itself, shown after its name.
    """

    name: str
    command: list[str]
    steps: Callable[[Finished], list[float]]
    runs: list[dict[str, float | None]] = field(default_factory=list)
    error: str | None = None
    remark: str = ""

    def median(self, figure: str) -> float | None:
        """Return the median of one of `FIGURES`."""
        return known_median(run[figure] for run in self.runs)


# The Python programs. Each function runs in a process of its own and returns the seconds of each step but the first.


def run_fluxonnx(model: str, precision: str, **work: Any) -> list[float]:
    return measure_picture(model, precision=precision, guidance=1.0, **work)["steps"]


def run_openvino(model: str, precision: str, **work: Any) -> list[float]:
    engine = OpenVinoRunner
    return measure_picture(model, precision=precision, flavour="portable", engine=engine, guidance=1.0, **work)["steps"]


class OpenVinoRunner:
    """One graph in OpenVINO: a `fluxonnx.runtime.engine.Runner`, and the class is an `Engine`."""

    def __init__(self, path: Path, component: str, build: Build, options: SessionOptions) -> None:
        import openvino

        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        core = openvino.Core()
        if options.threads is not None:
            config["INFERENCE_NUM_THREADS"] = options.threads
        if component == "conditioning":  # sinusoids of large phases, which lose all accuracy in half precision
            config["INFERENCE_PRECISION_HINT"] = "f32"
        self._model = core.compile_model(self._read(core, path), "CPU", config)
        if component == "transformer":
            print(f"computes in {self._model.get_property('INFERENCE_PRECISION_HINT').to_string()}")

    def _read(self, core: Any, path: Path) -> Any:
        return core.read_model(path)

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run the graph."""
        result = self._model(inputs)
        return [result[output].copy() for output in self._model.outputs]

    def close(self) -> None:
        """Release the memory."""
        del self._model


class CompressedOpenVinoRunner(OpenVinoRunner):
    """The same with the weights of products as 8-bit integers, as optimum-intel makes OpenVINO's models.

    Where the processor can, OpenVINO then rounds the other factor of a product to 8 bits, too.
    """

    def _read(self, core: Any, path: Path) -> Any:
        import nncf
        import openvino

        compressed = path.with_suffix(".nncf-int8.xml")
        if not compressed.exists():
            model = nncf.compress_weights(super()._read(core, path), mode=nncf.CompressWeightsMode.INT8_ASYM)
            openvino.save_model(model, compressed, compress_to_fp16=False)
        return core.read_model(compressed)


def run_compressed_openvino(model: str, **work: Any) -> list[float]:
    engine = CompressedOpenVinoRunner
    return measure_picture(model, precision="fp32", flavour="portable", engine=engine, guidance=1.0, **work)["steps"]


def run_diffusers(
    model: str, precision: str, threads: int | None, width: int, height: int, steps: int, prompt: str
) -> list[float]:
    import torch
    from diffusers import Flux2KleinPipeline

    if threads is not None:
        torch.set_num_threads(threads)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    quantise = QUANTISED.get(precision, lambda module: module)
    manifest = read_manifest(Path(model))
    layers = tuple(manifest.text_encoder_out_layers or ()) if manifest else ()
    ends: list[float] = []

    def note(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        ends.append(time.perf_counter())
        return values

    pipe = Flux2KleinPipeline.from_pretrained(model, transformer=None, vae=None, torch_dtype=dtype)
    pipe.text_encoder = quantise(pipe.text_encoder)
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(prompt, text_encoder_out_layers=layers or OUT_LAYERS)
    del pipe
    gc.collect()
    pipe = Flux2KleinPipeline.from_pretrained(model, text_encoder=None, tokenizer=None, torch_dtype=dtype)
    pipe.transformer = quantise(pipe.transformer)
    pipe(
        prompt_embeds=embeds,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(SEED),
        callback_on_step_end=note,
    )
    return [after - before for before, after in pairwise(ends)]


def with_sdnq(module: Any) -> Any:
    from sdnq import sdnq_post_load_quant

    return sdnq_post_load_quant(module, weights_dtype="int8", use_quantized_matmul=True)


def with_torchao(module: Any) -> Any:
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(module)


# The 8-bit forms of a bfloat16 module that people use with diffusers.
QUANTISED: dict[str, Callable[[Any], Any]] = {"sdnq": with_sdnq, "torchao": with_torchao}


PROGRAMS: dict[str, Callable[..., list[float]]] = {
    "fluxonnx": run_fluxonnx,
    "openvino": run_openvino,
    "openvino-nncf": run_compressed_openvino,
    "diffusers": run_diffusers,
}


def python_contender(program: str, name: str, work: dict[str, Any]) -> Contender:
    command = [sys.executable, str(Path(__file__).resolve()), program, json.dumps(work)]
    return Contender(name, command, lambda done: json.loads(done.output.splitlines()[-1]))


# The binaries, which print the seconds of their steps.


def flux2c_contender(binary: str, work: dict[str, Any], folder: str) -> Contender:
    command = [binary, "-d", work["model"], "-p", work["prompt"], "-W", str(work["width"]), "-H", str(work["height"])]
    command += ["-s", str(work["steps"]), "-g", "1", "-S", str(SEED), "-v", "-o", f"{folder}/flux2c.png"]
    return Contender("flux2.c", command, flux2c_steps)


def flux2c_steps(done: Finished) -> list[float]:
    return [float(found) / 1e3 for found in re.findall(r"^ *Step \d+: ([\d.]+) ms", done.messages, re.MULTILINE)][1:]


def sdcpp_contender(name: str, binary: str, files: dict[str, str], work: dict[str, Any], folder: str) -> Contender:
    command = [binary, "--diffusion-model", files["model"], "--llm", files["llm"], "--vae", files["vae"]]
    command += ["-p", work["prompt"], "-W", str(work["width"]), "-H", str(work["height"])]
    command += ["--steps", str(work["steps"]), "--cfg-scale", "1.0", "--sampling-method", "euler", "-s", str(SEED)]
    command += ["--diffusion-fa", "-o", f"{folder}/sdcpp.png"]
    if work["threads"] is not None:
        command += ["-t", str(work["threads"])]
    return Contender(name, command, sdcpp_steps)


def sdcpp_steps(done: Finished) -> list[float]:
    # "| 2/4 - 28.87s/it" is rewritten in place; the first step includes the loading of weights
    found = re.findall(r"\d+/\d+ - ([\d.]+)(s/it|it/s)", done.output)
    return [float(value) if unit == "s/it" else 1 / float(value) for value, unit in found][1:]


if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](**json.loads(sys.argv[2]))))
