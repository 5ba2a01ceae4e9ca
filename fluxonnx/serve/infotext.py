"""The parameters that AUTOMATIC1111's web UI writes into pictures, and the words of its prompts."""

from __future__ import annotations

import json
import re
from typing import Any

from fluxonnx.runtime.metadata import A1111_NAMES

# parse_generation_parameters, modules/infotext_utils.py, AUTOMATIC1111/stable-diffusion-webui
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
# <lora:name:0.8>, modules/extra_networks.py
LORA = re.compile(r"<lora:([^:<>]+)(?::([^<>:]*))?(?::[^<>]*)?>")
OUR_NAMES = {theirs: ours for ours, theirs in A1111_NAMES.items()}


def parse_infotext(text: str) -> dict[str, Any] | None:
    """Return what an infotext says, by the names of the API; None if it is no such text."""
    lines = text.strip().split("\n")
    facts = {key: _plain(value) for key, value in PAIR.findall(lines[-1])}
    if len(facts) < 3 or "Steps" not in facts:
        return None
    prompt: list[str] = []
    negative: list[str] = []
    is_negative = False
    for line in lines[:-1]:
        if line.startswith("Negative prompt:"):
            is_negative, line = True, line.removeprefix("Negative prompt:").strip()
        (negative if is_negative else prompt).append(line)
    found: dict[str, Any] = {"prompt": "\n".join(prompt)}
    if negative:
        found["negative_prompt"] = "\n".join(negative)
    for name, key in (("steps", "Steps"), ("seed", "Seed")):
        if facts.get(key, "").isdecimal() and len(facts[key]) <= 20:
            found[name] = int(facts[key])
    for name, key in (("guidance", "CFG scale"), ("strength", "Denoising strength")):
        try:
            found[name] = float(facts[key])
        except (KeyError, ValueError):
            continue
    for name, key in (("sampler", "Sampler"), ("schedule", "Schedule type")):
        if facts.get(key) in OUR_NAMES:
            found[name] = OUR_NAMES[facts[key]]
    if size := SIZE.fullmatch(facts.get("Size", "")):
        found["width"], found["height"] = int(size[1]), int(size[2])
    return found


def _plain(value: str) -> str:
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value.strip()


def split_loras(prompt: str) -> tuple[str, list[dict[str, Any]]]:
    """Return a prompt without its words for LoRA files, and these as the API names them.

    Raises:
        ValueError: A scale is no number.
    """
    found = [{"name": name, "scale": float(scale) if scale else 1.0} for name, scale in LORA.findall(prompt)]
    return LORA.sub("", prompt).strip() if found else prompt, found
