"""Warnings that name the line of the program which asked for a picture, however deep inside they arise."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

PACKAGE = str(Path(__file__).parent.parent)


def warn(message: str) -> None:
    """Warn at the nearest caller outside the package.

    Python 3.12 has `skip_file_prefixes` for this.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
