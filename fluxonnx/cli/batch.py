"""`fluxonnx batch`: a table of prompts in, a folder of pictures and a table out."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxonnx.cli.flags import (
    add_field,
    add_model,
    add_parser,
    add_parts,
    add_quiet,
    add_text_encoder_precision,
    find_model,
    pair,
    path_name,
    thread_count,
)
from fluxonnx.cli.progress import speaker
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.runtime.fields import FIELDS

if TYPE_CHECKING:
    from fluxonnx.batch.making import Engine, Summary
    from fluxonnx.batch.painter import Painter
    from fluxonnx.batch.rows import Row

ENGINES = ("local", "ray")
FORMATS = ("png", "jpg", "webp", "ppm")
# Values of each row that a flag can replace: all that say how something is drawn, and not what.
REPLACED = [item for item in FIELDS if item.flags and "request" in item.places and item.name != "prompt"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the command.

    Attributes:
        table: The prompts.
        output: The folder.
        values: Attributes of `Request` that replace those of each row.
        seed: Decides the seeds of rows that have none.
        format: The ending of the pictures' names.
        parquet: Whether to write the table also as a Parquet file.
        again: Whether to make also what is there.
        engine: One of `ENGINES`.
        address: Where Ray's head node is.
        workers: How many.
        threads: Of each worker.
        dir: The model directory; None for the default.
        model: Further settings of the model, by the names of the attributes of `Painter`.
        quiet: Whether to print errors only.
    """

    table: Path
    output: Path
    values: Mapping[str, Any]
    seed: int
    format: str
    parquet: bool
    again: bool
    engine: str
    address: str | None
    workers: int | None
    threads: int | None
    dir: str | None
    model: Mapping[str, Any]
    quiet: bool


