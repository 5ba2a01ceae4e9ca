"""Whether the files of a checkpoint are there and whole, fit the configs, and are those that builds were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fluxonnx import api
from fluxonnx.check.findings import FAILED, OK, SKIPPED, WARNING, Finding
from fluxonnx.checkpoint.config import Config
from fluxonnx.checkpoint.digests import content_digest
from fluxonnx.checkpoint.directory import Checkpoint, weight_files
from fluxonnx.checkpoint.manifest import Manifest
from fluxonnx.checkpoint.reading import exists, is_file
from fluxonnx.checkpoint.safetensors import Tensor, fingerprint
from fluxonnx.contract import COMPONENT_CLASSES, COMPONENTS, Architecture, open_checkpoint
from fluxonnx.errors import CheckpointError

SUBJECT = "files"


class WithoutIndex(Checkpoint):
    """A model directory whose model_index.json can't be read: its parts can be looked at all the same."""

    def __init__(self, root: Path) -> None:
        """Take the directory as it is."""
        self.root, self.parts = root, {}
        self.index = Config(root / "model_index.json", {})


def open_any(root: Path) -> tuple[Checkpoint, Finding]:
    """Open a directory, whatever state it is in; the finding is about its model_index.json.

    Raises:
        CheckpointError: There is no such directory.
    """
    try:
        checkpoint = open_checkpoint(root)
        kind = "distilled: a few steps, no guidance" if checkpoint.is_distilled else "not distilled: a base model"
        return checkpoint, Finding(OK, SUBJECT, f"model_index.json: {checkpoint.index.values['_class_name']}, {kind}")
    except CheckpointError as error:
        if not root.is_dir():
            raise
        return WithoutIndex(root), Finding(FAILED, SUBJECT, str(error))


def components(checkpoint: Checkpoint, manifest: Manifest | None) -> Iterator[Finding]:
    """Read the headers of a checkpoint's weight files: shards complete, sizes right, no bytes too many or shared."""
    for part in COMPONENT_CLASSES:
        if not checkpoint.has_weights(part) and _is_self_contained(manifest, part):
            yield Finding(SKIPPED, SUBJECT, f"{part}: no weights but those of the builds, which is how copies are made")
            continue
        try:
            tensors = checkpoint.tensors(part)
            files = weight_files(checkpoint.root / part)[1]
        except CheckpointError as error:
            yield Finding(FAILED, SUBJECT, str(error))
            continue
        size = sum(file.stat().st_size for file in files)
        several = f"{len(files)} files" if len(files) > 1 else files[0].name
        kinds = ", ".join(sorted({getattr(tensor, "form", tensor.dtype) for tensor in tensors.values()}))
        yield Finding(
            OK,
            SUBJECT,
            f"{part}: {several}, {len(tensors)} tensors ({kinds}), {_bytes(size)}; headers and sizes agree",
            {"part": part, "files": [file.name for file in files], "tensors": len(tensors), "bytes": size},
        )


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def _is_self_contained(manifest: Manifest | None, part: str) -> bool:
    """Whether a build has the graphs of a part with all of their weights."""
    graphs = [graph for graph, folder in COMPONENTS.items() if folder == part and graph != "conditioning"]
    return any(
        all(graph in build.components and build.components[graph].self_contained for graph in graphs)
        for build in (manifest.builds.values() if manifest else ())
    )


def fit(checkpoint: Checkpoint, sizes: Architecture) -> Iterator[Finding]:
    """Compare the names and shapes of all tensors with what the config files describe, as an export does."""
    from fluxonnx.export.components import build_graph, make_target
    from fluxonnx.export.weights import check_places, weight_file

    parts: dict[str, dict[str, Tensor]] = {}
    for part in COMPONENT_CLASSES:
        with suppress(CheckpointError):  # which `components` has told of
            parts[part] = checkpoint.tensors(part)
    if not parts:
        yield Finding(SKIPPED, SUBJECT, "weights and configs: there are no weights to compare")
        return
    target = make_target(api.default_precision(checkpoint) if "transformer" in parts else "bf16", "ort", None)
    wrong, link = set(), None
    for graph, part in COMPONENTS.items():
        if part not in parts or graph == "conditioning":
            continue
        try:
            built = build_graph(graph, sizes, target, parts[part], {"model": checkpoint.name})
        except CheckpointError as error:
            if part not in wrong:
                yield Finding(FAILED, SUBJECT, str(error))
            wrong.add(part)
            continue
        try:
            check_places(built, checkpoint.root, weight_file(graph, part, target.precision.name))
        except CheckpointError as error:
            link = link or str(error)
    if right := [part for part in parts if part not in wrong]:
        yield Finding(OK, SUBJECT, f"{', '.join(right)}: the tensors are those that config.json describes")
    if link:
        yield Finding(WARNING, SUBJECT, link)


def fingerprints(checkpoint: Checkpoint, manifest: Manifest) -> Iterator[Finding]:
    """Compare the checkpoint's weight files with what builds were made from."""
    recorded: dict[str, dict[str, list[str]]] = {}
    for name, build in manifest.builds.items():
        for component in build.components.values():
            for file, digest in component.sources.items():
                builds = recorded.setdefault(file, {}).setdefault(digest, [])
                if name not in builds:
                    builds.append(name)
    same = 0
    for file, digests in recorded.items():
        path = checkpoint.root / file
        if not exists(path):  # a self-contained build does not need it; of others, the builds are not whole
            continue
        if not is_file(path):
            yield Finding(FAILED, SUBJECT, f"{path} is not a regular file: download it again")
            continue
        others = [name for digest, names in digests.items() if _digest(path, digest) != digest for name in names]
        if others:
            yield Finding(
                FAILED,
                SUBJECT,
                f"{file} is not the file that {_these(others)} made from: if you have not replaced it, download it "
                "again; a run with that build then exports it again",
            )
        else:
            same += 1
    if same:
        what = f"{same} weight files are those" if same > 1 else "the weight file is that"
        yield Finding(OK, SUBJECT, f"{what} that {_these(manifest.builds)} made from")


def _digest(path: Path, like: str) -> str:
    # the first versions recorded fingerprints, which have no prefix
    return content_digest(path) if ":" in like else fingerprint(path)


def _these(builds: list[str] | dict) -> str:
    return f"the builds {', '.join(builds)} were" if len(builds) > 1 else f"the build {', '.join(builds)} was"


def short_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Return eight hexadecimal digits for each part, which are the same wherever a directory has the same files.

    They are of `content_digest`, so of samples where a file is large. Parts that can't be read are left out.
    """
    found = {}
    for part in (*COMPONENT_CLASSES, "tokenizer"):
        try:
            folder = checkpoint.root / part
            files = [folder / "tokenizer.json"] if part == "tokenizer" else weight_files(folder)[1]
            digests = [content_digest(file) for file in files]
        except CheckpointError:
            continue
        found[part] = hashlib.sha256("\n".join(digests).encode()).hexdigest()[:8]
    return found
