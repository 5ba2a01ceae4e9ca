"""The same picture by fluxonnx and by other programs, in turns: seconds, memory, and ratios.

    python benchmarks/rivals.py -d DIR [--size 256] [--steps 4] [--repeat 3] [--precision bf16 fp32] [--threads 2]
        [--flux2c PATH] [--sdcpp PATH --sdcpp-model FILE --sdcpp-llm FILE --sdcpp-vae FILE] [--cold]

Each program gets a process of its own, in rounds A B A B, so that what else the machine does hits them alike; medians
are printed. All draw the same prompt at the same size and number of steps, without guidance, on the CPU:

- fluxonnx, at each `--precision`;
- diffusers in bfloat16 and in float32, as it comes, except that the text encoder is dropped before the transformer is
  loaded, which is what the others do, too: together they would not fit into the memory of many machines;
- OpenVINO: fluxonnx's portable graphs in OpenVINO, in whichever precision it chooses for the processor, steered by
  fluxonnx's own sampler;
- antirez/flux2.c and leejet/stable-diffusion.cpp, where a binary is given. The latter reads other files than DIR.

A step is the median of all but the first, in which some programs load their weights. The total is the life of the
process: start, imports, loading, picture. Resident memory counts the mapped pages of weight files, anonymous does not;
both are known on Linux only. Programs that are not there are skipped. With `--cold` the system is told before each run
to forget what it keeps of the weight files in memory, so that all programs read them from disk.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from fluxonnx import api
from fluxonnx.bench import check_output, machine, middle, number, parse_size, table
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.files import replacing
from fluxonnx.manifest import read_manifest
from fluxonnx.measure import PROMPT, SEED, Finished, measure_picture, run_program
from fluxonnx.runtime.request import Request

RIVALS = ("diffusers-bf16", "diffusers-fp32", "openvino", "flux2c", "sdcpp")
PACKAGES = {"diffusers": ("torch", "diffusers", "transformers"), "openvino": ("openvino",)}
FIGURES = ("step", "total", "resident", "anonymous")


@dataclass
class Contender:
    """A program that makes the picture.

    Attributes:
        name: For the table.
        command: What to run.
        steps: Finds the seconds of each step but the first in what it printed.
        runs: What was found: a value for each of `FIGURES` per round.
        error: Why there are no more of them, or None.
        remark: What it said about itself, to stand behind its name.
    """

    name: str
    command: list[str]
    steps: Callable[[Finished], list[float]]
    runs: list[dict[str, float | None]] = field(default_factory=list)
    error: str | None = None
    remark: str = ""

    def median(self, figure: str) -> float | None:
        """Return the median of one of `FIGURES`."""
        return middle(run[figure] for run in self.runs)


# The Python programs, each called in a process of its own; they return the seconds of each step but the first.


def run_fluxonnx(model: str, precision: str, **work: Any) -> list[float]:
    return measure_picture(model, precision=precision, guidance=1.0, **work)["steps"]


def run_openvino(
    model: str, precision: str, threads: int | None, width: int, height: int, steps: int, prompt: str
) -> list[float]:
    ends: list[float] = []
    with api.load(model, precision=precision, flavour="portable") as flux:
        files = {name: component.graph for name, component in flux._build.components.items()}
        flux._models._open = lambda component: OpenVinoSession(Path(model) / files[component], component, threads)
        flux.generate(
            prompt,
            width,
            height,
            steps,
            SEED,
            guidance_scale=1.0,
            callback=lambda *_: ends.append(time.perf_counter()),
        )
    return [after - before for before, after in pairwise(ends)]


class OpenVinoSession:
    """Stands in for `fluxonnx.runtime.session.Session`."""

    def __init__(self, path: Path, component: str, threads: int | None) -> None:
        import openvino

        config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        if component == "conditioning":  # sinusoids of large phases, which half precision would ruin
            config["INFERENCE_PRECISION_HINT"] = "f32"
        self._model = openvino.Core().compile_model(path, "CPU", config)
        if component == "transformer":
            print(f"computes in {self._model.get_property('INFERENCE_PRECISION_HINT').to_string()}")

    def run(self, **inputs: np.ndarray) -> list[np.ndarray]:
        """Run the graph."""
        result = self._model(inputs)
        return [result[output].copy() for output in self._model.outputs]

    def close(self) -> None:
        """Give its memory back."""
        del self._model

    def __enter__(self) -> OpenVinoSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_diffusers(
    model: str, precision: str, threads: int | None, width: int, height: int, steps: int, prompt: str
) -> list[float]:
    import torch
    from diffusers import Flux2KleinPipeline

    if threads is not None:
        torch.set_num_threads(threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    manifest = read_manifest(Path(model))
    layers = tuple(manifest.text_encoder_out_layers or ()) if manifest else ()
    ends: list[float] = []

    def note(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        ends.append(time.perf_counter())
        return values

    pipe = Flux2KleinPipeline.from_pretrained(model, transformer=None, vae=None, torch_dtype=dtype)
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(prompt, text_encoder_out_layers=layers or (9, 18, 27))
    del pipe
    gc.collect()
    pipe = Flux2KleinPipeline.from_pretrained(model, text_encoder=None, tokenizer=None, torch_dtype=dtype)
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


PROGRAMS: dict[str, Callable[..., list[float]]] = {
    "fluxonnx": run_fluxonnx,
    "openvino": run_openvino,
    "diffusers": run_diffusers,
}


def python_contender(program: str, name: str, work: dict[str, Any]) -> Contender:
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", program, json.dumps(work)]
    return Contender(name, command, lambda done: json.loads(done.output.splitlines()[-1]))


# The binaries, whose figures are read from what they print.


def flux2c_contender(binary: str, work: dict[str, Any], folder: str) -> Contender:
    command = [binary, "-d", work["model"], "-p", work["prompt"], "-W", str(work["width"]), "-H", str(work["height"])]
    command += ["-s", str(work["steps"]), "-g", "1", "-S", str(SEED), "-v", "-o", f"{folder}/flux2c.png"]
    return Contender("flux2.c", command, flux2c_steps)


def flux2c_steps(done: Finished) -> list[float]:
    return [float(found) / 1e3 for found in re.findall(r"^ *Step \d+: ([\d.]+) ms", done.messages, re.MULTILINE)][1:]


def sdcpp_contender(binary: str, files: dict[str, str], work: dict[str, Any], folder: str) -> Contender:
    command = [binary, "--diffusion-model", files["model"], "--llm", files["llm"], "--vae", files["vae"]]
    command += ["-p", work["prompt"], "-W", str(work["width"]), "-H", str(work["height"])]
    command += ["--steps", str(work["steps"]), "--cfg-scale", "1.0", "--sampling-method", "euler", "-s", str(SEED)]
    command += ["--diffusion-fa", "-o", f"{folder}/sdcpp.png"]
    if work["threads"] is not None:
        command += ["-t", str(work["threads"])]
    return Contender("stable-diffusion.cpp", command, sdcpp_steps)


def sdcpp_steps(done: Finished) -> list[float]:
    # "| 2/4 - 28.87s/it", rewritten in place; weights are loaded within the first
    found = re.findall(r"\d+/\d+ - ([\d.]+)(s/it|it/s)", done.output)
    return [float(value) if unit == "s/it" else 1 / float(value) for value, unit in found][1:]


# All of them, in turns.


def line_up(arguments: argparse.Namespace, work: dict[str, Any], folder: str) -> list[Contender]:
    """Return those that are there, fluxonnx first, and say which are not."""
    contenders = [
        python_contender("fluxonnx", f"fluxonnx {precision}", {**work, "precision": precision})
        for precision in arguments.precision
    ]
    for rival in arguments.rivals:
        package, _, precision = rival.partition("-")
        missing = next((name for name in PACKAGES.get(package, ()) if importlib.util.find_spec(name) is None), None)
        if missing:
            skip(rival, f"pip install {missing}")
        elif package == "diffusers":
            contenders.append(python_contender("diffusers", f"diffusers {precision}", {**work, "precision": precision}))
        elif package == "openvino":
            for precision in arguments.openvino_precision:
                name = f"OpenVINO, {precision} graphs"
                contenders.append(python_contender("openvino", name, {**work, "precision": precision}))
        elif rival == "flux2c" and binary_is_there(rival, arguments.flux2c):
            contenders.append(flux2c_contender(arguments.flux2c, work, folder))
        elif rival == "sdcpp" and binary_is_there(rival, arguments.sdcpp):
            files = {kind: getattr(arguments, f"sdcpp_{kind}") for kind in ("model", "llm", "vae")}
            absent = next((kind for kind, file in files.items() if not file or not Path(file).is_file()), None)
            if absent:
                skip(rival, f"--sdcpp-{absent} must be a file that it can read")
            else:
                contenders.append(sdcpp_contender(arguments.sdcpp, files, work, folder))
    return contenders


def binary_is_there(rival: str, path: str | None) -> bool:
    if path is None:
        skip(rival, f"give its binary with --{rival}")
    elif shutil.which(path) is None:
        skip(rival, f"{path} is not a program")
    else:
        return True
    return False


def skip(rival: str, reason: str) -> None:
    print(f"skipped {rival}: {reason}", file=sys.stderr)


def take_turns(
    contenders: Sequence[Contender], repeat: int, environment: dict[str, str], forgotten: Sequence[Path] = ()
) -> None:
    for turn in range(repeat):
        for contender in contenders:
            if contender.error:
                continue
            for file in forgotten:
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                done = run_program(contender.command, environment)
            except FluxonnxError as error:
                contender.error = str(error)
                print(f"{contender.name} failed: {error}", file=sys.stderr, flush=True)
                continue
            if remark := re.search(r"^computes in .+$", done.output, re.MULTILINE):
                contender.remark = f" ({remark[0]})"
            found = (middle(contender.steps(done)), done.seconds, done.resident, done.anonymous)
            contender.runs.append(dict(zip(FIGURES, found, strict=True)))
            step = f"{number(found[0])} s" if found[0] is not None else "unknown"
            line = f"{contender.name}, run {turn + 1} of {repeat}: {done.seconds:.1f} s, one step {step}"
            print(line, file=sys.stderr, flush=True)


def weight_files(arguments: argparse.Namespace) -> list[Path]:
    """Return all files that weights are read from; what is not there was said to be missing."""
    given = (getattr(arguments, f"sdcpp_{kind}") for kind in ("model", "llm", "vae"))
    return [
        *Path(arguments.dir).rglob("*.safetensors"),
        *(Path(file) for file in given if file and Path(file).is_file()),
    ]


def environment_for(threads: int | None) -> dict[str, str]:
    """Return the environment of all programs: no downloads, and threads for those that are told this way."""
    counts = {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**os.environ, "HF_HUB_OFFLINE": "1", **counts}


def render(contenders: Sequence[Contender]) -> str:
    """Return two tables: what was found, and the same divided by what was found for the first."""
    good = [contender for contender in contenders if contender.runs]
    columns = ["one step, s", "total, s", "peak resident, GB", "peak anonymous, GB"]
    found = [
        [contender.name + contender.remark, *(number(contender.median(figure)) for figure in FIGURES)]
        for contender in good
    ]
    parts = [table(["program", *columns], found)]
    if contenders[0].runs:
        base = contenders[0]
        ratios = [
            [contender.name + contender.remark, *(ratio(contender, base, figure) for figure in FIGURES)]
            for contender in good
        ]
        header = ["one step", "total", "peak resident", "peak anonymous"]
        parts.append(table([f"times {base.name}", *header], ratios))
    return "\n\n".join(parts)


def ratio(contender: Contender, base: Contender, figure: str) -> str:
    ours, theirs = base.median(figure), contender.median(figure)
    return f"{theirs / ours:.2f}" if ours and theirs is not None else ""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="More in the head of this file.")
    parser.add_argument("-d", "--dir", required=True, help="model directory, Hugging Face layout")
    parser.add_argument("--size", default="256", metavar="WxH", help="default: %(default)s")
    parser.add_argument("-s", "--steps", type=int, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument("-p", "--prompt", default=PROMPT, metavar="TEXT", help="default: always the same")
    parser.add_argument("--threads", type=int, metavar="N", help="default: as each program chooses")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--precision", nargs="+", default=["bf16"], metavar="NAME", help="of fluxonnx (default: bf16)")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS, help="default: all")
    parser.add_argument(
        "--openvino-precision", nargs="+", default=["bf16"], metavar="NAME", help="of its graphs (default: bf16)"
    )
    parser.add_argument("--flux2c", metavar="PATH", help="the binary of antirez/flux2.c")
    parser.add_argument("--sdcpp", metavar="PATH", help="the binary of leejet/stable-diffusion.cpp (sd-cli)")
    for kind, what in (("model", "diffusion model"), ("llm", "text encoder"), ("vae", "VAE")):
        parser.add_argument(f"--sdcpp-{kind}", metavar="FILE", help=f"the {what} it reads, .safetensors or .gguf")
    parser.add_argument(
        "--cold", action="store_true", help="every program reads its weights from disk (not on Windows)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    arguments = parser.parse_args(argv)
    if arguments.cold and not hasattr(os, "posix_fadvise"):
        parser.error("argument --cold: this system can't be told to forget files")
    if arguments.repeat < 1:
        parser.error("argument --repeat: must be at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; returns 0, 1 if a program failed, 2 for wrong usage."""
    arguments = parse(argv)
    try:
        if arguments.json is not None:
            check_output(arguments.json)
        width, height = parse_size(arguments.size)
        request = Request(prompt=arguments.prompt, width=width, height=height, steps=arguments.steps)
        # All that is derived from the checkpoint is made before the clock runs.
        portable = arguments.openvino_precision if "openvino" in arguments.rivals else ()
        builds = [(precision, "ort") for precision in arguments.precision]
        for precision, flavour in [*builds, *((precision, "portable") for precision in portable)]:
            api.load(arguments.dir, precision=precision, flavour=flavour, threads=arguments.threads).check(request)
    except FluxonnxError as error:
        print(f"rivals: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    work = {
        "model": arguments.dir,
        "threads": arguments.threads,
        "width": width,
        "height": height,
        "steps": arguments.steps,
        "prompt": arguments.prompt,
    }
    with tempfile.TemporaryDirectory(prefix="fluxonnx-rivals-") as folder:
        contenders = line_up(arguments, work, folder)
        forgotten = weight_files(arguments) if arguments.cold else ()
        take_turns(contenders, arguments.repeat, environment_for(arguments.threads), forgotten)
    here = machine()
    cold = ", cold" if arguments.cold else ""
    print(f"{here['processor']}, {here['cores']} cores, {width}x{height}, {arguments.steps} steps{cold}\n")
    print(render(contenders))
    if arguments.json is not None:
        found = {
            contender.name: {"runs": contender.runs, "error": contender.error, "remark": contender.remark.strip(" ()")}
            for contender in contenders
        }
        with replacing(arguments.json) as temporary:
            temporary.write_text(json.dumps({"machine": here, **work, "programs": found}, indent=2) + "\n", "utf-8")
    return 1 if any(contender.error for contender in contenders) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(PROGRAMS[sys.argv[2]](**json.loads(sys.argv[3]))))
    else:
        sys.exit(main())
