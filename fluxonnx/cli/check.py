"""`fluxonnx check`: examine a model directory."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from fluxonnx.cli.flags import add_model, add_parser, add_quiet, find_model, typed
from fluxonnx.cli.messages import complain, show
from fluxonnx.cli.progress import Progress, speaker
from fluxonnx.errors import FluxonnxError

# The value of --json that stands for standard output.
STANDARD_OUTPUT = "-"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags of the command, by the names of their long forms."""

    dir: str | None
    picture: bool | None
    precision: list[str]
    full: bool
    json: str | None
    quiet: bool


def add_command(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command and its flags."""
    parser = add_parser(
        subparsers,
        "check",
        run,
        "examine a model directory: files, tokenizer, weights, builds, and the pictures it draws",
        "[-d DIR] [--no-picture] [--precision NAME ...] [options]",
        "fluxonnx check -d model",
        "fluxonnx check -d model --precision int8 int4 --json report.json",
    )
    add_model(parser)
    parser.add_argument(
        "--picture",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="draw the pictures that are known of the released FLUX.2-klein-4B and compare them; graphs are exported "
        "if there are none (default: on a model of that kind)",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="also draw the pictures with these builds, and compare them with those of bf16",
    )
    parser.add_argument("--full", action="store_true", help="read every weight, not a sample of each tensor")
    parser.add_argument(
        "--json",
        nargs="?",
        const=STANDARD_OUTPUT,
        metavar="FILE",
        help="write all figures to this file; without a name, print them in place of the report",
    )
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its parsed arguments."""
    return check(typed(Options, arguments))


def check(options: Options) -> int:
    """Examine a model directory, print what is found, and write JSON if asked to.

    Returns:
        The exit code: 1 if anything failed.
    """
    from fluxonnx.check import report as reports
    from fluxonnx.check.findings import FAILED, Finding
    from fluxonnx.files import describe_os_error
    from fluxonnx.runtime.outputs import check_output, write_output

    say = speaker(options.quiet)
    model = find_model(options.dir, say)
    to_file = Path(options.json) if options.json not in (None, STANDARD_OUTPUT) else None
    if to_file is not None:
        check_output(to_file, "--json")
    plan = reports.Plan(model, options.picture, tuple(options.precision), options.full)
    listed = not options.quiet and options.json != STANDARD_OUTPUT
    with Progress(options.quiet) as bar:

        def found(finding: Finding) -> None:
            bar.close()
            if listed:
                show(reports.line(finding))
            elif options.quiet and finding.state == FAILED:
                complain(f"{finding.subject}: {finding.text}")

        report = reports.run(plan, found, say, bar.bytes)
    if to_file is not None:
        try:
            write_output(to_file, (reports.to_text(report) + "\n").encode())
        except OSError as error:
            raise FluxonnxError(describe_os_error(error, to_file, "choose another with --json")) from None
    if report.failed and not options.quiet:  # before the summary, which is what a person copies from the end
        complain(f"{reports.outcome(report)}: the findings say what to do")
    if options.json == STANDARD_OUTPUT:
        show(reports.to_text(report))
    elif listed:
        show(reports.summary(report))
    return 1 if report.failed else 0
