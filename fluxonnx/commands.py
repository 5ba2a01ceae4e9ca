"""What the commands do, each a function of its parsed arguments."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fluxonnx.errors import FluxonnxError
from fluxonnx.progress import Progress

if TYPE_CHECKING:
    from fluxonnx.jobs import Job
    from fluxonnx.runtime.pipeline import Flux

# Prompts that are encoded ahead together, so that the text encoder is loaded once for them.
PROMPTS_AHEAD = 8


def generate(arguments: argparse.Namespace) -> None:
    """Make pictures and save them."""
    from fluxonnx import api, jobs
    from fluxonnx.checkpoint import Checkpoint

    say = _speaker(arguments)
    pictures = jobs.plan(arguments)
    model = _find_model(arguments, say)
    start = time.perf_counter()
    flux = api.load(
        model,
        **jobs.build(arguments, Checkpoint(model).name),
        threads=arguments.threads,
        low_memory=arguments.low_memory,
        cache_dir=arguments.cache_dir,
        on_export=lambda root: say(f"Exporting {root} ..."),
        on_choice=lambda choice: say(str(choice)),
    )
    if arguments.verbose:
        say(f"{'open model':<18}{time.perf_counter() - start:8.2f} s")
    with flux:
        for job in pictures:
            flux.check(job.request)
        for i, job in enumerate(pictures):
            if len(pictures) > 1 and i % PROMPTS_AHEAD == 0:
                ahead = pictures[i : i + PROMPTS_AHEAD]
                flux.encode_prompts([item.request.prompt for item in ahead], job.request.max_sequence_length)
            _make(flux, job, arguments, say)


def _make(flux: Flux, job: Job, arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    from fluxonnx.jobs import output_names
    from fluxonnx.runtime.images import save_image

    say(f"Seed: {', '.join(map(str, job.seeds))}")
    start = time.perf_counter()
    with Progress(arguments.quiet) as bar:
        flux.on_phase = bar.phase
        images = flux.run(job.request, job.seeds, bar.step)
    if arguments.verbose:
        for name, seconds in flux.phases.seconds.items():
            say(f"{name:<18}{seconds:8.2f} s")
    for image, path in zip(images, output_names(job.output, job.numbered, len(images)), strict=True):
        saving = time.perf_counter()
        save_image(image, path, {**image.info, **job.files})
        if arguments.verbose:
            say(f"{'save':<18}{time.perf_counter() - saving:8.2f} s")
        say(f"{path} {image.width}x{image.height} ({time.perf_counter() - start:.1f} s)")


def export(arguments: argparse.Namespace) -> None:
    """Export graphs and print a table of what was written."""
    from fluxonnx.api import AUTO, default_precision
    from fluxonnx.auto import choose
    from fluxonnx.checkpoint import Checkpoint
    from fluxonnx.export import export as run

    say = _speaker(arguments)
    checkpoint = Checkpoint(arguments.dir, arguments.transformer)
    precision = arguments.precision or default_precision(checkpoint)
    if precision == AUTO:
        choice = choose(checkpoint)
        precision = choice.precision
        say(str(choice))
    with Progress(arguments.quiet) as bar:
        reports = run(
            arguments.dir,
            arguments.output,
            transformer=arguments.transformer,
            precision=precision,
            keep=arguments.keep,
            block=arguments.block,
            rotate=arguments.rotate,
            flavour=arguments.flavour,
            components=arguments.component,
            opset=arguments.opset,
            force=arguments.force,
            progress=bar.bytes,
        )
    say(f"{'graph':<32}{'nodes':>7}{'parameters':>16}{'bytes written':>16}{'seconds':>9}")
    for report in reports:
        seconds = f"{report.seconds:9.2f}" if report.seconds is not None else " up to date"
        say(f"{report.graph:<32}{report.nodes:>7}{report.parameters:>16,}{report.bytes_written:>16,}{seconds}")


def bench(arguments: argparse.Namespace) -> None:
    """Measure configurations against each other, print tables, and write JSON if asked to."""
    from fluxonnx import bench as benchmark

    say = _speaker(arguments)
    plan = benchmark.Plan(
        model=_find_model(arguments, say),
        configurations=benchmark.combine(arguments.size, arguments.precision, arguments.threads, arguments.provider),
        prompt=benchmark.PROMPT if arguments.prompt is None else arguments.prompt,
        steps=arguments.steps,
        repeat=arguments.repeat,
        export=arguments.export,
        profile=arguments.profile,
        low_memory=arguments.low_memory,
    )
    if arguments.json is not None:
        benchmark.check_output(arguments.json)
    report = benchmark.run(plan, say)
    if not arguments.quiet:
        print(benchmark.render(report))
    if arguments.json is not None:
        benchmark.save(report, arguments.json)
    if report.failure:
        raise FluxonnxError(report.failure)


def compare(arguments: argparse.Namespace) -> None:
    """Compare precisions, print tables, and write a page with pictures and plots."""
    from fluxonnx import compare as comparison
    from fluxonnx import report as reporting
    from fluxonnx.bench import check_output

    say = _speaker(arguments)
    output = arguments.output or Path("compare.html")
    check_output(output, "-o")
    plan = comparison.Plan(
        model=_find_model(arguments, say),
        precisions=tuple(arguments.precision),
        prompts=tuple(arguments.prompt or comparison.PROMPTS),
        seed=arguments.seed,
        width=arguments.width,
        height=arguments.height,
        steps=arguments.steps,
    )
    report = comparison.run(plan, say)
    reporting.save(report, output)
    if not arguments.quiet:
        print(reporting.render(report))
    say(f"{output}: pictures and plots")


def info(arguments: argparse.Namespace) -> None:
    """Print the parameters in a picture as JSON."""
    from fluxonnx.runtime.metadata import read_parameters

    print(json.dumps(read_parameters(arguments.picture), indent=2, ensure_ascii=False))


def _find_model(arguments: argparse.Namespace, say: Callable[[str], None]) -> Path:
    from fluxonnx import api

    model = api.find_model(arguments.dir)
    if api.is_shipped(model):
        say(
            f"Using {model.name}, the small model in the box: it knows coloured shapes on backgrounds, nothing else. "
            "Pass -d DIR for the real FLUX.2-klein (hf download black-forest-labs/FLUX.2-klein-4B --local-dir DIR)"
        )
    return model


def _speaker(arguments: argparse.Namespace) -> Callable[[str], None]:
    return (lambda text: None) if arguments.quiet else (lambda text: print(text, file=sys.stderr, flush=True))
