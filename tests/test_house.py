"""The house: imports run one way, no circle, exporter and runtime do not see each other, no torch inside."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fluxonnx"

# Each room may import from those behind it. `auto`, `machine` and the version belong to no layer but the lowest they
# are used in.
LAYERS = [
    "cli",
    ("serve", "batch", "terminal"),
    "check",
    "measure",
    "api",
    "auto",
    ("export", "runtime"),
    ("openblas", "lora"),
    "ports",
    "contract",
    "checkpoint",
    "files",
    "errors",
]
# Inside export: exporter -> models -> ops -> precisions -> panels -> primitives -> graph.
EXPORT_LAYERS = [
    "exporter",
    "record",
    "copying",
    "parts",
    "weights",
    "links",
    "components",
    ("transformer", "text_encoder", "vae", "conditioning"),
    "ops",
    "precisions",
    "panels",
    "primitives",
    "graph",
    "folding",
    "balance",
    "initializers",
]
LEAVES = {"errors", "version", "machine"}
MOST_LINES = 420


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; a package is the name of its folder."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports anywhere: in functions and for types only, too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside in MODULES else node.module)
    return {module for module in found if module in MODULES and module != name}


# The package's own file imports for its users (lazily) what nothing inside imports from it.
GRAPH = {name: imports(name) for name in MODULES if name != "fluxonnx"}


def room(name: str, depth: int) -> str:
    parts = name.split(".")
    return parts[depth] if len(parts) > depth else parts[-1]


def rank(layers: list, name: str) -> int | None:
    for i, layer in enumerate(layers):
        if name in ((layer,) if isinstance(layer, str) else layer):
            return i
    return None


def test_nothing_imports_the_package_itself():
    assert [name for name, seen in GRAPH.items() if "fluxonnx" in seen and name != "fluxonnx.__main__"] == []


def test_no_circle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(GRAPH.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_arrows_run_one_way(name):
    for other in GRAPH[name]:
        here, there = room(name, 1), room(other, 1)
        if here == there:
            if here == "export" and room(name, 2) != room(other, 2) and name != "fluxonnx.export":
                ours, theirs = (rank(EXPORT_LAYERS, room(n, 2)) for n in (name, other))
                assert ours is not None, f"{name} has no place in EXPORT_LAYERS"
                assert theirs is not None, f"{other} has no place in EXPORT_LAYERS"
                assert ours < theirs, f"{name} imports {other}"
            continue
        if there in LEAVES or here == "__main__":
            continue
        ours, theirs = rank(LAYERS, here), rank(LAYERS, there)
        assert ours is not None, f"{here} has no place in LAYERS"
        assert theirs is not None, f"{there} has no place in LAYERS"
        assert ours < theirs, f"{name} imports {other}"


def test_exporter_and_runtime_do_not_know_each_other():
    for name, seen in GRAPH.items():
        if room(name, 1) == "export":
            assert not [other for other in seen if room(other, 1) == "runtime"], name
        if room(name, 1) == "runtime":
            assert not [other for other in seen if room(other, 1) == "export"], name


def test_torch_stays_outside():
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("torch", "diffusers", "transformers")], path


@pytest.mark.parametrize("word", ["panel", "piece", "unit", "band", "precision", "flavour", "fused"])
def test_model_files_speak_the_models_words(word):
    """No layout, no precision and no flavour in the files that describe the models."""
    for name in ("transformer", "text_encoder", "vae", "conditioning"):
        tree = ast.parse((PACKAGE / f"export/{name}.py").read_text("utf-8"))
        words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        words |= {node.arg for node in ast.walk(tree) if isinstance(node, (ast.arg, ast.keyword)) and node.arg}
        assert not [found for found in words if word in found.lower().split("_") or f"{word}s" in found.lower()], name


def test_files_are_small():
    for folder in ("fluxonnx", "tools", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text("utf-8").splitlines())
            assert lines <= MOST_LINES, f"{path.relative_to(ROOT)} has {lines} lines"


def test_no_test_file_imports_another():
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tests"):
                names = {node.module.split(".")[-1], *(alias.name for alias in node.names)}
                assert not [name for name in names if name.startswith("test_")], path
