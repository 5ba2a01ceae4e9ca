"""`fluxonnx generate`: make pictures and save them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fluxonnx.cli.flags import (
    Flags,
    add_field,
    add_model,
    add_parser,
    add_parts,
    add_text_encoder_precision,
    add_verbosity,
    find_model,
    pair,
    path_name,
    thread_count,
)
from fluxonnx.cli.progress import Progress, phase_line, speaker
from fluxonnx.runtime.fields import FIELDS

if TYPE_CHECKING:
    from PIL.Image import Image

    from fluxonnx.cli.jobs import Job, Wanted
    from fluxonnx.cli.previews import Previews
    from fluxonnx.runtime.pipeline import Flux
    from fluxonnx.terminal.pictures import Show

# Prompts that are encoded ahead together, so that the text encoder is loaded once for all of them.
PROMPTS_AHEAD = 8

# The titles and descriptions of the groups of flags that the fields belong to.
GROUPS = {
    "prompt": ("prompt (one of -p, --prompt-file, --from)", None),
    "picture": ("picture", None),
    "input": (
        "input pictures",
        "-i alone edits: the model looks at the picture and draws a new one. -i with -t paints over it.",
    ),
    "sampling": ("sampling", None),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the command.

    Attributes:
        wanted: What they say about pictures.
        source: A picture to make again.
        dir: The model directory; None for the default.
        precision: None for that of the picture that is made again, else the default.
        text_encoder_precision: Likewise, the default being the precision.
        provider: Likewise.
        provider_option: Pairs of an option of the provider and its value.
        threads: Threads per operator; None for one per core that this process may use.
        lora: LoRA files, as FILE or FILE:SCALE.
        low_memory: Whether to need less memory and more time.
        keep_loaded: Whether graphs stay loaded between pictures.
        cache_dir: The folder of encoded prompts.
        preview: Where previews of the steps are written.
        preview_method: How they are drawn.
        animate: The file of an animation of the steps.
        show: How the steps and the picture are shown on the terminal; None for not.
        parts: The files that replace the weights of components, by the components' folders.
        verbose: Whether to print the seconds that phases take.
        quiet: Whether to print errors only.
    """

    wanted: Wanted
    source: Path | None
    dir: str | None
    precision: str | None
    text_encoder_precision: str | None
    provider: str | None
    provider_option: list[tuple[str, str]]
    threads: int | None
    lora: list[str]
    low_memory: bool
    keep_loaded: bool
    cache_dir: Path | None
    preview: Path | None
    preview_method: str | None
    animate: Path | None
    show: str | None
    parts: dict[str, Path | None]
    verbose: bool
    quiet: bool


