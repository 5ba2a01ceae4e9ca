"""Pictures in iTerm2 and terminals that understand its sequence: WezTerm, mintty, and others.

Source: https://iterm2.com/documentation-images.html.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def sequence(image: Image.Image, columns: int, rows: int) -> str:
    """Return what shows a picture at the cursor, scaled to so many characters; the cursor is elsewhere afterwards."""
    file = io.BytesIO()
    image.save(file, "PNG")
    data = file.getvalue()
    options = f"inline=1;size={len(data)};width={columns};height={rows};preserveAspectRatio=0"
    return f"\x1b]1337;File={options}:{base64.b64encode(data).decode('ascii')}\x07"
