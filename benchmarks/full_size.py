"""Seconds and memory per phase on a full-size checkpoint: export, then pictures at several sizes.

    python benchmarks/full_size.py [CHECKPOINT] [--sizes 64 256 512]

Without a checkpoint it makes a random one of 16 GB in a temporary folder and deletes it afterwards. Each picture is
made by a process of its own. Memory is read from /proc, so this runs on Linux only: "anonymous" is what the process
needs for itself, "mapped" are pages of the weight files, which the kernel can drop at any time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

PROMPT = "a lighthouse on a cliff at night, waves breaking below, long exposure photograph"


def resident() -> tuple[float, float]:
    """Return anonymous and file-mapped resident memory in GB."""
    status = Path("/proc/self/status").read_text()
    anonymous, mapped = (int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("RssAnon", "RssFile"))
    return anonymous / 1e6, mapped / 1e6


def measure_generate(checkpoint: str, size: int, steps: int, precision: str) -> dict:
    """Make one picture; returns seconds and peak memory per phase, and seconds per step."""
    import fluxonnx

    flux = fluxonnx.load(checkpoint, precision=precision)
    peaks: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peak = peaks[flux.phases.current]
            peak[:] = map(max, peak, resident())

    threading.Thread(target=watch, daemon=True).start()
    times = []
    flux.generate(PROMPT, size, size, steps=steps, seed=1, callback=lambda *_: times.append(time.perf_counter()))
    stop.set()
    per_step = sorted(after - before for before, after in itertools.pairwise(times))
    return {
        "phases": {name: [seconds, *peaks[name]] for name, seconds in flux.phases.seconds.items()},
        "step": per_step[len(per_step) // 2] if per_step else None,
    }


def measure_export(checkpoint: str, precision: str) -> dict:
    """Export anew; returns seconds, peak memory and bytes written."""
    from fluxonnx.export import export

    start = time.perf_counter()
    reports = export(checkpoint, precision=precision, force=True)
    return {
        "seconds": time.perf_counter() - start,
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "written": sum(report.bytes_written for report in reports),
    }


def in_own_process(*arguments: str) -> dict:
    """Run one measurement in a fresh process, so that its memory is its own."""
    command = [sys.executable, __file__, "--measure", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def report(checkpoint: str, sizes: list[int], steps: int, precision: str) -> None:
    """Run all measurements and print the table."""
    done = in_own_process("export", checkpoint, precision)
    print(f"export: {done['seconds']:.2f} s, {done['rss']:.2f} GB RSS, {done['written'] / 1e6:.2f} MB written\n")
    print(f"| size | phase | seconds | anonymous GB | mapped GB |\n|{'---|' * 5}")
    for size in sizes:
        result = in_own_process("generate", checkpoint, str(size), str(steps), precision)
        for name, (seconds, anonymous, mapped) in result["phases"].items():
            print(f"| {size} | {name} | {seconds:.1f} | {anonymous:.2f} | {mapped:.2f} |")
        if result["step"] is not None:
            print(f"| {size} | one step (median after the first) | {result['step']:.1f} | | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="default: a random one, made and deleted")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 512], help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--precision", default="bf16", help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.checkpoint:
        report(arguments.checkpoint, arguments.sizes, arguments.steps, arguments.precision)
        return
    from benchmarks.make_checkpoint import ARCHITECTURES, make_checkpoint

    with tempfile.TemporaryDirectory(prefix="fluxonnx-4b-") as folder:
        start = time.perf_counter()
        make_checkpoint(Path(folder), ARCHITECTURES["4b"])
        print(f"random checkpoint: {time.perf_counter() - start:.0f} s")
        report(folder, arguments.sizes, arguments.steps, arguments.precision)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        what, checkpoint, *rest = sys.argv[2:]
        if what == "export":
            print(json.dumps(measure_export(checkpoint, rest[0])))
        else:
            print(json.dumps(measure_generate(checkpoint, int(rest[0]), int(rest[1]), rest[2])))
    else:
        main()
