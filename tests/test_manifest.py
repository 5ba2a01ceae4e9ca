"""Which builds are current: by graph format, by the exporter's code in a checkout, and by the checkpoint."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest

import fluxonnx
from fluxonnx.checkpoint.digests import WHOLE, content_digest
from fluxonnx.checkpoint.manifest import FILE_NAME, is_current, read_manifest
from fluxonnx.checkpoint.safetensors import fingerprint
from fluxonnx.contract import COMPONENTS, GRAPH_FORMAT, Architecture, open_checkpoint
from fluxonnx.errors import CheckpointError
from fluxonnx.export import export
from fluxonnx.export.components import read_architecture
from tests.support import Case, aged

CASE = Case("odd-heads")


def change(root, edit) -> None:
    """Edit every component in fluxonnx.json."""
    values = json.loads((root / FILE_NAME).read_text())
    for build in values["builds"].values():
        for component in build["components"].values():
            edit(component)
    (root / FILE_NAME).write_text(json.dumps(values))


@pytest.fixture
def exported(copy_of):
    root = copy_of(CASE)
    export(root)
    return root


def current(root) -> list[str]:
    components = read_manifest(root).builds["bf16"].components
    return [name for name, component in components.items() if is_current(root, component, GRAPH_FORMAT)]


def test_version_of_the_package_does_not_matter(exported):
    change(exported, lambda component: component.update(exporter_version="99"))
    assert current(exported) == list(COMPONENTS)


def test_older_format_is_exported_anew(exported):
    aged(exported)
    assert current(exported) == []
    announced = []
    fluxonnx.load(exported, on_export=announced.append).close()
    assert announced == [exported]
    assert current(exported) == list(COMPONENTS)


def test_edited_exporter_is_noticed_in_a_checkout(exported):
    """The tests run from a checkout."""
    change(exported, lambda component: component.update(exporter_digest="0123456789abcdef"))
    assert current(exported) == []


def test_manifests_of_the_last_version_without_formats(exported):
    """They are read, and their graphs are those of format 1."""

    def as_before(component: dict) -> None:
        del component["graph_format"], component["exporter_digest"]
        component["exporter_version"] = "0.1.2"

    change(exported, as_before)
    components = read_manifest(exported).builds["bf16"].components.values()
    assert {component.graph_format for component in components} == {1}
    fluxonnx.load(exported).close()
    change(exported, lambda component: (as_before(component), component.update(exporter_version="0.1.1")))
    assert {c.graph_format for c in read_manifest(exported).builds["bf16"].components.values()} == {0}


def test_architecture_is_read_as_it_was_written(exported):
    sizes = read_architecture(open_checkpoint(exported), None)
    assert Architecture.from_json(read_manifest(exported).architecture, exported / FILE_NAME) == sizes


@pytest.mark.parametrize("value", [None, "many", 1.5, [1], True])
def test_damaged_architecture_is_named(exported, value):
    manifest = read_manifest(exported)
    manifest.architecture["transformer"]["heads"] = value
    with pytest.raises(CheckpointError, match=r"no usable .architecture. \(transformer\.heads.*--force"):
        Architecture.from_json(manifest.architecture, exported / FILE_NAME)


NASTY = [None, 5, -1.5, True, "text", [], {}, [[]], {"a": []}, "\0", "\ud800"]


@pytest.mark.slow
@pytest.mark.parametrize("value", NASTY, ids=repr)
def test_types_of_all_fields_are_checked(exported, value):
    """Whatever is in a field, the manifest is read or refused in one line."""
    text = (exported / FILE_NAME).read_text()

    def places(values: object) -> list[tuple]:
        items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
        return [(key, *rest) for key, item in items for rest in ((), *places(item)) if key != "architecture"]

    seen = set()
    for place in places(json.loads(text)):
        kind = tuple("*" if isinstance(key, int) or key in COMPONENTS else key for key in place)
        if kind in seen:
            continue
        seen.add(kind)
        values = json.loads(text)
        inside = values
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = value
        (exported / FILE_NAME).write_text(json.dumps(values))
        with suppress(CheckpointError):
            read_manifest(exported)


def test_fields_of_later_versions_are_left_out(exported):
    change(exported, lambda component: component.update(later="x"))
    assert current(exported) == list(COMPONENTS)


def test_manifests_without_digests(exported):
    """Those of the last version: their files are taken for what they are."""

    def as_before(component: dict) -> None:
        del component["files"], component["configs"], component["out_layers"], component["unfinished"]
        component["sources"] = {name: fingerprint(exported / name) for name in component["sources"]}

    change(exported, as_before)
    assert current(exported) == list(COMPONENTS)


def test_digest_of_a_large_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(8) + bytes(WHOLE))
    before = content_digest(path)
    with path.open("r+b") as file:
        file.seek(WHOLE // 2)
        file.write(b"x" * (WHOLE // 256))
    assert before.startswith("samples:")
    assert content_digest(path) != before
