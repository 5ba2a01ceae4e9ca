"""Whether weights look like those of a trained model: no damaged values, and not like random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median

from fluxonnx.check.findings import FAILED, OK, SKIPPED, WARNING, Finding
from fluxonnx.check.statistics import Statistics, measure
from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.safetensors import Tensor
from fluxonnx.contract import COMPONENT_CLASSES, EMBEDDING_TABLE
from fluxonnx.errors import CheckpointError

SUBJECT = "weights"
PARTS = tuple(COMPONENT_CLASSES)

# No weight of a trained model is so large; a flipped exponent makes one of up to 1e38.
LARGEST = 1e6
# A value this many times as large as what all but a hundredth of a matrix stay below is rare, though not impossible.
OUTLIER = 200
# Spread of a matrix that is not random. Measured: at most 1.23 for random matrices of 16 rows and more; above 1.4 in 47
# of 49, 52 of 54 and 16 of 29 matrices of the bundled model's transformer, autoencoder and (briefly trained) encoder.
STRUCTURED = 1.4
# Weights look random if fewer matrices than this share are structured.
FEW = 0.05
# The standard deviations of the layers of a kind (all to_q, for example) lie within this factor of their median.
UNUSUAL_STD = 50


@dataclass
class Looked:
    """What was seen of a component's weights."""

    part: str
    values: int = 0
    read: int = 0
    matrices: dict[str, Statistics] = field(default_factory=dict)
    gains: dict[str, Statistics] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)

    @property
    def structured(self) -> int:
        """Matrices whose rows or columns differ more than those of random numbers."""
        return sum(found.spread > STRUCTURED for found in self.telling)

    @property
    def telling(self) -> list[Statistics]:
        """Matrices that are large enough to tell."""
        return [found for found in self.matrices.values() if found.spread > 0]

    @property
    def looks_random(self) -> bool:
        """Whether the weights look like random numbers."""
        return bool(self.telling) and self.structured < FEW * len(self.telling)


def check(
    checkpoint: Checkpoint, part: str, whole: bool, progress: Callable[[str, int, int], None] | None = None
) -> Iterator[Finding]:
    """Measure the weights of a part.

    Args:
        checkpoint: The model directory.
        part: One of `PARTS`.
        whole: Read every value, instead of rows that are spread over each tensor.
        progress: Called with the part, the bytes of its tensors that were looked at, and of all of its tensors.
    """
    if not checkpoint.has_weights(part):
        yield Finding(SKIPPED, SUBJECT, f"{part}: there are none")
        return
    try:
        tensors = checkpoint.tensors(part)
    except CheckpointError:
        yield Finding(SKIPPED, SUBJECT, f"{part}: its files are not whole, see above")
        return
    yield from verdict(look(part, tensors, whole, progress))


def look(
    part: str,
    tensors: dict[str, Tensor],
    whole: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Looked:
    """Measure the tensors of a part, one after the other."""
    looked = Looked(part)
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        found = measure(tensor, whole)
        if found is None:
            continue
        looked.values += found.values
        looked.read += found.read
        done += tensor.nbytes
        if progress is not None:
            progress(f"check {part}", done, total)
        if fault := _fault(found, len(tensor.shape)):
            looked.damaged.append(f"{name} {fault}")
        elif oddity := _oddity(name, found, len(tensor.shape)):
            looked.odd.append(f"{name} {oddity}")
        if len(tensor.shape) > 1:
            looked.matrices[name] = found
        elif name.endswith(".weight"):
            looked.gains[name] = found
    looked.odd += _unusual(looked.matrices)
    return looked


def _fault(found: Statistics, dimensions: int) -> str | None:
    """Return what no weights of a trained model have."""
    if found.not_finite:
        return f"holds {found.not_finite} values that are NaN or infinite"
    if found.largest > LARGEST:
        return f"holds a value of {found.largest:.2g}"
    if dimensions > 1 and found.constant:
        return "is all zero" if found.largest == 0 else f"has one value ({found.largest:.2g}) throughout"
    return None


def _oddity(name: str, found: Statistics, dimensions: int) -> str | None:
    """Return what is rare in weights of a trained model."""
    if dimensions < 2:
        return None
    # a table of embeddings may have rows that no token uses
    if found.zero_rows and name != EMBEDDING_TABLE:
        return f"has {found.zero_rows} rows that are all zero"
    if found.usual and found.largest > OUTLIER * found.usual:
        return f"holds a value of {found.largest:.2g}, where 99 % of the values are below {found.usual:.2g}"
    return None


def _unusual(matrices: dict[str, Statistics]) -> list[str]:
    """Return the matrices whose spread of values is far from that of the same layer in other blocks."""
    kinds: dict[str, dict[str, float]] = {}
    for name, found in matrices.items():
        kind = ".".join("N" if word.isdecimal() else word for word in name.split("."))
        kinds.setdefault(kind, {})[name] = found.std
    unusual = []
    for layers in kinds.values():
        usual = median(layers.values())
        for name, std in layers.items():
            if std and usual and not 1 / UNUSUAL_STD < std / usual < UNUSUAL_STD:
                unusual.append(f"{name} has a standard deviation of {std:.2g}, where that of its kind is {usual:.2g}")
    return unusual


def verdict(looked: Looked) -> Iterator[Finding]:
    """Say what the weights of a part look like."""
    part, telling = looked.part, looked.telling
    sampled = (
        f"all {_count(looked.values)} values"
        if looked.read == looked.values
        else f"{_count(looked.read)} of {_count(looked.values)} values, in rows spread over each tensor; --full for all"
    )
    stds = [found.std for found in looked.matrices.values()] or [0.0]
    kurtosis = median(found.kurtosis for found in telling) if telling else 0.0
    figures = {
        "part": part,
        "values": looked.values,
        "values_read": looked.read,
        "matrices": len(telling),
        "structured_matrices": looked.structured,
        "median_kurtosis": round(kurtosis, 3),
        "smallest_std": min(stds),
        "largest_std": max(stds),
        "damaged": looked.damaged[:100],
        "odd": looked.odd[:100],
        "looks_random": looked.looks_random,
    }
    if looked.damaged:
        text = f"{part}: {_first(looked.damaged)}: the file is damaged, download it again ({sampled})"
        yield Finding(FAILED, SUBJECT, text, figures)
    elif looked.looks_random:
        same = sum(found.constant for found in looked.gains.values())
        gains = f", and {same} of {len(looked.gains)} norms have one gain throughout" if same else ""
        yield Finding(
            WARNING,
            SUBJECT,
            f"{part}: these look like random weights: in {len(telling) - looked.structured} of {len(telling)} matrices "
            f"rows and columns differ no more than by chance, kurtosis {kurtosis:.2f}{gains}: get a trained model "
            f"({sampled})",
            figures,
        )
    elif looked.odd:
        text = f"{part}: {_first(looked.odd)}: if pictures are wrong, download it again ({sampled})"
        yield Finding(WARNING, SUBJECT, text, figures)
    else:
        structure = f", {looked.structured} of {len(telling)} matrices with structure" if telling else ""
        yield Finding(
            OK,
            SUBJECT,
            f"{part}: finite, standard deviations of {min(stds):.2g} to {max(stds):.2g}, kurtosis {kurtosis:.2f}"
            f"{structure} ({sampled})",
            figures,
        )


def _first(lines: list[str]) -> str:
    return lines[0] if len(lines) == 1 else f"{lines[0]}, and {len(lines) - 1} more like it"


def _count(values: int) -> str:
    return f"{values / 1e6:,.0f} million" if values >= 10_000_000 else f"{values:,}"
