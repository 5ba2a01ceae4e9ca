"""Makes the training scripts importable by the plain names under which they import each other."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "models/tiny-klein/training"))
