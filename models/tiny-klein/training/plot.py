"""Step 7: plot the training curves, and thin out the logs for the repository.

python models/tiny-klein/training/plot.py WORK OUT
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw

# The log and the value of each panel.
PANELS = (
    ("vae", "psnr"),
    ("text", "right"),
    ("flow", "pictures"),
    ("flow", "edits"),
    ("flow", "references seen"),
    ("flow", "edits planned"),
    ("flow", "reading"),
    ("student", "pictures"),
    ("student", "edits"),
    ("decoder", "psnr_generated"),
)
WIDTH, HEIGHT, MARGIN = 300, 200, 34
COLUMNS = 5
# A log is thinned to at most this many lines, plus its last one.
KEPT = 150


def main() -> None:
    parser = argparse.ArgumentParser(description="plot the training curves")
    parser.add_argument("work", type=Path, help="folder with the logs")
    parser.add_argument("output", type=Path, help="folder for the thinned logs and curves.png")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    logs = {}
    for name in dict.fromkeys(name for name, _ in PANELS):
        path = arguments.work / f"{name}.jsonl"
        if path.exists():
            lines = path.read_text("utf-8").splitlines()
            logs[name] = lines[:: -(-len(lines) // KEPT)] + lines[-1:]
            (arguments.output / f"{name}.jsonl").write_text("\n".join(dict.fromkeys(logs[name])) + "\n", "utf-8")
    sheet = Image.new("RGB", (COLUMNS * WIDTH, -(-len(PANELS) // COLUMNS) * HEIGHT), "white")
    for i, (name, value) in enumerate(PANELS):
        entries = [json.loads(line) for line in logs.get(name, [])]
        points = [(entry["step"], entry[value]) for entry in entries if value in entry]
        if len(points) > 1:
            sheet.paste(panel(f"{name}: {value}", points), (i % COLUMNS * WIDTH, i // COLUMNS * HEIGHT))
    sheet.save(arguments.output / "curves.png")


def panel(title: str, points: list[tuple[float, float]]) -> Image.Image:
    """Draw one curve over the steps. The highest 3 % of the values are clipped, mostly outliers at the start."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    steps, values = zip(*points, strict=True)
    low, high = min(values), sorted(values)[int(0.97 * (len(values) - 1))]
    high = high if high > low else low + 1
    across, down = (WIDTH - 2 * MARGIN) / max(steps), (HEIGHT - 2 * MARGIN) / (high - low)
    line = [(MARGIN + x * across, HEIGHT - MARGIN - (min(y, high) - low) * down) for x, y in points]
    pen.rectangle((MARGIN, MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN), outline="silver")
    pen.line(line, fill="navy", width=2)
    pen.text((MARGIN, 12), title, fill="black", font_size=12)
    pen.text((2, MARGIN - 6), f"{high:.3g}", fill="black", font_size=10)
    pen.text((2, HEIGHT - MARGIN - 6), f"{low:.3g}", fill="black", font_size=10)
    pen.text((WIDTH - MARGIN - 24, HEIGHT - MARGIN + 6), f"{max(steps)}", fill="black", font_size=10)
    return image


if __name__ == "__main__":
    main()
