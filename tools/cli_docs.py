"""Write docs/cli.md, the reference of the command line, from the parser that the command line uses.

python tools/cli_docs.py
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator
from pathlib import Path

from fluxonnx.cli import build_parser
from fluxonnx.runtime.prompt_file import KEYS

PAGE = Path(__file__).parent.parent / "docs/cli.md"
WIDTH = 120

INTRODUCTION = """\
# The command line

<!-- `python tools/cli_docs.py` writes this page from the parser: edit the help texts there. -->

`fluxonnx COMMAND --help` prints the same. The exit code is 0, 1 for a failure, 2 for wrong usage, or 130 when
interrupted; an error is one line on standard error."""


def page() -> str:
    """Return the page as Markdown."""
    parts = [INTRODUCTION]
    for name, parser in commands(build_parser()).items():
        parts += describe(name, parser)
    parts += ["## Prompt files", prompt_files()]
    return "\n\n".join(parts) + "\n"


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the commands by name."""
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return subparsers.choices


def describe(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the paragraphs about a command."""
    yield f"## {name}"
    yield parser.description or ""
    yield f"```text\nusage: {parser.usage}\n```"
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if not actions:
            continue
        yield f"### {(group.title or '').capitalize()}"
        if group.description:
            yield fill(group.description)
        yield "\n".join(fill(f"- {spelling(action)}: {help_text(action)}", indent="  ") for action in actions)
    title, *examples = (parser.epilog or "").splitlines()
    yield f"### {title.rstrip(':').capitalize()}"
    yield "```bash\n" + "\n".join(line.strip() for line in examples) + "\n```"


def spelling(action: argparse.Action) -> str:
    """Write the flags of an argument and its value, as Markdown."""
    value = {None: "{0}", "?": "[{0}]", "+": "{0} [{0} ...]", 0: ""}[action.nargs].format(action.metavar)
    return ", ".join(f"`{f'{name} {value}'.strip()}`" for name in action.option_strings or [""])


def help_text(action: argparse.Action) -> str:
    """Return the help of an argument with its default filled in."""
    return (action.help or "") % vars(action)


def prompt_files() -> str:
    """Describe what a line of a prompt file can hold."""
    names = [f"`{name}`" for name in KEYS if name != "prompt"]
    return fill(
        "A line of a `--prompt-file` is a prompt, or a JSON object with a `prompt` and any of "
        f"{', '.join(names[:-1])} and {names[-1]}. Flags override these values, except `output`."
    )


def fill(text: str, indent: str = "") -> str:
    """Wrap a paragraph."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
