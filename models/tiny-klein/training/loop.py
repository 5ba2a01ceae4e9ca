"""The training loop of all steps: two optimisers, learning rate schedules, weight averaging, logs and checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from common import CONFIG, Average, Budget, Log, learning_rate, save, set_learning_rate
from mixed import bfloat16
from muon import Muon
from parallel import all_reduce_mean
from torch import Tensor, nn

# Takes the number of a step; returns its loss and the metrics for the log.
LossStep = Callable[[int], tuple[Tensor, dict[str, float]]]


class Trainer:
    """Trains modules, with one optimiser for matrices and one for all other parameters.

    Attributes:
        modules: the trained modules, by the names of their weights in the checkpoint, WORK/NAME.pt.
        step: number of completed steps.
        warmup_start: step at which the optimisers were created, from which the learning rates warm up.
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
        """Start from scratch, or from the checkpoint with --resume.

        Args:
            name: name of the checkpoint and of the log.
            arguments: result of `common.parse_arguments`.
            config: steps, learning_rate, matrix_learning_rate, warmup, average, and optionally bfloat16.
            modules: see the attribute.
            matrices: parameters, or parameter groups with a `scale`, for Muon.
            others: the same for AdamW.
        """
        self.name, self.arguments, self.config, self.modules = name, arguments, config, modules
        self.path = arguments.work / f"{name}.pt"
        self.muon = Muon(list(matrices))
        self.adam = torch.optim.AdamW(list(others), betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.average = Average(modules, config["average"])
        self.step = self.warmup_start = 0
        if arguments.resume:
            saved = torch.load(self.path)
            for key, module in modules.items():
                module.load_state_dict(saved["weights"][key])
            self.average.state, self.step, self.warmup_start = saved["average"], saved["step"], saved["warm"]
            self.average.steps = self.step - self.warmup_start
            if "muon" in saved:  # checkpoints of to_checkpoints.py have no optimiser state
                self.muon.load_state_dict(saved["muon"])
                self.adam.load_state_dict(saved["adam"])

    def seed(self, number: int, rank: int) -> int:
        """Seed torch differently for each training step, process and resumed step number, and return the seed."""
        seed = CONFIG["seed"] + number + self.step + 100_000_000 * rank
        torch.manual_seed(seed)
        return seed

    def run(self, rank: int, loss_step: LossStep) -> None:
        """Train until the configured number of steps, or the time of day, is reached."""
        config, optimizers = self.config, (self.muon, self.adam)
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        budget = Budget(config["steps"], self.arguments.until)
        log = Log(self.arguments.work / f"{self.name}.jsonl")
        half = config.get("bfloat16", False)
        means: dict[str, float] = {}
        while (fraction := all_reduce_mean(budget.fraction(self.step))) < 1:
            since = self.step - self.warmup_start
            for optimizer, rate in zip(optimizers, ("matrix_learning_rate", "learning_rate"), strict=True):
                set_learning_rate(optimizer, learning_rate(since, fraction, config[rate], config["warmup"]))
                optimizer.zero_grad()
            with bfloat16(half):
                loss, values = loss_step(self.step)
            loss.backward()
            all_reduce_mean(parameters)
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
        """Write a checkpoint with all the state that --resume needs."""
        state = {
            "weights": {key: module.state_dict() for key, module in self.modules.items()},
            "average": self.average.state,
            "step": self.step,
            "warm": self.warmup_start,
        }
        save({**state, "muon": self.muon.state_dict(), "adam": self.adam.state_dict()}, self.path)
