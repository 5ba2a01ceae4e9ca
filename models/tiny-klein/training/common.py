"""Shared by the training steps: configuration, command line, schedules, weight averages, checkpoints and logs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

HERE = Path(__file__).parent
# The repository root: model sizes, the tokenizer and the sigmas come from its packages.
sys.path.insert(0, str(HERE.parents[2]))

# Tokens along each side of a picture's token grid.
SIDE = 8
CONFIG: dict[str, Any] = json.loads(Path(os.environ.get("KLEIN_CONFIG", HERE / "config.json")).read_text("utf-8"))


def to_tensor(pictures: Iterable[np.ndarray]) -> torch.Tensor:
    """Stack pictures, uint8 [height, width, 3] each, into float32 [batch, 3, height, width] in [-1, 1]."""
    return torch.from_numpy(np.stack(list(pictures))).permute(0, 3, 1, 2).float() / 127.5 - 1


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Tokenize a prompt within its chat template, as fluxonnx and diffusers do."""
    from fluxonnx.contract import CHAT_TEMPLATE

    return list(tokenizer.encode(CHAT_TEMPLATE.format(prompt=prompt)).ids)


def parse_arguments(description: str, folder: str) -> argparse.Namespace:
    """Parse the arguments that all long training steps share. `folder` describes what WORK must contain."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("work", type=Path, help=folder)
    parser.add_argument("--until", metavar="HH:MM", help="stop at this time of day instead of after a number of steps")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint")
    return parser.parse_args()


class Budget:
    """Tracks the progress of a training run, which ends after a number of steps or at a time of day ("09:25")."""

    def __init__(self, steps: int, until: str | None):
        self.steps = steps
        self.end = None
        if until:
            clock = datetime.strptime(until, "%H:%M").time()
            self.end = datetime.combine(datetime.now().date(), clock).timestamp()
        self.calls, self.before, self.pace = 0, time.time(), 0.0

    def fraction(self, step: int) -> float:
        """Return the fraction of the run that is complete before this step. At 1 or more, the run is over."""
        if self.end is None:
            return step / self.steps
        now = time.time()
        took = now - self.before
        if self.calls > 20:  # a suspended process must not count as a slow step
            took = min(took, 3 * self.pace)
        if self.calls:
            self.pace += (took - self.pace) * max(0.02, 1 / self.calls)
        self.before, self.calls = now, self.calls + 1
        left = self.end - now
        return 1.0 if left <= 0 else step / (step + left / max(self.pace, 1e-3))


def learning_rate(step: int, fraction: float, peak: float, warmup: int) -> float:
    """Warm up linearly, hold until 30 % of the run, then decay linearly to 1 % of the peak."""
    late = max(0.0, (fraction - 0.3) / 0.7)
    return peak * min(1.0, (step + 1) / warmup) * (1 - 0.99 * min(late, 1.0))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all parameter groups, times the `scale` of a group if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("scale", 1.0)


class Average:
    """Exponential moving average of the weights of some modules."""

    def __init__(self, modules: dict[str, torch.nn.Module], decay: float):
        self.modules = modules
        self.decay = decay
        self.state = {k: {n: p.detach().clone() for n, p in m.state_dict().items()} for k, m in modules.items()}
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights. The decay is smaller during the first updates."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for key, module in self.modules.items():
            for name, value in module.state_dict().items():
                mean = self.state[key][name]
                if value.is_floating_point():
                    mean.lerp_(value, 1 - decay)
                else:
                    mean.copy_(value)


def save(state: Any, path: Path) -> None:
    """Write a checkpoint atomically."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


class Log:
    """Log of JSON lines in a file, also printed as plain text."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.started = time.monotonic()

    def write(self, **values: Any) -> None:
        """Write a line, with the `seconds` since the start added."""
        values["seconds"] = round(time.monotonic() - self.started, 1)
        values = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        print(" ".join(f"{k} {v}" for k, v in values.items()), flush=True)
