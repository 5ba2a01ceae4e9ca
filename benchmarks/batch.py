"""Pictures a second of `fluxonnx batch` with one worker and with several, against plain loops of `generate`.

    python benchmarks/batch.py [-d MODEL] [--pictures 24] [--size 64] [--steps 2] [--workers 1 2] [--repeat 3]

Each contender draws the same prompts in each round, and the rounds go through all contenders in turn, so that other
load on the machine affects all of them. Times include the start of the workers and the writing of pictures. The loop of
commands, `fluxonnx generate` once for each picture, draws only a few pictures. Ratios are to the loop of
`Flux.generate` of the same round; the table has their medians. Memory is read while the last pictures are drawn, from
/proc/PID/smaps_rollup: the proportional set size (PSS) of a worker counts a page that N processes share as 1/N of it.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import fluxonnx
from fluxonnx import api
from fluxonnx.batch import local
from fluxonnx.batch.making import make_pictures
from fluxonnx.batch.painter import Painter, close
from fluxonnx.batch.rows import read_rows
from fluxonnx.errors import FluxonnxError
from fluxonnx.measure.tables import table

COLOURS = ("red", "green", "blue", "yellow")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="measure batches")
    parser.add_argument("-d", "--dir", type=Path, help="model directory (default: the bundled model)")
    parser.add_argument("--precision", default="bf16", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--pictures", type=int, default=24, metavar="N", help="default: %(default)s")
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="of a square (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--commands", type=int, default=3, metavar="N", help="0 for none (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if min(arguments.repeat, arguments.pictures, *arguments.workers) < 1:
        parser.error("--repeat, --pictures and --workers: must be at least 1")
    try:
        print(run(arguments))
    except FluxonnxError as error:
        print(f"benchmarks/batch.py: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments: argparse.Namespace) -> str:
    """Measure all contenders; returns a table."""
    model = api.find_model(arguments.dir)
    api.load(model, precision=arguments.precision).close()  # exports it where it is missing
    rates: dict[str, list[float]] = {}
    memory: dict[str, str] = {}
    for _ in range(arguments.repeat):
        for name, draw in contenders(arguments, model, memory).items():
            rates.setdefault(name, []).append(draw())
            print(f"{name}: {rates[name][-1]:.2f} pictures/s", file=sys.stderr, flush=True)
    base = rates["Flux.generate in a loop"]
    rows = [
        [
            name,
            f"{statistics.median(found):.2f}",
            f"{statistics.median(rate / plain for rate, plain in zip(found, base, strict=True)):.2f}",
            memory.get(name, ""),
        ]
        for name, found in rates.items()
    ]
    return table(["contender", "pictures/s", "ratio", "memory of a worker: resident, PSS, PSS of files"], rows)


def contenders(arguments: argparse.Namespace, model: Path, memory: dict[str, str]) -> dict[str, Callable[[], float]]:
    """Return functions that draw and return pictures a second."""
    found: dict[str, Callable[[], float]] = {
        "Flux.generate in a loop": lambda: loop(arguments, model, keep_loaded=False),
        "the same with keep_loaded": lambda: loop(arguments, model, keep_loaded=True),
    }
    if arguments.commands > 0:
        found["fluxonnx generate in a loop"] = lambda: commands(arguments, model)
    for workers in arguments.workers:
        name = f"fluxonnx batch, {workers} worker{'s' if workers > 1 else ''}"
        found[name] = lambda workers=workers, name=name: batch(arguments, model, workers, name, memory)  # type: ignore[misc]
    return found


def prompt(number: int) -> str:
    return f"a {COLOURS[number % len(COLOURS)]} circle, number {number}"


def loop(arguments: argparse.Namespace, model: Path, keep_loaded: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with fluxonnx.load(model, precision=arguments.precision, keep_loaded=keep_loaded) as flux:
            for i in range(arguments.pictures):
                image = flux.generate(prompt(i), arguments.size, arguments.size, arguments.steps, seed=i)
                image.save(f"{folder}/{i}.png")
        return arguments.pictures / (time.perf_counter() - start)


def commands(arguments: argparse.Namespace, model: Path) -> float:
    size = [f"-W{arguments.size}", f"-H{arguments.size}", f"-s{arguments.steps}"]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for i in range(arguments.commands):
            command = [sys.executable, "-m", "fluxonnx", "generate", "-q", "-d", str(model), "-p", prompt(i), *size]
            command += ["--precision", arguments.precision, "-S", str(i), "-o", f"{folder}/{i}.png"]
            if subprocess.run(command, check=False).returncode:
                raise FluxonnxError("fluxonnx generate failed")
        return arguments.commands / (time.perf_counter() - start)


def batch(arguments: argparse.Namespace, model: Path, workers: int, name: str, memory: dict[str, str]) -> float:
    painter = Painter(model, arguments.precision)
    flags = {"width": arguments.size, "height": arguments.size, "steps": arguments.steps}
    seen: set[str] = set()

    def watch(row: object, result: object) -> None:
        assert isinstance(result, dict)
        seen.add(result["worker"])
        if len(seen) == workers:
            used = [resident(int(worker.rpartition(":")[2])) for worker in sorted(seen)]
            memory[name] = "; ".join(filter(None, used))

    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.txt")
        prompts.write_text("\n".join(map(prompt, range(arguments.pictures))))
        start = time.perf_counter()
        rows = read_rows(prompts, painter, flags=flags)
        summary = make_pictures(rows, Path(folder, "out"), painter, local.engine(workers), watch=watch)
        close()
        seconds = time.perf_counter() - start
    if summary.failed:
        raise FluxonnxError(summary.first_error)
    return arguments.pictures / seconds


def resident(pid: int) -> str:
    """Return resident memory, PSS and PSS of files of a process in MB; empty where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return ""
    found = dict(re.findall(r"^(Rss|Pss|Pss_File): +(\d+) kB$", text, re.MULTILINE))
    return ", ".join(f"{int(found[key]) / 1000:.0f}" for key in ("Rss", "Pss", "Pss_File") if key in found)


if __name__ == "__main__":
    sys.exit(main())