def add_command(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command and its flags."""
    parser = add_parser(
        subparsers,
        "generate",
        run,
        "make pictures from prompts and pictures",
        "-p TEXT [-d DIR] [-o FILE] [-i FILE [-t X]] [options]",
        'fluxonnx generate -d model -p "a cat on a windowsill" -o cat.png -W 512 -H 512 -S 42',
        'fluxonnx generate -d model -p "make it snow" -i photo.png -o snow.png          # edit: looks at the photo',
        'fluxonnx generate -d model -p "oil painting" -i photo.png -t 0.7 -o oil.png    # paints over the photo',
    )
    groups = {name: parser.add_argument_group(*texts) for name, texts in GROUPS.items()}
    for field in FIELDS:
        if field.flags:
            add_field(groups[field.group], field.name)
        if field.name == "prompt":
            _add_prompt_sources(groups[field.group])
    groups["input"].add_argument(
        "--absolute-paths",
        action="store_true",
        help="write into the picture where the input pictures are, and not only their names",
    )
    steps = parser.add_argument_group("steps")
    steps.add_argument(
        "--preview",
        type=path_name,
        metavar="PATH",
        help="write what each step expects the picture to be: into a folder, or into one file that each step replaces",
    )
    steps.add_argument(
        "--preview-method",
        metavar="NAME",
        help="fast (default): blurred, and in no time; vae: by the decoder, see --verbose for the time that takes",
    )
    steps.add_argument("--animate", type=path_name, metavar="FILE", help="a .gif or .webp of the steps")
    steps.add_argument(
        "--show",
        nargs="?",
        const="auto",
        metavar="HOW",
        help="show the steps and the picture on the terminal: auto (alone), kitty, iterm2, sixel or blocks",
    )
    groups["prompt"].add_argument(
        "--cache-dir",
        type=path_name,
        metavar="DIR",
        help="keep encoded prompts here, so that a known prompt skips the text encoder",
    )
    model = parser.add_argument_group("model")
    add_model(model, "$FLUXONNX_MODEL, else ./model, else the bundled demo model, which draws coloured shapes")
    add_parts(model)
    model.add_argument(
        "--lora",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE[:SCALE]",
        help="LoRA files, or OWNER/NAME of the hub, each with how strongly it counts (default: 1); none for none",
    )
    model.add_argument("--precision", metavar="NAME", help="bf16 (default), fp32, fp16, int8, int4, or auto")
    add_text_encoder_precision(model)
    model.add_argument(
        "--provider",
        metavar="NAME",
        help="execution provider: cpu (default), openblas, another one of onnxruntime, such as cuda or coreml, or auto",
    )
    model.add_argument(
        "--provider-option",
        type=pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the provider by the name that its documentation has, such as MLComputeUnits=CPUAndGPU of "
        "coreml; can be repeated",
    )
    model.add_argument(
        "--threads", type=thread_count, metavar="N", help="default: one per core that this process may use"
    )
    model.add_argument(
        "--low-memory",
        action="store_true",
        help="use less memory and more time: pictures above 576x576 are decoded in tiles, with small differences",
    )
    model.add_argument(
        "--keep-loaded",
        action="store_true",
        help="keep the whole model in memory from one picture to the next, which is faster where it fits: on a GPU",
    )
    add_verbosity(parser)


def _add_prompt_sources(flags: Flags) -> None:
    """Add the alternatives to -p."""
    flags.add_argument(
        "--prompt-file",
        type=path_name,
        metavar="FILE",
        help='one prompt per line, or JSON objects such as {"prompt": "a cat", "seed": 7, "input": "a.png"}; '
        "a table if its name ends in .csv or .parquet; - for standard input",
    )
    flags.add_argument(
        "--from",
        dest="source",
        type=path_name,
        metavar="PICTURE",
        help="make a fluxonnx picture again, from the parameters in it; other flags override them",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the command with its parsed arguments."""
    generate(options_of(arguments))


def options_of(arguments: argparse.Namespace) -> Options:
    """Return the parsed arguments as options."""
    from fluxonnx.cli.jobs import Wanted

    given = {
        field.name: getattr(arguments, field.name) for field in FIELDS if field.flags and "request" in field.places
    }
    return Options(
        wanted=Wanted(
            values={name: value for name, value in given.items() if value is not None},
            seed=arguments.seed,
            count=arguments.count,
            files={"input": arguments.input, "reference": arguments.reference},
            mask=arguments.mask,
            output=arguments.output,
            prompt_file=arguments.prompt_file,
            absolute_paths=arguments.absolute_paths,
        ),
        source=arguments.source,
        dir=arguments.dir,
        precision=arguments.precision,
        text_encoder_precision=arguments.text_encoder_precision,
        provider=arguments.provider,
        provider_option=arguments.provider_option,
        threads=arguments.threads,
        lora=arguments.lora,
        low_memory=arguments.low_memory,
        keep_loaded=arguments.keep_loaded,
        cache_dir=arguments.cache_dir,
        preview=arguments.preview,
        preview_method=arguments.preview_method,
        animate=arguments.animate,
        show=arguments.show,
        parts={name: getattr(arguments, name) for name in ("transformer", "text_encoder", "vae")},
        verbose=arguments.verbose,
        quiet=arguments.quiet,
    )


def generate(options: Options) -> None:
    """Make pictures and save them."""
    from fluxonnx import api
    from fluxonnx.cli.checks import check_jobs
    from fluxonnx.cli.jobs import choose_build, located, plan, read_source
    from fluxonnx.cli.previews import open_previews
    from fluxonnx.contract import open_checkpoint
    from fluxonnx.runtime.lora_files import chosen

    say = speaker(options.quiet)
    say_seconds = speaker(quiet=not options.verbose)
    source = read_source(options.source) if options.source else None
    jobs = plan(options.wanted, source)
    several = sum(len(job.seeds) for job in jobs) > 1
    shown = options.show is not None
    previews = open_previews(options.preview, options.preview_method, options.animate, several, shown)
    show = None
    if options.show is not None:
        from fluxonnx.terminal.pictures import open_show

        show = open_show(options.show, options.preview_method)
    model = find_model(options.dir, say)
    checkpoint = open_checkpoint(model, **options.parts)
    build = choose_build(options.precision, options.text_encoder_precision, options.provider, source, checkpoint.name)
    tokenizer = check_jobs(jobs, checkpoint, options.cache_dir)
    loras = chosen(options.lora, source.values if source else {}, options.source, checkpoint.root)
    start = time.perf_counter()
    with Progress(options.quiet) as bar:
        if show:
            show.clear = bar.close
        flux = api.load(
            model,
            precision=build.precision,
            text_encoder_precision=build.text_encoder_precision,
            provider=build.provider,
            provider_options=dict(options.provider_option),
            flavour=build.flavour,
            kv=True if any(job.request.kv for job in jobs) else None,
            threads=options.threads,
            low_memory=options.low_memory,
            keep_loaded=options.keep_loaded,
            cache_dir=options.cache_dir,
            transformer=options.parts["transformer"],
            text_encoder=options.parts["text_encoder"],
            vae=options.parts["vae"],
            on_export=lambda root: say(f"Exporting {root} ..."),
            on_choice=lambda choice: say(str(choice)),
            watch=bar.event,
        )
        del tokenizer  # the model holds it
        say_seconds(phase_line("open model", time.perf_counter() - start))
        with flux:
            for i, lora in enumerate(loras):
                flux.load_lora(lora.file, lora.scale, name=str(i))
            for job in jobs if len(jobs) > 1 else ():  # what only static graphs can't draw is found before the first
                with located(job.where):
                    flux.check(job.request)
            for i, job in enumerate(jobs):
                if len(jobs) > 1 and i % PROMPTS_AHEAD == 0:
                    ahead = jobs[i : i + PROMPTS_AHEAD]
                    flux.encode_prompts([item.request.prompt for item in ahead], job.request.max_sequence_length)
                _make(flux, job, previews, show, bar, say, say_seconds)


def _make(
    flux: Flux,
    job: Job,
    previews: Previews | None,
    show: Show | None,
    bar: Progress,
    say: Callable[[str], None],
    say_seconds: Callable[[str], None],
) -> None:
    """Make the pictures of a job, and save each as soon as it is decoded."""
    from fluxonnx.runtime.saving import save_image

    bar.close()
    say(f"Seed: {', '.join(map(str, job.seeds))}")
    start = time.perf_counter()
    if previews or show:
        pictures = _watched(flux, job, previews, show, bar)
    else:
        pictures = flux.pictures(job.request, job.seeds, bar.step)
    for _, image in pictures:
        bar.close()
        saving = time.perf_counter()
        path = save_image(image, job.output, {**image.info, **job.inputs}, job.numbered)
        if show:
            show.finish(image)
        say_seconds(phase_line("save", time.perf_counter() - saving))
        say(f"{path} {image.width}x{image.height} ({time.perf_counter() - start:.1f} s)")
        if previews and (animation := previews.finish(image)):
            say(str(animation))
    bar.close()
    for name, seconds in flux.phases.seconds.items():
        say_seconds(phase_line(name, seconds))


def _watched(
    flux: Flux, job: Job, previews: Previews | None, show: Show | None, bar: Progress
) -> Iterator[tuple[int, Image]]:
    """Make the pictures of a job one by one, with previews of their steps."""
    for seed in job.seeds:
        last = None
        for step in flux.steps(job.request, seed):
            if show:
                show.step(step)
            bar.step(step.index, step.steps, step.sigma, step.latents)
            if previews:
                previews.step(step, f"{job.output.stem}-{seed}")
            last = step
        if last is None:  # at strength 0 there are no steps
            yield from flux.pictures(job.request, [seed])
        else:
            yield seed, last.image()
