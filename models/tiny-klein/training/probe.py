"""Linear probes: an auxiliary loss that makes the transformer's tokens identify the things that they show.

The probes classify tokens inside the transformer: those of the references by the thing that is there, those of the
noisy picture by the thing that will be drawn. They are discarded after training. The idea of an auxiliary loss on
hidden states is from Yu et al., Representation Alignment for Generation, 2024. They align the states with another
network's features; here the labels are known.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from common import CONFIG, SIDE
from scenes import COLOURS, SHAPES, SIZE, SIZES, TEXTURES, Scene
from text_labels import classes_of_background, classes_of_thing
from torch import Tensor, nn

# Side of a token in pixels, and the largest labelled offset of a thing's centre, in half tokens.
PATCH, FAR = SIZE // SIDE, 4
# The questions and their numbers of classes. "first" and "second" are the colours of the background; all others except
# "thing" are asked only where there is a thing.
QUESTIONS = {
    "thing": 2,
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "texture": len(TEXTURES),
    "size": len(SIZES),
    "x": 2 * FAR + 1,
    "y": 2 * FAR + 1,
    "first": len(COLOURS),
    "second": len(COLOURS) + 1,
}


def token_labels(scene: Scene) -> np.ndarray:
    """Return the label of each token for each question: int8 [64, questions], -1 where there is none."""
    middles = (np.arange(SIDE) + 0.5) * PATCH
    y, x = (axis.ravel() for axis in np.meshgrid(middles, middles, indexing="ij"))
    answers = np.full((SIDE * SIDE, len(QUESTIONS)), -1, np.int8)
    answers[:, 0] = 0
    nearest = np.full(SIDE * SIDE, np.inf)
    for thing in scene.things:
        dx, dy = thing.x - x, thing.y - y
        # Distance from the edge of the thing to that of the token. An overlap of less than two pixels is ignored.
        away = np.maximum(abs(dx), abs(dy)) - 1.12 * thing.r - PATCH / 2 + 2
        here = (away < 0) & (away < nearest)
        nearest[here] = away[here]
        answers[here, 0] = 1
        answers[here, 1:5] = list(classes_of_thing(thing).values())
        for column, offset in ((5, dx), (6, dy)):
            answers[here, column] = np.clip(np.round(offset[here] / (PATCH / 2)), -FAR, FAR) + FAR
    answers[:, 7:] = list(classes_of_background(scene.background).values())
    return answers


class Probe(nn.Module):
    """Classifies image tokens after one of the transformer's single blocks."""

    def __init__(self, transformer: nn.Module, block: int):
        super().__init__()
        self.norm = nn.LayerNorm(transformer.inner_dim)
        self.answer = nn.Linear(transformer.inner_dim, sum(QUESTIONS.values()))
        transformer.single_transformer_blocks[block].register_forward_hook(self.keep)

    def keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        """Keep the output of the block, text tokens first: float32 [batch, seq, width]."""
        self.states = output

    def loss(self, tokens: slice, answers: Tensor) -> tuple[Tensor, float]:
        """Return the cross-entropy, and the accuracy for shape, colour and texture.

        Args:
            tokens: range of the last forward pass's tokens (text, picture, references) that are classified.
            answers: labels, int64 [batch, tokens, questions]; -1 is ignored.
        """
        logits = self.answer(self.norm(self.states[:, tokens])).flatten(0, 1).split(list(QUESTIONS.values()), 1)
        total, right, count = self.states.new_zeros(()), 0, 0
        for column, (question, values) in enumerate(zip(QUESTIONS, logits, strict=True)):
            asked = answers[..., column].flatten()
            number = int((asked >= 0).sum())
            total = total + F.cross_entropy(values, asked, ignore_index=-1, reduction="sum") / max(number, 1)
            if question in ("shape", "colour", "texture"):
                right, count = right + int((values.argmax(1) == asked).sum()), count + number
        return total, right / max(count, 1)


def make_probes(transformer: nn.Module) -> nn.ModuleDict:
    """Create the probes of the target's and of the references' tokens, each after the block that the config names."""
    after = CONFIG["flow"]["sight_after"]
    return nn.ModuleDict({part: Probe(transformer, block) for part, block in after.items()})
