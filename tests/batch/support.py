"""What the tests of batches share: rows, engines without a model, and painters whose workers die."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fluxonnx.batch.painter import Painter
from fluxonnx.batch.rows import Row, read_rows


def table(folder: Path, *rows: Mapping[str, Any] | str, name: str = "prompts.jsonl") -> Path:
    """A table of prompts with these lines."""
    path = folder / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def plan(folder: Path, *rows: Mapping[str, Any] | str, **options: Any) -> list[Row]:
    """The rows of such a table."""
    return read_rows(table(folder, *rows), options.pop("painter", Painter()), **options)


def drawn(values: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a row: a picture whose pixels are made of its seed and its prompt."""
    buffer = io.BytesIO()
    seed = hashlib.sha256(f"{values['seed']} {values['prompt']}".encode()).digest()
    Image.new("RGB", (8, 8), tuple(seed[:3])).save(buffer, "PNG")
    data = buffer.getvalue()
    return {
        "row": values["row"],
        "picture": data,
        "sha256": hashlib.sha256(data).hexdigest(),
        "seed": values["seed"],
        "seconds": 0.5,
        "worker": "host:1",
        "error": None,
        "warning": None,
        "parameters": json.dumps({"prompt": values["prompt"], "seed": values["seed"]}),
    }


class Engine:
    """An engine without a model, which remembers what it was asked for; prompts with "bad" fail."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, painter: Painter, rows: Sequence[Mapping[str, Any]]) -> Generator[Mapping[str, Any], None, None]:
        for values in rows:
            self.asked.append(values["row"])
            if "bad" in values["prompt"]:
                yield {"row": values["row"], "error": "it is bad"}
            else:
                yield drawn(values)


@dataclass(frozen=True)
class Mortal(Painter):
    """A painter without a model, whose process is killed, or ends, by what prompts say; `folder` is its memory."""

    def paint(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        for values in rows:
            mark = Path(str(self.folder), str(values["row"]))
            if values["prompt"] == "kill" or (values["prompt"] == "kill once" and not mark.exists()):
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if values["prompt"] == "exit":
                os._exit(3)
            print("not a result")
            yield {**drawn(values), "worker": f"{os.getpid()} {self.threads}"}
