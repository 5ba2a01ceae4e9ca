"""Step 3: the text encoder learns to read: to answer what a prompt says, from the features the transformer will see.

python models/tiny-klein/training/train_text.py WORK

This takes no pictures and little time. Trained with the flow from the start, it would learn the same, but the
transformer would have nothing to go by until then. The linear layer that answers is thrown away.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from common import CONFIG, Budget, Log, learning_rate, save, set_learning_rate, tokens_of
from flow import Flow, padded
from muon import Muon
from tasks import training_task
from text_labels import QUESTIONS, labels
from tokenizers import Tokenizer
from torch import Tensor, nn


def main() -> None:
    parser = argparse.ArgumentParser(description="teach the text encoder to read")
    parser.add_argument("work", type=Path, help="folder with the tokenizer")
    parser.add_argument("--until", metavar="HH:MM", help="end at this time, whatever the number of steps")
    arguments = parser.parse_args()
    work, config = arguments.work, CONFIG["text"]
    torch.manual_seed(CONFIG["seed"] + 2)
    random = Random(CONFIG["seed"] + 12)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer/tokenizer.json"))
    flow = Flow(tokenizer.get_vocab_size(), 4).train()
    encoder, reader = flow.text_encoder, Reader()
    matrices = [p for n, p in encoder.model.layers.named_parameters() if p.ndim == 2]
    known = set(matrices)
    others = [p for p in [*encoder.parameters(), *reader.parameters()] if p not in known]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.97), weight_decay=0.0, fused=True)
    log = Log(work / "text.jsonl")
    step, marks = 0, 0.0
    budget = Budget(config["steps"], arguments.until)
    while (fraction := budget.fraction(step)) < 1:
        set_learning_rate(muon, learning_rate(step, fraction, config["matrix_learning_rate"]))
        set_learning_rate(adam, learning_rate(step, fraction, config["learning_rate"]))
        tasks = [training_task(random, edits=0.3) for _ in range(config["batch"])]
        ids, mask = padded(tokenizer, [tokens_of(tokenizer, task.prompt) for task in tasks])
        loss, share = reader.loss(flow.encode(ids, mask), mask, torch.tensor([labels(task) for task in tasks]))
        muon.zero_grad()
        adam.zero_grad()
        loss.backward()
        muon.step()
        adam.step()
        marks += (share - marks) * (0.05 if step else 1)
        step += 1
        if step % 25 == 0:
            log.write(step=step, loss=loss.item(), right=marks)
        if step % 100 == 0:
            save({"encoder": encoder.state_dict(), "reader": reader.state_dict()}, work / "text.pt")
    save({"encoder": encoder.state_dict(), "reader": reader.state_dict()}, work / "text.pt")


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
