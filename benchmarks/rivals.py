"""The same picture made by fluxonnx and by other programs in alternating rounds: seconds, memory, and ratios.

    python benchmarks/rivals.py -d DIR [--size 256] [--steps 4] [--repeat 3] [--precision bf16 fp32] [--threads 2]
        [--flux2c PATH] [--sdcpp PATH --sdcpp-model FILE ... --sdcpp-llm FILE --sdcpp-vae FILE] [--cold]

Each program gets a process of its own. Rounds alternate (A B A B), so that other load on the machine affects all
programs equally, and medians are printed. All programs draw the same prompt at the same size and number of steps,
without guidance, on the CPU:

- fluxonnx, at each `--precision`;
- fluxonnx's own engine on OpenBLAS (`--provider openblas`), with the weights as they are;
- diffusers in bfloat16 and in float32, with one change: the text encoder is dropped before the transformer is loaded,
  as the other programs do. Many machines lack the memory for both;
- diffusers with 8-bit integer products: by SDNQ, and by torchao with `torch.compile`, both rounded while loading;
- OpenVINO: fluxonnx's portable graphs in OpenVINO, in the precision that it chooses for the processor, driven by
  fluxonnx's own sampler; and the same with 8-bit weights by nncf, as optimum-intel makes them;
- antirez/flux2.c and leejet/stable-diffusion.cpp, where a binary is given. The latter reads other files than DIR, which
  `sdcpp_files.py` writes; several of its models are measured in turns.

The time of a step is the median of all steps except the first, in which some programs load their weights. The total is
the lifetime of the process: start, imports, loading, picture. Resident memory includes the mapped pages of weight
files, anonymous memory does not. Both are reported on Linux only. Programs that are not installed are skipped. With
`--cold` the weight files are dropped from the page cache before each run, so that all programs read them from disk.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.contenders import FIGURES, Contender, flux2c_contender, python_contender, sdcpp_contender
from fluxonnx import api
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.measure.picture import PROMPT
from fluxonnx.measure.process import run_program
from fluxonnx.measure.speed import parse_size
from fluxonnx.measure.tables import known_median, machine, number, table
from fluxonnx.runtime.outputs import check_output, write_output
from fluxonnx.runtime.request import Request

RIVALS = (
    "openblas",
    "diffusers-bf16",
    "diffusers-fp32",
    "diffusers-sdnq",
    "diffusers-torchao",
    "openvino",
    "openvino-nncf",
    "flux2c",
    "sdcpp",
)
DIFFUSERS = ("torch", "diffusers", "transformers")
PACKAGES = {
    "openblas": ("threadpoolctl",),
    "diffusers-bf16": DIFFUSERS,
    "diffusers-fp32": DIFFUSERS,
    "diffusers-sdnq": (*DIFFUSERS, "sdnq"),
    "diffusers-torchao": (*DIFFUSERS, "torchao"),
    "openvino": ("openvino",),
    "openvino-nncf": ("openvino", "nncf"),
}


def line_up(arguments: argparse.Namespace, work: dict[str, Any], folder: str) -> list[Contender]:
    """Return the programs that are installed, fluxonnx first, and report the others on standard error."""
    contenders = [
        python_contender("fluxonnx", f"fluxonnx {precision}", {**work, "precision": precision})
        for precision in arguments.precision
    ]
    for rival in arguments.rivals:
        package, _, precision = rival.partition("-")
        missing = next((name for name in PACKAGES.get(rival, ()) if importlib.util.find_spec(name) is None), None)
        if missing:
            skip(rival, f"pip install {missing}")
        elif package == "openblas":
            contenders.append(
                python_contender(
                    "fluxonnx", "fluxonnx bf16, openblas", {**work, "precision": "bf16", "provider": rival}
                )
            )
        elif package == "diffusers":
            contenders.append(python_contender("diffusers", f"diffusers {precision}", {**work, "precision": precision}))
        elif rival == "openvino-nncf":
            contenders.append(python_contender(rival, "OpenVINO, int8 weights by nncf", work))
        elif package == "openvino":
            for precision in arguments.openvino_precision:
                name = f"OpenVINO, {precision} graphs"
                contenders.append(python_contender("openvino", name, {**work, "precision": precision}))
        elif rival == "flux2c" and has_binary(rival, arguments.flux2c):
            contenders.append(flux2c_contender(arguments.flux2c, work, folder))
        elif rival == "sdcpp" and has_binary(rival, arguments.sdcpp):
            for model in arguments.sdcpp_model or [None]:
                files = {"model": model, "llm": arguments.sdcpp_llm, "vae": arguments.sdcpp_vae}
                absent = next((kind for kind, file in files.items() if not file or not Path(file).is_file()), None)
                if absent:
                    skip(rival, f"--sdcpp-{absent} must be a file that it can read")
                    continue
                several = len(arguments.sdcpp_model) > 1
                name = "stable-diffusion.cpp" + (f", {Path(model).stem}" if several else "")
                contenders.append(sdcpp_contender(name, arguments.sdcpp, files, work, folder))
    return contenders


def has_binary(rival: str, path: str | None) -> bool:
    if path is None:
        skip(rival, f"give its binary with --{rival}")
    elif shutil.which(path) is None:
        skip(rival, f"{path} is not a program")
    else:
        return True
    return False


def skip(rival: str, reason: str) -> None:
    print(f"skipped {rival}: {reason}", file=sys.stderr)


def measure(
    contenders: Sequence[Contender], repeat: int, environment: dict[str, str], dropped: Sequence[Path] = ()
) -> None:
    """Run all programs in alternating rounds; `dropped` files leave the page cache before each run."""
    for i in range(repeat):
        for contender in contenders:
            if contender.error:
                continue
            for file in dropped:
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
            found = (known_median(contender.steps(done)), done.seconds, done.resident, done.anonymous)
            contender.runs.append(dict(zip(FIGURES, found, strict=True)))
            step = f"{number(found[0])} s" if found[0] is not None else "unknown"
            line = f"{contender.name}, run {i + 1} of {repeat}: {done.seconds:.1f} s, one step {step}"
            print(line, file=sys.stderr, flush=True)


def weight_files(arguments: argparse.Namespace) -> list[Path]:
    """Return all files that hold weights; `line_up` reports those that are missing."""
    given = [*(arguments.sdcpp_model or []), arguments.sdcpp_llm, arguments.sdcpp_vae]
    return [
        *Path(arguments.dir).rglob("*.safetensors"),
        *(Path(file) for file in given if file and Path(file).is_file()),
    ]


def environment_for(threads: int | None) -> dict[str, str]:
    """Return the environment of all programs: no downloads, and the number of threads for those that read it there."""
    counts = {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**os.environ, "HF_HUB_OFFLINE": "1", **counts}


def render(contenders: Sequence[Contender]) -> str:
    """Return two tables: the measurements, and their ratios to those of the first program."""
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
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="See the docstring of this file for more."
    )
    parser.add_argument("-d", "--dir", required=True, help="model directory, Hugging Face layout")
    parser.add_argument("--size", default="256", metavar="WxH", help="default: %(default)s")
    parser.add_argument("-s", "--steps", type=int, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument("-p", "--prompt", default=PROMPT, metavar="TEXT", help="default: a fixed prompt")
    parser.add_argument("--threads", type=int, metavar="N", help="default: as each program chooses")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--precision", nargs="+", default=["bf16"], metavar="NAME", help="of fluxonnx (default: bf16)")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=RIVALS, help="default: all")
    parser.add_argument(
        "--openvino-precision", nargs="+", default=["bf16"], metavar="NAME", help="of its graphs (default: bf16)"
    )
    parser.add_argument("--flux2c", metavar="PATH", help="the binary of antirez/flux2.c")
    parser.add_argument("--sdcpp", metavar="PATH", help="the binary of leejet/stable-diffusion.cpp (sd-cli)")
    parser.add_argument(
        "--sdcpp-model",
        nargs="+",
        metavar="FILE",
        help="the diffusion models it reads, .safetensors or .gguf, in turns",
    )
    for kind, what in (("llm", "text encoder"), ("vae", "VAE")):
        parser.add_argument(f"--sdcpp-{kind}", metavar="FILE", help=f"the {what} it reads, .safetensors or .gguf")
    parser.add_argument(
        "--cold", action="store_true", help="every program reads its weights from disk (not on Windows)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    arguments = parser.parse_args(argv)
    if arguments.cold and not hasattr(os, "posix_fadvise"):
        parser.error("argument --cold: this system has no posix_fadvise to drop files from the page cache")
    if arguments.repeat < 1:
        parser.error("argument --repeat: must be at least 1")
    return arguments


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Export all builds before the clock starts; returns what every program is told.

    Raises:
        FluxonnxError: Such a picture can't be drawn, or such a build not be made.
    """
    width, height = parse_size(arguments.size)
    request = Request(prompt=arguments.prompt, width=width, height=height, steps=arguments.steps)
    portable = list(arguments.openvino_precision) if "openvino" in arguments.rivals else []
    portable += ["fp32"] if "openvino-nncf" in arguments.rivals else []
    builds = [(precision, "ort") for precision in arguments.precision]
    if "openblas" in arguments.rivals and "bf16" not in arguments.precision:
        builds.append(("bf16", "ort"))
    for precision, flavour in [*builds, *((precision, "portable") for precision in portable)]:
        with api.load(arguments.dir, precision=precision, flavour=flavour, threads=arguments.threads) as flux:
            flux.check(request)
    return {
        "model": arguments.dir,
        "threads": arguments.threads,
        "width": width,
        "height": height,
        "steps": arguments.steps,
        "prompt": arguments.prompt,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; returns 0, 1 if a program failed, 2 for wrong usage."""
    arguments = parse(argv)
    try:
        if arguments.json is not None:
            check_output(arguments.json, "--json")
        work = prepare(arguments)
    except FluxonnxError as error:
        print(f"rivals: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    with tempfile.TemporaryDirectory(prefix="fluxonnx-rivals-") as folder:
        contenders = line_up(arguments, work, folder)
        dropped = weight_files(arguments) if arguments.cold else ()
        measure(contenders, arguments.repeat, environment_for(arguments.threads), dropped)
    here = machine()
    cold = ", cold" if arguments.cold else ""
    size = f"{work['width']}x{work['height']}"
    print(f"{here['processor']}, {here['cores']} cores, {size}, {arguments.steps} steps{cold}\n")
    print(render(contenders))
    if arguments.json is not None:
        found = {
            contender.name: {"runs": contender.runs, "error": contender.error, "remark": contender.remark.strip(" ()")}
            for contender in contenders
        }
        machine_and_programs = json.dumps({"machine": here, **work, "programs": found}, indent=2)
        write_output(arguments.json, (machine_and_programs + "\n").encode())
    return 1 if any(contender.error for contender in contenders) else 0


if __name__ == "__main__":
    sys.exit(main())
