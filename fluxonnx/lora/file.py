"""A LoRA file: its tensors by layers of the model.

The kinds of files are told by the ends of their keys:

    LAYER.lora_A.weight, .lora_B.weight; .lora_down, .lora_up; .lora.down, .lora.up     low rank; PEFT, kohya, diffusers
    LAYER.hada_w1_a, _w1_b, _w2_a, _w2_b                                                LoHa, LyCORIS
    LAYER.lokr_w1 or _w1_a, _w1_b, LAYER.lokr_w2 or _w2_a, _w2_b (and _t2)              LoKr, LyCORIS
    LAYER.alpha                                                                         scale = alpha / rank
    LAYER.dora_scale, LAYER.lora_magnitude_vector                                       DoRA

Without an alpha in the file the scale is that of PEFT's settings (`lora_alpha`, `use_rslora`), which are in
adapter_config.json or, by diffusers, in the header; else 1 (`get_peft_kwargs`, diffusers utils/peft_utils.py).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fluxonnx.checkpoint.reading import parse_json, read_bounded, shown
from fluxonnx.checkpoint.safetensors import Tensor, read_header, read_metadata
from fluxonnx.errors import CheckpointError
from fluxonnx.lora.deltas import Change, Delta, Hadamard, Kronecker, LowRank, rows_of
from fluxonnx.lora.names import Layers, Target

LOW_RANK = re.compile(
    r"(?P<layer>.+?)[._](?:lora_|lora\.|lora_linear_layer\.)(?P<side>A|B|down|up|mid)(?:\.(?!weight$)\w+)?(?:\.weight)?$"
)
OTHERS = re.compile(
    r"(?P<layer>.+)\.(?P<kind>alpha|dora_scale|lora_magnitude_vector|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?"
    r"|lokr_t2)(?:\.\w+)*$"
)
SIDES = {"A": "down", "B": "up"}
# Tensors that scale others, and are no layer of their own.
HELPERS = {"alpha", "dora_scale", "lora_magnitude_vector"}
CONFIG = "adapter_config.json"
# More than a factor of any layer has: it is computed before it is known whether it fits.
MOST_VALUES = 1 << 26
# Layers that messages name.
NAMED = 3
# The weights of a layer, float32 [out, in], by component and path.
Weights = Callable[[str, str], np.ndarray]
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Lora:
    """A LoRA that fits a model.

    Attributes:
        file: The file.
        sha256: Of its content.
        changes: What it does to each layer, by component and path.
        unused: Keys of the file that mean nothing in this model.
    """

    file: Path
    sha256: str
    changes: Mapping[str, Mapping[str, Change]]
    unused: tuple[str, ...]

    @property
    def about_unused(self) -> str | None:
        """One line about what is not used; None if everything is."""
        if not self.unused:
            return None
        some = ", ".join(self.unused[:NAMED]) + (", ..." if len(self.unused) > NAMED else "")
        count = len(self.unused)
        return f"{count} tensor{'s' * (count > 1)} of {self.file} mean nothing in this model, and are not used: {some}"


def read_lora(path: Path, layers: Layers, model: str, weights: Weights) -> Lora:
    """Read a LoRA file for a model; matrices stay mapped.

    Args:
        path: The file.
        layers: The layers of the model.
        model: The model's name, for messages.
        weights: Returns the weights of a layer; only files with DoRA ask for them.

    Raises:
        CheckpointError: It can't be read, is no LoRA, is one of another model, or holds values that are not finite.
    """
    tensors = read_header(path)
    groups, unused = _groups(tensors)
    if not any(parts.keys() - HELPERS for parts in groups.values()):
        some = ", ".join(list(tensors)[:NAMED])
        raise CheckpointError(f"{path} is no LoRA: none of its {len(tensors)} tensors is a part of one ({some})")
    scale_of = _peft_scale(path)
    changes: dict[str, dict[str, Change]] = {}
    wrong = None
    for name, parts in groups.items():
        target = layers.find(name)
        if target is None or not (found := _delta(parts)):
            unused += [tensor.name for tensor in parts.values()]
            continue
        delta, shape = found
        if shape != target.shape:
            wrong = wrong or (name, shape, target)
            continue
        _check_finite(path, parts)
        if "alpha" not in parts and isinstance(delta, LowRank):
            delta = replace(delta, scale=scale_of(target.places[0].path, len(delta.down)))
        gain = _gain(path, name, parts, delta, target, weights)
        for place in target.places:
            own = gain if gain is None or gain.shape[0] == 1 else rows_of(gain, place.rows)
            known = changes.setdefault(place.component, {})
            if place.path in known:
                raise CheckpointError(f"{path} changes {place.path} twice, by two names: download it again")
            known[place.path] = Change(delta.of_rows(place.rows), own)
    if wrong:
        name, shape, target = wrong
        raise CheckpointError(
            f"{path} is a LoRA of another model: its {name} changes a layer {list(shape)}, which in {model} is "
            f"{list(target.shape)}"
        )
    if not changes:
        raise CheckpointError(
            f"{path} is a LoRA of another model: {model} has none of its {len(groups)} layers "
            f"({', '.join(list(groups)[:NAMED])})"
        )
    return Lora(path, digest(path), changes, tuple(unused))


def digest(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        CheckpointError: It can't be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None


def _groups(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Parts], list[str]]:
    """Return the tensors of each layer by their kinds, and the keys that are of no kind."""
    groups: dict[str, Parts] = {}
    unused = []
    for key, tensor in tensors.items():
        if match := LOW_RANK.match(key):
            kind = SIDES.get(match["side"], match["side"])
        elif match := OTHERS.match(key):
            kind = match["kind"]
        else:
            unused.append(key)
            continue
        parts = groups.setdefault(match["layer"], {})
        if kind in parts:
            raise CheckpointError(
                f"{tensor.file}: {parts[kind].name} and {key} are the same matrix of one layer: the file holds several "
                "adapters, save them one by one"
            )
        parts[kind] = tensor
    return groups, unused


def _delta(parts: Parts) -> tuple[Delta, tuple[int, int]] | None:
    """Return what the tensors of a layer add to its weight, and the shape [out, in] of that; None for no matrix.

    Raises:
        CheckpointError: A matrix is missing, or two do not fit together.
    """
    if {"down", "up"} & parts.keys() and "mid" not in parts:
        down, up = _matrices(parts, "down", "up")
        return LowRank(down, up, _scale(parts, len(down))), (len(up), down.shape[1])
    if any(kind.startswith("hada_w") for kind in parts) and not {"hada_t1", "hada_t2"} & parts.keys():
        up, down, other_up, other_down = _matrices(parts, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        shape = len(up), down.shape[1]
        if (len(other_up), other_down.shape[1]) != shape:
            raise _do_not_fit(parts["hada_w1_a"], parts["hada_w2_a"])
        return Hadamard(down, up, other_down, other_up, _scale(parts, len(down))), shape
    if any(kind.startswith("lokr_w") for kind in parts):
        left, left_rank = _factor(parts, "lokr_w1")
        right, right_rank = _factor(parts, "lokr_w2")
        rank = right_rank or left_rank  # two whole factors have no alpha (LokrModule, lycoris/modules/lokr.py)
        shape = len(left) * len(right), left.shape[1] * right.shape[1]
        return Kronecker(left, right, _scale(parts, rank) if rank else 1.0, ((0, shape[0]),)), shape
    return None


def _matrices(parts: Parts, *kinds: str) -> list[np.ndarray]:
    """Return matrices of a layer; each second one reads what the one before it writes."""
    known = next(iter(parts.values()))
    for kind in kinds:
        if kind not in parts:
            raise CheckpointError(f"{known.file}: {known.name} lacks its counterpart ({kind}): download it again")
    found = [_matrix(parts[kind]) for kind in kinds]
    for i in range(0, len(found), 2):
        first, second = found[i : i + 2]
        if (first.shape[0] if kinds[0] == "down" else first.shape[1]) != second.shape[1 if kinds[0] == "down" else 0]:
            raise _do_not_fit(parts[kinds[i]], parts[kinds[i + 1]])
    return found


def _factor(parts: Parts, kind: str) -> tuple[np.ndarray, int]:
    """Return a factor of a Kronecker product, and its rank; 0 for a whole one."""
    if kind in parts:
        return _matrix(parts[kind]), 0
    if "lokr_t2" in parts and kind == "lokr_w2":
        # rebuild_tucker, lycoris/functional/general.py; the core of a linear layer has no kernel
        core = _matrix(parts["lokr_t2"]).astype(np.float32)
        for side in (f"{kind}_a", f"{kind}_b"):
            if side not in parts:
                raise CheckpointError(
                    f"{parts['lokr_t2'].file}: {parts['lokr_t2'].name} lacks its counterpart ({side})"
                )
        up, down = (_matrix(parts[side]).astype(np.float32) for side in (f"{kind}_a", f"{kind}_b"))
        if (len(up), len(down)) != core.shape:
            raise _do_not_fit(parts["lokr_t2"], parts[f"{kind}_a"])
        _check_size(parts[f"{kind}_a"], up.shape[1] * down.shape[1])
        return up.T @ core @ down, len(down)
    up, down = _matrices(parts, f"{kind}_a", f"{kind}_b")
    _check_size(parts[f"{kind}_a"], len(up) * down.shape[1])
    return up.astype(np.float32) @ down.astype(np.float32), len(down)


def _check_size(tensor: Tensor, count: int) -> None:
    if count > MOST_VALUES:
        raise CheckpointError(f"{tensor.file}: {tensor.name} is a factor of {count} values: download it again")


def _matrix(tensor: Tensor) -> np.ndarray:
    """Map a matrix; kernels of one pixel are matrices, too."""
    if tensor.dtype not in ("F32", "F16", "BF16", "F64"):
        raise CheckpointError(f"{tensor.file}: {tensor.name} is {shown(tensor.dtype)}, expected F32, F16 or BF16")
    shape = tensor.shape
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 2 or not all(shape):
        raise CheckpointError(f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, expected a matrix")
    array = tensor.array().reshape(shape)
    return array.astype(np.float32) if tensor.dtype == "F64" else array


def _do_not_fit(first: Tensor, second: Tensor) -> CheckpointError:
    return CheckpointError(
        f"{first.file}: {first.name} {list(first.shape)} and {second.name} {list(second.shape)} do not fit together: "
        "download it again"
    )


def _scale(parts: Parts, rank: int) -> float:
    """Return alpha / rank; 1 without an alpha."""
    alpha = parts.get("alpha")
    if alpha is None:
        return 1.0
    if math.prod(alpha.shape) != 1:
        raise CheckpointError(f"{alpha.file}: {alpha.name} has shape {list(alpha.shape)}, expected one number")
    value = float(alpha.array().reshape(-1)[0])
    if not math.isfinite(value):
        raise CheckpointError(f"{alpha.file}: {alpha.name} is {value}: download it again")
    return value / rank


def _check_finite(path: Path, parts: Parts) -> None:
    for tensor in parts.values():
        if not np.isfinite(tensor.array()).all():
            raise CheckpointError(f"{path}: {tensor.name} holds infinities or NaNs: download it again")


def _gain(path: Path, name: str, parts: Parts, delta: Delta, target: Target, weights: Weights) -> np.ndarray | None:
    """Return the gain of a DoRA: its magnitudes by the lengths of rows, or of columns, of the changed weight.

    Source: `DoraLinearLayer` of peft/tuners/lora/dora.py; `apply_weight_decompose` of lycoris/modules/locon.py, which
    also has magnitudes of columns [1, in].
    """
    tensor = parts.get("lora_magnitude_vector") or parts.get("dora_scale")
    if tensor is None:
        return None
    n_out, n_in = target.shape
    if tensor.shape in ((n_out,), (n_out, 1)):
        axis, shape = 1, (n_out, 1)
    elif tensor.shape == (1, n_in):
        axis, shape = 0, (1, n_in)
    else:
        raise CheckpointError(
            f"{path}: {tensor.name} has shape {list(tensor.shape)}, expected [{n_out}, 1] or [1, {n_in}]"
        )
    weight = np.empty(target.shape, np.float32)
    for place in target.places:
        layer, start = weights(place.component, place.path), 0
        for first, end in place.rows:
            weight[first:end] = layer[start : start + end - first]
            start += end - first
    weight += delta.whole()
    lengths = np.maximum(np.linalg.norm(weight, axis=axis, keepdims=True), np.finfo(np.float32).eps)
    return tensor.array().astype(np.float32).reshape(shape) / lengths


def _peft_scale(path: Path) -> Callable[[str, int], float]:
    """Return the scale of a layer without an alpha of its own, by PEFT's settings: from its path and its rank."""
    config = _peft_settings(path)
    if not config:
        return lambda layer, rank: 1.0

    def scale(layer: str, rank: int) -> float:
        patterns = config.get("alpha_pattern") or {}
        alpha = next(
            (value for key, value in patterns.items() if re.match(rf"(.*\.)?{re.escape(key)}$", layer)),
            config.get("lora_alpha", rank),
        )
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale


def _peft_settings(path: Path) -> dict[str, Any]:
    """Return the settings in the header, or in the file that PEFT writes beside its adapter_model.safetensors.

    Raises:
        CheckpointError: They are malformed.
    """
    text: str | bytes | None = read_metadata(path).get("lora_adapter_metadata")
    where = f"{path}: the header's lora_adapter_metadata"
    if text is None and (path.parent / CONFIG).is_file() and path.name.startswith("adapter_model"):
        where = str(path.parent / CONFIG)
        try:
            text = read_bounded(path.parent / CONFIG)
        except OSError as error:
            raise CheckpointError(f"{where} can't be read: {error.strerror or error}") from None
    if text is None:
        return {}
    try:
        values = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON ({error}): download it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} is no JSON object: download it again")
    found = {key.removeprefix("transformer."): value for key, value in values.items()}
    patterns = found.get("alpha_pattern") or {}
    numbers = [found.get("lora_alpha", 1), *(patterns.values() if isinstance(patterns, dict) else [None])]
    if any(isinstance(n, bool) or not isinstance(n, (int, float)) or not math.isfinite(n) for n in numbers):
        raise CheckpointError(f"{where} has a lora_alpha or alpha_pattern that is no number: download it again")
    return found
