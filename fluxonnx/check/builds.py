"""Which builds a directory has, and whether each is current, whole, and opens in onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fluxonnx.check.findings import FAILED, OK, WARNING, Finding, one_line
from fluxonnx.checkpoint.manifest import (
    FILE_NAME,
    Build,
    Component,
    Manifest,
    are_as_recorded,
    changed_config,
    fault,
    is_current,
)
from fluxonnx.checkpoint.safetensors import read_header
from fluxonnx.contract import COMPONENTS, FOLDERS, GRAPH_FORMAT, OLDEST_RUNNABLE_FORMAT, Architecture
from fluxonnx.errors import FluxonnxError
from fluxonnx.machine import has_exact_int8_dot
from fluxonnx.runtime.engine import SessionOptions
from fluxonnx.runtime.session import Session, settings

SUBJECT = "builds"


def check(root: Path, manifest: Manifest | None) -> Iterator[Finding]:
    """Look at every build of a manifest; None stands for a directory from which nothing was exported yet."""
    if manifest is None or not manifest.builds:
        yield Finding(OK, SUBJECT, "none yet: the first picture exports one")
        return
    try:
        Architecture.from_json(manifest.architecture, root / FILE_NAME)
    except FluxonnxError as error:
        yield Finding(FAILED, SUBJECT, str(error))
    for name, build in manifest.builds.items():
        yield _check_build(root, manifest, name, build)


def _check_build(root: Path, manifest: Manifest, name: str, build: Build) -> Finding:
    failed: list[str] = []
    stale: list[str] = []
    lacking: list[str] = []
    opened: list[str] = []
    for part in FOLDERS:
        component = build.components.get(part)
        if component is None:
            if part in COMPONENTS:
                lacking.append(part)
            continue
        why, is_failure = _state(root, component, manifest.text_encoder_out_layers)
        if why:
            (failed if is_failure else stale).append(why)
        if is_failure:
            continue
        if component.graph_format < OLDEST_RUNNABLE_FORMAT or component.unfinished:
            continue
        try:
            _open(root, part, component, build)
            opened.append(part)
        except FluxonnxError as error:
            failed.append(one_line(str(error)))
    figures = {
        "build": name,
        "settings": build.settings,
        "exporter": sorted({component.exporter_version for component in build.components.values()}),
        "graphs": list(build.components),
        "opened": opened,
        "failed": failed,
        "stale": stale,
        "missing": lacking,
    }
    again = f"fluxonnx export -d {root} {build.flags}"
    if failed:
        text = f"{name}: {_listed(failed)}: if the checkpoint's files are right, make it again with {again} --force"
        return Finding(FAILED, SUBJECT, text, figures)
    if stale:
        text = f"{name}: {_listed(stale)}: the next run with it exports it again, if its source is there"
        return Finding(WARNING, SUBJECT, text, figures)
    if lacking:
        text = f"{name}: it lacks {', '.join(lacking)}: the next run with it, or {again}, adds what is missing"
        return Finding(WARNING, SUBJECT, text, figures)
    return Finding(OK, SUBJECT, f"{name}: current, whole, and all {len(opened)} graphs open", figures)


def _listed(reasons: list[str]) -> str:
    distinct = list(dict.fromkeys(reasons))
    return distinct[0] if len(distinct) == 1 else f"{distinct[0]} (and {len(distinct) - 1} more)"


def _state(root: Path, component: Component, out_layers: list[int] | None) -> tuple[str | None, bool]:
    """Return why a graph is not current, and whether it can't be what was exported; no reason if it is current."""
    if component.unfinished:
        return f"{component.graph} was not finished, an export was interrupted", False
    try:
        if found := fault(root, component):
            return found, True
        for name in component.weights:
            read_header(root / name)
        if config := changed_config(root, component, out_layers):
            return f"{config} has changed since the export", False
    except FluxonnxError as error:
        return str(error), True
    if component.graph_format != GRAPH_FORMAT:
        return f"{component.graph} is of format {component.graph_format}, this fluxonnx writes {GRAPH_FORMAT}", False
    if not are_as_recorded(root, component):
        return f"{component.graph} was made from other weights than those that are here now", False
    if not is_current(root, component, GRAPH_FORMAT, out_layers):
        return f"{component.graph} is of another exporter", False
    return None, False


def _open(root: Path, part: str, component: Component, build: Build) -> None:
    """Load a graph and close it.

    Nothing is rewritten and no weight is laid out anew, so that its weights stay mapped and take no memory.

    Raises:
        FluxonnxError: onnxruntime can't load it.
    """
    options = SessionOptions()
    usual = settings(part, build, options, has_exact_int8_dot())
    bare = replace(usual, optimise=False, config={**usual.config, "session.disable_prepacking": "1"})
    Session(root / component.graph, part, options, build, bare).close()
