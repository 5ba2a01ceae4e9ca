"""What a check found: a state and one line. Whatever a check raises is a finding, too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fluxonnx.errors import FluxonnxError

OK = "ok"
WARNING = "warning"
FAILED = "failed"
SKIPPED = "skipped"
STATES = (FAILED, WARNING, SKIPPED, OK)

# The characters of a line, which may quote names that a stranger chose.
LONGEST = 1000


@dataclass(frozen=True)
class Finding:
    """One line of a report.

    Attributes:
        state: One of `STATES`.
        subject: What was looked at: "files", "tokenizer", "weights", ...
        text: What was found and, unless it is good, what to do about it.
        figures: What was measured, for the JSON.
    """

    state: str
    subject: str
    text: str
    figures: dict[str, Any] = field(default_factory=dict)


def examined(subject: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check; an error ends it and is its last finding.

    Args:
        subject: The subject of that finding.
        check: Returns or yields findings.
    """
    try:
        yield from check()
    except FluxonnxError as error:
        yield Finding(FAILED, subject, one_line(str(error)))
    except MemoryError:
        yield Finding(FAILED, subject, "there is not enough memory for this check: close other programs")
    except OSError as error:
        what = f"{error.filename} " if error.filename else ""
        yield Finding(FAILED, subject, one_line(f"{what}can't be read: {error.strerror or error}"))
    except Exception as error:  # no file may end the whole examination
        reason = f"{type(error).__name__}: {error}"
        yield Finding(FAILED, subject, one_line(f"this check failed itself, please report it: {reason}"))


def one_line(text: str) -> str:
    """Join the lines of a text, and leave out the middle of a long one."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
