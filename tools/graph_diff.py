"""How two exported ONNX graphs differ in structure, whatever their nodes and values are called.

    python tools/graph_diff.py OLD.onnx NEW.onnx [--all]
    python tools/graph_diff.py OLD_DIR NEW_DIR [--all]

Lines of nodes start with `-` (only in the old graph), `+` (only in the new graph) or `~` (in both, but an input comes
from elsewhere). Nodes downstream of a change are matched, so a change is reported only where it was made. Another order
of the same nodes is printed, because onnxruntime's schedule depends on it, but it is not a difference. Exit status: 0
for the same structure, 1 for a difference, 2 for an error.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from posixpath import commonpath
from typing import NamedTuple

from onnx import ModelProto

sys.path.insert(0, str(Path(__file__).parent.parent))

from tools.graph_match import Graph, Matching, Value, Weight, read_graph

MAX_GROUPS, MAX_LINES = 20, 16  # what is printed without --all
WIDTH = 60  # of a metadata value
IGNORED_METADATA = ("version",)
# A member of a module list. The list's name is a plural: `transformer_blocks.3`, but not `to_out.0`.
MEMBER = re.compile(r"(\w+s)\.(\d+)")


class Rewire(NamedTuple):
    """An input of a matched pair of nodes that comes from elsewhere; `old` or `new` may be removed or added nodes."""

    old_node: int
    new_node: int
    position: int
    old: Value
    new: Value


class Replaced(NamedTuple):
    """A weight of a matched pair of nodes that was replaced or moved."""

    name: str
    old: Weight
    new: Weight


@dataclass(frozen=True)
class Diff:
    """What differs between two graphs, apart from names."""

    matching: Matching
    removed: list[int]
    added: list[int]
    rewired: list[Rewire]
    replaced: list[Replaced]
    lost: dict[str, Weight]
    gained: dict[str, Weight]
    interface: list[str]

    @property
    def size(self) -> int:
        """How much there is to report; 0 for graphs of the same structure."""
        parts = (self.removed, self.added, self.rewired, self.replaced, self.lost, self.gained, self.interface)
        return sum(len(part) for part in parts)

    def is_free(self, side: int, value: Value) -> bool:
        """Tell if a value comes from a removed (side 0) or an added (side 1) node."""
        pairs = (self.matching.forth, self.matching.back)[side]
        return value.kind == "node" and value.key not in pairs


def compare(old: Graph, new: Graph) -> Diff:
    """Return what differs; of three ways to identify weights, the one that leaves the least to report."""
    best = difference(Matching(old, new, weights_by="place"))
    if best.size > len(best.interface):
        others = (difference(Matching(old, new, weights_by)) for weights_by in ("name", "shape"))
        best = min((best, *others), key=lambda found: found.size)
    return best


def difference(matching: Matching) -> Diff:
    """Collect what does not correspond in two graphs."""
    old, new = matching.old, matching.new
    rewired: list[Rewire] = []
    replaced: dict[tuple[str, str], Replaced] = {}
    for a, b in sorted(matching.forth.items()):
        mine, theirs = old.nodes[a], new.nodes[b]
        for position, (x, y) in enumerate(zip(mine.inputs, theirs.inputs, strict=True)):
            if not matching.same(x, y):
                rewired.append(Rewire(a, b, position, x, y))
            elif x.kind == "weight" and x.key != y.key:
                names = mine.input_names[position], theirs.input_names[position]
                replaced[names] = Replaced(names[1], x.key, y.key)
    kept = set(old.weights.values()) & set(new.weights.values())
    kept |= {item for item in (*old.weights.values(), *new.weights.values()) if item.is_small}
    known = {name for name, _ in replaced}, {name for _, name in replaced}
    lost = {name: item for name, item in old.weights.items() if item not in kept and name not in known[0]}
    gained = {name: item for name, item in new.weights.items() if item not in kept and name not in known[1]}
    for name in [name for name in lost if name in gained]:
        replaced[name, name] = Replaced(name, lost.pop(name), gained.pop(name))
    interface = list(interface_changes(matching))
    return Diff(matching, *matching.free(), rewired, list(replaced.values()), lost, gained, interface)


def interface_changes(matching: Matching) -> Iterator[str]:
    """Yield what changed in inputs, outputs, versions and metadata."""
    old, new = matching.old, matching.new
    for what, mine, theirs, names in (
        ("input", old.inputs, new.inputs, matching.inputs),
        ("output", old.outputs, new.outputs, matching.outputs),
    ):
        kept = {names[name]: name for name in theirs if name in names}
        for name, text in mine.items():
            if name not in kept:
                yield f"{what} removed: {name} {text}"
            elif (name, text) != (kept[name], theirs[kept[name]]):
                yield f"{what} {name} {text} -> {kept[name]} {theirs[kept[name]]}"
        yield from (f"{what} added: {name} {text}" for name, text in theirs.items() if name not in names)
        if [name for name in mine if name in kept] != [names[name] for name in theirs if name in names]:
            yield f"{what}s in another order: {', '.join(mine)} -> {', '.join(theirs)}"
    for name, former, value in matching.results():
        if not matching.same(former, value) or (former.kind == "weight" and former.key != value.key):
            yield f"output {name} from: {source(old, former, name)} -> {source(new, value, name)}"
    before, after = properties(old.model), properties(new.model)
    for key in sorted(before.keys() | after.keys()):
        texts = [found.get(key, "(none)") for found in (before, after)]
        if texts[0] != texts[1]:
            yield f"{key}: {' -> '.join(excerpts(texts))}"


def excerpts(texts: list[str]) -> list[str]:
    """Return texts from shortly before they differ, not longer than `WIDTH`."""
    if max(map(len, texts)) <= WIDTH:
        return texts
    equal = next((place for place, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]), WIDTH)
    start = max(0, equal - WIDTH // 2)
    return ["..." * bool(start) + text[start : start + WIDTH] + "..." * (len(text) > start + WIDTH) for text in texts]


def properties(model: ModelProto) -> dict[str, str]:
    """Return versions and metadata, keyed by what they are printed as."""
    found = {f"opset of {item.domain or 'ai.onnx'}": str(item.version) for item in model.opset_import}
    found |= {f"metadata {item.key}": item.value for item in model.metadata_props if item.key not in IGNORED_METADATA}
    for function in model.functions:
        digest = hashlib.sha256(function.SerializeToString(deterministic=True)).hexdigest()
        found[f"function {function.domain}:{function.name}"] = digest[:16]
    return found | {"ir_version": str(model.ir_version), "producer": model.producer_name}


def source(graph: Graph, value: Value, name: str, home: str = "") -> str:
    """Return where a value comes from, relative to the scope `home`."""
    if value.kind != "node":
        return f"{value.kind} {name}".strip()
    node = graph.nodes[value.key]
    output = f" output {value.slot}" if value.slot else ""
    return f"{node.op}{relative(node.scope, home)}{output}"


def layer(scope: str) -> str:
    """Return the path up to the innermost member of a module list, or "" outside of all."""
    found = list(MEMBER.finditer(scope))
    return scope[: found[-1].end()] if found else ""


def any_layer(text: str) -> str:
    """Return a text without the numbers of layers."""
    return MEMBER.sub(r"\1.*", text)


def relative(scope: str, home: str) -> str:
    """Return a scope as it is seen from another, after a space; "" for the same one."""
    return f" {scope[len(home) + 1 :]}".rstrip() if home and f"{scope}/".startswith(f"{home}/") else f" /{scope}"


def folded(lines: Iterable[tuple[str, str]]) -> list[str]:
    """Return one line, with a count, for all lines that share a first text."""
    folds: dict[str, list[str]] = defaultdict(list)
    for fold, line in lines:
        folds[fold].append(line)
    return [
        (lines[0] if len(set(lines)) == 1 else fold) + (f"  (x {len(lines)})" if len(lines) > 1 else "")
        for fold, lines in folds.items()
    ]


def groups(found: Diff) -> Iterator[tuple[str, list[str]]]:
    """Yield the layer and the lines of each connected group of changes; groups end where layers do."""
    sides = old, new = found.matching.old, found.matching.new
    parents: dict[tuple[int, int], tuple[int, int]] = {}

    def root(key: tuple[int, int]) -> tuple[int, int]:
        while parents.get(key, key) != key:
            key = parents[key]
        return key

    free = [(side, index) for side, indices in enumerate((found.removed, found.added)) for index in indices]
    for side, index in free:
        node = sides[side].nodes[index]
        for value in node.inputs:
            if found.is_free(side, value) and layer(sides[side].nodes[value.key].scope) == layer(node.scope):
                parents[root((side, value.key))] = root((side, index))
    wires: dict[tuple[int, int], list[Rewire]] = defaultdict(list)
    for item in found.rewired:
        ends = [(side, value.key) for side, value in enumerate((item.old, item.new)) if found.is_free(side, value)]
        wires[ends[0] if ends else (2, item.old_node)].append(item)
    # What was removed and what was added belong together if the same input or output was the one and is the other.
    for x, y in [(item.old, item.new) for item in found.rewired] + [pair[1:] for pair in found.matching.results()]:
        if found.is_free(0, x) and found.is_free(1, y):
            parents[root((0, x.key))] = root((1, y.key))
    members: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for key in (*free, *(key for key in wires if key[0] == 2)):
        members[root(key)].append(key)
    for keys in members.values():
        # Paths are relative to the layer in the old graph, or in the new one where nothing was removed.
        scopes = [sides[side % 2].nodes[index].scope for side, index in keys if side == keys[0][0]]
        layers = {layer(scope) for scope in scopes} - {""}
        home = layers.pop() if len(layers) == 1 else commonpath(scopes)
        lines = ["-+"[side] + f" {describe(sides[side], index, home)}" for side, index in keys if side < 2]
        for item in (item for key in keys for item in wires.get(key, ())):
            reader, now = old.nodes[item.old_node], new.nodes[item.new_node]
            before = source(old, item.old, reader.input_names[item.position], home)
            after = source(new, item.new, now.input_names[item.position], home)
            lines.append(f"~ {reader.op}{relative(reader.scope, home)}: input {item.position}: {before} -> {after}")
        yield home or "/", folded((any_layer(line), line) for line in lines)


def describe(graph: Graph, index: int, home: str) -> str:
    """Return operator, attributes and constants, scope and shapes of a node."""
    node = graph.nodes[index]
    named = zip(node.input_names, node.inputs, strict=True)
    read = [name for name, value in named if value.kind not in ("constant", "absent")]
    detail = f"({node.detail})" if node.detail else ""
    shapes = f"  {shapes_text(graph, read)} -> {shapes_text(graph, node.outputs)}"
    return f"{node.op}{detail}{relative(node.scope, home)}{shapes if set(shapes) - set(' ?,->') else ''}"


def shapes_text(graph: Graph, names: list[str]) -> str:
    """Return the types of values."""
    runs = [(text, len(list(run))) for text, run in groupby(graph.types.get(name, "?") for name in names)]
    return ", ".join(f"{text} x {count}" if count > 1 else text for text, count in runs)


def folded_groups(items: Iterable[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Return a title and the lines of all groups whose lines differ only in the numbers of layers."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for place, lines in items:
        found.setdefault(any_layer("\n".join(lines)), ([], lines))[0].append(place)
    return [(title(places), lines) for places, lines in found.values()]


def title(places: list[str]) -> str:
    """Return `x 20: single_transformer_blocks.0 ... .19`."""
    lists: dict[str, list[int]] = defaultdict(list)
    others = []
    for place in dict.fromkeys(places):
        stem, _, number = place.rpartition(".")
        if number.isdecimal():
            lists[stem].append(int(number))
        else:
            others.append(place)
    for stem, numbers in lists.items():
        numbers.sort()
        is_range = len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1
        rest = [f"... .{numbers[-1]}"] if is_range else [f".{number}" for number in numbers[1:]]
        others.append(" ".join([f"{stem}.{numbers[0]}", *rest]))
    return (f"x {len(places)}: " if len(places) > 1 else "") + ", ".join(others)


def weight_changes(found: Diff) -> Iterator[tuple[str, str]]:
    """Yield a line for each weight that changed, after the text that stands for several such lines."""
    for name, old, new in found.replaced:
        files = old.file if old.file == new.file else f"{old.file} -> {new.file}"
        if str(old) != str(new):
            text = f"~ {name}: {old} -> {new} {files}"
            yield any_layer(text), text
        elif files == "inline":
            yield "~ other values inline", f"~ {name}: other values"
        else:
            yield f"~ moved in {files}", f"~ {name}: {old.place} -> {new.place}"
    for sign, items in (("-", found.lost), ("+", found.gained)):
        for name, item in items.items():
            text = f"{sign} {name}: {item} {item.file}"
            yield any_layer(text), text


def order_lines(matching: Matching) -> list[str]:
    """Return a line if the nodes of both graphs are in another order."""
    pairs = sorted(matching.forth.items())
    for (a, b), expected in zip(pairs, sorted(matching.back), strict=True):
        if b != expected:
            mine, theirs = matching.old.nodes[a], matching.new.nodes[expected]
            both = "same nodes" if len(pairs) == len(matching.old.nodes) == len(matching.new.nodes) else "nodes in both"
            nodes = f"{mine.op} /{mine.scope} -> {theirs.op} /{theirs.scope}"
            return [f"{both}, other order: first difference at node {a}: {nodes}"]
    return []


def summary(found: Diff) -> str:
    """Return one line."""
    old, new = found.matching.old, found.matching.new
    if not found.size:
        names = (Counter((node.name, *node.input_names, *node.outputs) for node in graph.nodes) for graph in (old, new))
        return "identical" if next(names) == next(names) else "renamed only"
    rewired = sum(not (found.is_free(0, item.old) or found.is_free(1, item.new)) for item in found.rewired)
    weights = len(found.replaced) + len(found.lost) + len(found.gained)
    parts = [f"{len(found.removed)} nodes removed, {len(found.added)} added"]
    parts = parts if found.removed or found.added else ["same nodes"]
    parts += [f"{rewired} inputs rewired"] if rewired else []
    parts += [f"{weights} weights changed"] if weights else []
    parts += ["other interface or metadata"] if found.interface else []
    return f"{', '.join(parts)} ({len(old.nodes)} -> {len(new.nodes)} nodes)"


def report(found: Diff, everything: bool = False) -> list[str]:
    """Return the lines to print; `everything` as --all."""
    most_groups, most_lines = (sys.maxsize, sys.maxsize) if everything else (MAX_GROUPS, MAX_LINES)
    old, new = (Counter(node.op for node in graph.nodes) for graph in (found.matching.old, found.matching.new))
    operators = [f"{op}: {old[op]} -> {new[op]}" for op in sorted(old | new) if old[op] != new[op]]
    lines = [summary(found), *order_lines(found.matching)]
    for heading, items in (
        ("inputs, outputs, metadata", found.interface),
        ("operators", operators),
        ("weights", folded(weight_changes(found))),
    ):
        lines += [f"{heading}:", *(f"  {line}" for line in cut(items, most_lines))] if items else []
    changes = folded_groups(groups(found))
    blocks = ["\n".join([name, *(f"  {line}" for line in cut(body, most_lines))]) for name, body in changes]
    return lines + cut(blocks, most_groups)


def cut(lines: list[str], most: int) -> list[str]:
    """Return at most `most` lines and how many were left out."""
    return lines if len(lines) <= most else [*lines[:most], f"... {len(lines) - most} more (--all)"]


def compare_files(old: Path, new: Path, everything: bool) -> bool:
    """Print how two files differ; return whether they do."""
    found = compare(read_graph(old), read_graph(new))
    print(f"{old} -> {new}:", "\n".join(report(found, everything)))
    return bool(found.size)


def compare_directories(old: Path, new: Path, everything: bool) -> bool:
    """Print how the graphs of two directories differ; return whether they do."""
    before, after = ({path.name for path in directory.glob("*.onnx")} for directory in (old, new))
    if not before | after:
        raise ValueError(f"{old}, {new}: no .onnx files")
    for directory, only in ((old, before - after), (new, after - before)):
        for name in sorted(only):
            print(f"only in {directory}: {name}")
    differ = [compare_files(old / name, new / name, everything) for name in sorted(before & after)]
    return before != after or any(differ)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Print how two ONNX graphs differ in structure.", allow_abbrev=False)
    parser.add_argument("old", type=Path, help="a graph, or a directory of graphs")
    parser.add_argument("new", type=Path, help="the graph, or the directory, to compare with it")
    parser.add_argument("--all", action="store_true", help="print every group and every line")
    options = parser.parse_args(arguments)
    run = compare_directories if options.old.is_dir() else compare_files
    try:
        if options.old.is_dir() != options.new.is_dir():
            raise ValueError(f"{options.old}, {options.new}: give two files or two directories that exist")
        return int(run(options.old, options.new, options.all))
    except (OSError, ValueError) as error:
        print(f"graph_diff: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