def add_command(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command and its flags."""
    parser = add_parser(
        subparsers,
        "batch",
        run,
        "make the pictures of a table of prompts, on one machine or many, and go on where an earlier run ended",
        "TABLE -o DIR [--engine local|ray] [--workers N] [options]",
        "fluxonnx batch prompts.jsonl -d model -o pictures",
        "fluxonnx batch prompts.csv -d model -o pictures -W 512 -H 512 --workers 4",
        "fluxonnx batch prompts.parquet -d /models/klein -o pictures --engine ray --address auto --parquet",
    )
    parser.add_argument(
        "table",
        type=path_name,
        metavar="TABLE",
        help="one prompt per line, or JSON objects, as --prompt-file of generate takes them, and each may have an id; "
        "a table if its name ends in .csv or .parquet; - for standard input",
    )
    out = parser.add_argument_group("output")
    out.add_argument(
        "-o",
        "--output",
        type=path_name,
        required=True,
        metavar="DIR",
        help="the folder of the pictures and of pictures.jsonl, which tells what made each; what is there and whole is "
        "not made again",
    )
    out.add_argument("--format", default="png", metavar="NAME", help=f"{', '.join(FORMATS)} (default: %(default)s)")
    out.add_argument("--parquet", action="store_true", help="write the table also as pictures.parquet")
    out.add_argument("--again", action="store_true", help="make also the pictures that are there")
    out.add_argument(
        "-S",
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="decides the seeds of rows that have none, together with the id or the number of each (default: 0)",
    )
    values = parser.add_argument_group("pictures", "These replace the values of each row.")
    for field in REPLACED:
        add_field(values, field.name)
    engines = parser.add_argument_group("workers")
    engines.add_argument("--engine", default="local", metavar="NAME", help="local (default), or ray for many machines")
    engines.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="Ray's head node, or auto for the cluster that this machine belongs to (default: $RAY_ADDRESS, else a "
        "cluster of this machine alone)",
    )
    engines.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that draw (default: 1 with local, and what the cluster's processors are enough for with ray)",
    )
    engines.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help="of each worker (default: its share of the cores with local, and all of the smallest node with ray)",
    )
    _add_model(parser.add_argument_group("model"))
    add_quiet(parser)


def _add_model(model: argparse._ArgumentGroup) -> None:
    add_model(model)
    add_parts(model)
    model.add_argument(
        "--lora", nargs="+", action="extend", default=[], metavar="FILE[:SCALE]", help="LoRA files, as in generate"
    )
    model.add_argument("--precision", metavar="NAME", help="bf16 (default), fp32, fp16, int8, int4, or auto")
    add_text_encoder_precision(model)
    model.add_argument("--provider", metavar="NAME", help="cpu (default), openblas, cuda, coreml, ..., or auto")
    model.add_argument(
        "--provider-option",
        type=pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the provider; can be repeated",
    )
    model.add_argument("--low-memory", action="store_true", help="use less memory and more time, as in generate")
    model.add_argument(
        "--keep-loaded",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep the whole model in memory from one picture to the next (default: only models that are small beside "
        "the free memory)",
    )
    model.add_argument("--cache-dir", type=path_name, metavar="DIR", help="keep encoded prompts here")


def run(arguments: argparse.Namespace) -> None:
    """Run the command with its parsed arguments."""
    batch(options_of(arguments))


def options_of(arguments: argparse.Namespace) -> Options:
    """Return the parsed arguments as options."""
    given = {field.name: getattr(arguments, field.name) for field in REPLACED}
    model = {
        name: getattr(arguments, name)
        for name in ("precision", "text_encoder_precision", "provider", "low_memory", "keep_loaded", "cache_dir")
    }
    parts = {name: getattr(arguments, name) for name in ("transformer", "text_encoder", "vae")}
    return Options(
        table=arguments.table,
        output=arguments.output,
        values={name: value for name, value in given.items() if value is not None},
        seed=arguments.seed,
        format=arguments.format,
        parquet=arguments.parquet,
        again=arguments.again,
        engine=arguments.engine,
        address=arguments.address,
        workers=arguments.workers,
        threads=arguments.threads,
        dir=arguments.dir,
        model={**model, **parts, "lora": arguments.lora, "provider_options": arguments.provider_option},
        quiet=arguments.quiet,
    )


def batch(options: Options) -> None:
    """Make the pictures, and tell what became of them."""
    from fluxonnx.api import is_shipped
    from fluxonnx.batch.making import check_folder, located, make_pictures
    from fluxonnx.batch.painter import Painter
    from fluxonnx.batch.rows import read_rows
    from fluxonnx.batch.table import arrow
    from fluxonnx.runtime.fields import FIELD

    say = speaker(options.quiet)
    FIELD["seed"].check(options.seed)
    engine = _engine(options)
    model = find_model(options.dir, say)
    # Each machine of a cluster has a copy of the demo model of its own.
    everywhere = options.engine == "ray" and options.dir is None and is_shipped(model)
    settings = {name: _absolute(value) for name, value in options.model.items()}
    painter = Painter(
        None if everywhere else str(model.absolute()), **settings, threads=options.threads, format=options.format
    )
    if options.parquet:
        arrow()
    rows = read_rows(options.table, painter, options.seed, options.values, model)
    check_folder(options.output, rows)
    if options.engine == "local" and any(row.error is None for row in rows):
        _open(painter, options, say)
    start = time.perf_counter()

    def begin(summary: Summary) -> None:
        if summary.kept:
            say(f"{summary.kept} of {summary.rows} pictures are there")
        if summary.changed and not options.again:
            say(f"{summary.changed} rows have changed, or their pictures have: they are made again")

    def watch(row: Row, result: Mapping[str, Any]) -> None:
        if error := result.get("error"):
            say(located(row, error))
        else:
            warned = f"; warning: {result['warning']}" if result.get("warning") else ""
            say(f"{options.output / str(row.file)} ({result['seconds']:.1f} s, {result['worker']}{warned})")

    # Ray prints the logs of nodes that go away on standard output, which is for results.
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # noqa: PTH123
        summary = make_pictures(
            rows,
            options.output,
            painter,
            engine,
            again=options.again,
            parquet=options.parquet,
            begin=begin,
            watch=watch,
        )
    seconds = time.perf_counter() - start
    tables = " and ".join(map(str, summary.files))
    say(f"{summary.made} made, {summary.kept} were there, {summary.failed} failed ({seconds:.1f} s): {tables}")
    if summary.failed:
        raise FluxonnxError(
            f"{summary.failed} of {summary.rows} rows failed, {summary.files[0]} says why; the first: "
            f"{summary.first_error}"
        )


def _engine(options: Options) -> Engine:
    from fluxonnx.batch import cluster, local

    if options.engine == "local":
        if options.address is not None:
            raise UsageError("--address is where a cluster is: give it together with --engine ray")
        return local.engine(1 if options.workers is None else options.workers)
    if options.engine == "ray":
        return cluster.engine(options.address, options.workers, options.threads)
    raise UsageError(f"engine {options.engine[:40]!r} is unknown: choose one of {', '.join(ENGINES)}")


def _absolute(value: Any) -> Any:
    """Return a path as it is found from any folder."""
    return str(value.absolute()) if isinstance(value, Path) else value


def _open(painter: Painter, options: Options, say: Callable[[str], None]) -> None:
    """Open the model once here, which exports it where needed: what is wrong with it is wrong with all rows."""
    from fluxonnx.batch.painter import close

    painter.open(lambda root: say(f"Exporting {root} ..."), lambda choice: say(str(choice)))
    if (options.workers or 1) > 1:
        close()
