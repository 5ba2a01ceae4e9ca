"""Step 3: pretrain the text encoder to classify the content of prompts, from the features the transformer will get.

python models/tiny-klein/training/train_text.py WORK

This needs no pictures and little time. Trained only with the flow, the text encoder would learn the same, but until
then its features would be of no use to the transformer. The linear classification layer is discarded afterwards.
"""

from __future__ import annotations

import argparse
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from common import CONFIG, parse_arguments, prompt_tokens
from flow import Flow, pad_prompts
from loop import Trainer
from parallel import run_processes
from tasks import training_task
from text_labels import QUESTIONS, labels
from tokenizers import Tokenizer
from torch import Tensor, nn


def main() -> None:
    run_processes(train, parse_arguments("pretrain the text encoder", "folder with the tokenizer"))


def train(rank: int, arguments: argparse.Namespace) -> None:
    """Train in one of the processes."""
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

    def loss_step(step: int) -> tuple[Tensor, dict[str, float]]:
        tasks = [training_task(random, edits=0.3) for _ in range(config["batch"])]
        ids, mask = pad_prompts(tokenizer, [prompt_tokens(tokenizer, task.prompt) for task in tasks])
        loss, accuracy = reader.loss(flow.encode(ids, mask), mask, torch.tensor([labels(task) for task in tasks]))
        return loss, {"loss": loss.item(), "right": accuracy}

    trainer.run(rank, loss_step)


class Reader(nn.Module):
    """Classifies a prompt, for all questions, from the features of its last token."""

    def __init__(self) -> None:
        super().__init__()
        config = CONFIG["flow"]
        features = len(config["out_layers"]) * config["text_encoder"]["hidden"]
        self.norm = nn.LayerNorm(features)
        self.answer = nn.Linear(features, sum(QUESTIONS.values()))

    def loss(self, features: Tensor, mask: Tensor, answers: Tensor) -> tuple[Tensor, float]:
        """Return the cross-entropy and the accuracy.

        Args:
            features: float32 [batch, text_seq, features].
            mask: int64 [batch, text_seq].
            answers: labels, int64 [batch, questions]; -1 is ignored.
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
