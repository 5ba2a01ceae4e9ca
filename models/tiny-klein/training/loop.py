"""The loop of all trainings: two optimisers, rates that rise and fall, an average of the weights, logs, checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from common import CONFIG, Average, Budget, Log, learning_rate, save, set_learning_rate
from mixed import bfloat16
from muon import Muon
from parallel import mean
from torch import Tensor, nn

# What a step returns: the loss, and what of it is worth a line in the log.
Lesson = Callable[[int], tuple[Tensor, dict[str, float]]]


class Trainer:
    """Some modules in training.

    Attributes:
        modules: by the names that their weights and averages have in the checkpoint, WORK/NAME.pt.
        step: how many steps are done.
        warm: at which step the optimisers were made.
    """

    def __init__(
        self,
        name: str,
        arguments: argparse.Namespace,
        config: dict[str, Any],
        modules: dict[str, nn.Module],
        matrices: Iterable[Any],
        others: Iterable[Any],
    ):
        """Start anew, or with --resume from the checkpoint.

        Args:
            name: of the checkpoint and the log.
            arguments: what `common.parse` returned.
            config: steps, learning_rate, matrix_learning_rate, warmup, average, and whether to use bfloat16.
            modules: see above.
            matrices: parameters, or groups of them with a `scale`, for Muon.
            others: those for AdamW.
        """
        self.name, self.arguments, self.config, self.modules = name, arguments, config, modules
        self.path = arguments.work / f"{name}.pt"
        self.muon = Muon(list(matrices))
        self.adam = torch.optim.AdamW(list(others), betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.average = Average(modules, config["average"])
        self.step = self.warm = 0
        if arguments.resume:
            saved = torch.load(self.path)
            for key, module in modules.items():
                module.load_state_dict(saved["weights"][key])
            self.average.state, self.step, self.warm = saved["average"], saved["step"], saved["warm"]
            self.average.steps = self.step - self.warm
            if "muon" in saved:  # a model that was taken apart has no optimisers
                self.muon.load_state_dict(saved["muon"])
                self.adam.load_state_dict(saved["adam"])

    def seed(self, number: int, rank: int) -> int:
        """Seed what is random in torch, another way for each training, process and resumed step; return the seed."""
        seed = CONFIG["seed"] + number + self.step + 100_000_000 * rank
        torch.manual_seed(seed)
        return seed

    def run(self, rank: int, lesson: Lesson) -> None:
        """Take steps until the number of them is reached, or the time of day."""
        config, optimizers = self.config, (self.muon, self.adam)
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        budget = Budget(config["steps"], self.arguments.until)
        log = Log(self.arguments.work / f"{self.name}.jsonl")
        half = config.get("bfloat16", False)
        means: dict[str, float] = {}
        while (fraction := mean(budget.fraction(self.step))) < 1:
            since = self.step - self.warm
            for optimizer, rate in zip(optimizers, ("matrix_learning_rate", "learning_rate"), strict=True):
                set_learning_rate(optimizer, learning_rate(since, fraction, config[rate], config["warmup"]))
                optimizer.zero_grad()
            with bfloat16(half):
                loss, values = lesson(self.step)
            loss.backward()
            mean(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            with bfloat16(half):
                for optimizer in optimizers:
                    optimizer.step()
            self.average.update()
            self.step += 1
            for key, value in values.items():
                means[key] = means.get(key, value) * 0.97 + 0.03 * value
            if rank == 0 and self.step % 25 == 0:
                log.write(step=self.step, **means)
            if rank == 0 and self.step % 100 == 0:
                self.save()
        if rank == 0:
            self.save()

    def save(self) -> None:
        """Write all that is needed to go on."""
        state = {
            "weights": {key: module.state_dict() for key, module in self.modules.items()},
            "average": self.average.state,
            "step": self.step,
            "warm": self.warm,
        }
        save({**state, "muon": self.muon.state_dict(), "adam": self.adam.state_dict()}, self.path)
