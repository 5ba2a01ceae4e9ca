"""What can be known about all jobs of a run before anything is exported or drawn."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from fluxonnx.checkpoint.directory import Checkpoint
from fluxonnx.checkpoint.manifest import FILE_NAME, Manifest, read_manifest
from fluxonnx.cli.jobs import Job, located
from fluxonnx.contract import Architecture
from fluxonnx.errors import UsageError
from fluxonnx.runtime.known_tokens import KnownTokens, open_tokenizer
from fluxonnx.runtime.request import DEFAULTS, resolve
from fluxonnx.runtime.text import Tokenizer


def check_jobs(jobs: Sequence[Job], checkpoint: Checkpoint, cache_dir: Path | None) -> Tokenizer | KnownTokens:
    """Check every request, every prompt and the folders that a run needs.

    Returns:
        The tokenizer. A model that is opened while somebody holds it need not parse it again.

    Raises:
        UsageError: A value of a job is impossible, two jobs would write one file, or the cache can't be used.
        CheckpointError: A part of the model that the check needs is missing or damaged.
    """
    if cache_dir is not None:
        _check_cache(cache_dir)
    tokenizer = open_tokenizer(checkpoint.root / "tokenizer", cache_dir)
    manifest = read_manifest(checkpoint.root)
    multiple = _sizes(checkpoint, manifest).vae.scale_factor
    defaults = {**DEFAULTS, **(manifest.defaults if manifest else {})}
    outputs: dict[str, Job] = {}
    for job in jobs:
        with located(job.where), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run will warn
            request = resolve(job.request, checkpoint.is_distilled, multiple, defaults)
            for prompt in (request.prompt, request.negative_prompt):
                tokenizer.encode(prompt, request.max_sequence_length)
            if not job.numbered:
                other = outputs.setdefault(os.path.realpath(job.output), job)
                if other is not job:
                    raise UsageError(f"{job.output} would overwrite that of {other.where}: choose another output")
    return tokenizer


def _sizes(checkpoint: Checkpoint, manifest: Manifest | None) -> Architecture:
    if manifest and manifest.architecture:
        return Architecture.from_json(manifest.architecture, checkpoint.root / FILE_NAME)
    # Nothing is exported yet: the exporter, which takes a second to import, will be needed anyway.
    from fluxonnx.export.components import read_architecture

    layers = manifest.text_encoder_out_layers if manifest else None
    return read_architecture(checkpoint, tuple(layers) if layers else None)


def _check_cache(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it can't be the name of a folder"
        raise UsageError(f"cache directory {folder} can't be used: {reason}: choose another") from None
