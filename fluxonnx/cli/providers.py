"""`fluxonnx providers`: which providers are installed here, which compute right, and what adds the others."""

from __future__ import annotations

import argparse

from fluxonnx.cli.flags import add_parser
from fluxonnx.cli.messages import complain, show


def add_command(subparsers: argparse._SubParsersAction) -> None:
    """Describe the command and its flags."""
    parser = add_parser(
        subparsers,
        "providers",
        run,
        "tell which providers are installed here, which compute right, and which command adds the others",
        "[--json]",
        "fluxonnx providers",
        "fluxonnx providers --json > providers.json",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command with its parsed arguments."""
    return providers(arguments.json)


def providers(as_json: bool) -> int:
    """Try the providers that are installed and print what is found.

    Returns:
        The exit code: 1 if the CPU's own provider does not work, or one computes wrong.
    """
    from fluxonnx.check import providers as doctor

    here, results = doctor.surroundings(), []
    if not as_json:
        show(doctor.describe(here) + "\n")
    for found in doctor.examine():
        results.append(found)
        if not as_json:
            show(doctor.line(found))
    show(doctor.to_text(here, results) if as_json else f"\n{doctor.closing(results)}")
    bad = [
        found
        for found in results
        if found.state == doctor.WRONG or (found.provider == "cpu" and found.state != doctor.WORKS)
    ]
    for found in bad:
        complain(
            f"provider {found.provider} {found.state}: {found.text}; update its driver and package, or do not use it"
        )
    return 1 if bad else 0
