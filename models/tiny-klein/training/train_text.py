"""Step 3: the text encoder learns to read: to answer what a prompt says, from the features the transformer will see.

python models/tiny-klein/training/train_text.py WORK

This takes no pictures and little time. Trained with the flow from the start, it would learn the same, but the
transformer would have nothing to go by until then. The linear layer that answers is thrown away.
"""

from __future__ import annotations

import argparse
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from common import CONFIG, parse, tokens_of
from flow import Flow, padded
from loop import Trainer
from parallel import together
from tasks import training_task
from text_labels import QUESTIONS, labels
from tokenizers import Tokenizer
from torch import Tensor, nn


def main() -> None:
    together(train, parse("teach the text encoder to read", "folder with the tokenizer"))


def train(rank: int, arguments: argparse.Namespace) -> None:
    """What one of the processes does."""
    config = CONFIG["text"]
    torch.manual_seed(CONFIG["seed"] + 2)
    tokenizer = Tokenizer.from_file(str(arguments.work / "tokenizer/tokenizer.json"))
    flow = Flow(tokenizer.get_vocab_size(), 4).train()
    encoder, reader = flow.text_encoder, Reader()
    matrices = [p for p in encoder.model.layers.parameters() if p.ndim == 2]
    known = set(matrices)
    others = [p for p in [*encoder.parameters(), *reader.parameters()] if p not in known]
    trainer = Trainer("text", arguments, config, {"encoder": encoder, "reader": reader}, matrices, others)
    random = Random(trainer.seed(12, rank))

    def lesson(step: int) -> tuple[Tensor, dict[str, float]]:
        tasks = [training_task(random, edits=0.3) for _ in range(config["batch"])]
        ids, mask = padded(tokenizer, [tokens_of(tokenizer, task.prompt) for task in tasks])
        loss, right = reader.loss(flow.encode(ids, mask), mask, torch.tensor([labels(task) for task in tasks]))
        return loss, {"loss": loss.item(), "right": right}

    trainer.run(rank, lesson)


class Reader(nn.Module):
    """Answers all questions about a prompt from the features of its last token."""

    def __init__(self) -> None:
        super().__init__()
        config = CONFIG["flow"]
        features = len(config["out_layers"]) * config["text_encoder"]["hidden"]
        self.norm = nn.LayerNorm(features)
        self.answer = nn.Linear(features, sum(QUESTIONS.values()))

    def loss(self, features: Tensor, mask: Tensor, answers: Tensor) -> tuple[Tensor, float]:
        """Cross-entropy, and the share of answers that are right.

        Args:
            features: float32 [batch, text_seq, features].
            mask: int64 [batch, text_seq].
            answers: int64 [batch, questions], -1: not asked.
        """
        last = features[torch.arange(len(mask)), mask.sum(1) - 1]
        total, right = features.new_zeros(()), 0
        for column, logits in enumerate(self.answer(self.norm(last)).split(list(QUESTIONS.values()), 1)):
            asked = answers[:, column]
            total = total + F.cross_entropy(logits, asked, ignore_index=-1, reduction="sum")
            right += int((logits.argmax(1) == asked).sum())
        return total / len(mask), right / int(np.maximum(1, int((answers >= 0).sum())))


if __name__ == "__main__":
    main()
