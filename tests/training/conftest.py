"""The training scripts import each other by their plain names, as a script's folder is where Python looks first."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "models/tiny-klein/training"))
