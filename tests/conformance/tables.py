"""What was measured, and the tables of docs/runtimes.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fluxonnx.contract import COMPONENTS
from tests.conformance.runtimes import RUNTIMES
from tests.support import GRAPH_TOLERANCE

PAGE = Path(__file__).parents[2] / "docs/runtimes.md"
RESULTS = Path(__file__).with_name("results.json")
BEGIN, END = "<!-- begin: python -m tests.conformance --write -->\n", "<!-- end -->\n"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
# The relative error of a graph or the difference of a picture, or what went wrong.
Result = float | str
# By name of a runtime: its title, version and sizes, and by precision the result of each graph.
Results = dict[str, dict[str, Any]]


def read_results() -> Results:
    """What was measured before."""
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}


def shortened(fault: str) -> str:
    """What went wrong in a line of a table: without traces, folders of a machine, and names of nodes."""
    fault = re.split(r"\n\s*at |Stack backtrace", fault)[0]
    fault = re.sub(r"^.*ERROR_MESSAGE: ", "", fault, flags=re.DOTALL)
    fault = re.sub(r"'/[^']*'|(?<=onnx_node!)/[\w./]+", "...", fault)
    fault = re.sub(r"\S*/\S*/(?=[\w.]+)", "", fault)
    line = " ".join(fault.split()).replace("|", "/").replace("`", "'").replace("<", "(").replace(">", ")")
    return line if len(line) <= 240 else "..." + line[-237:]


def is_whole(found: dict[str, Result]) -> bool:
    """Whether all graphs are within the tolerance."""
    results = [found.get(component, "") for component in COMPONENTS]
    return all(not isinstance(result, str) and result < GRAPH_TOLERANCE for result in results)


def cell(result: Result | None, digits: str) -> str:
    """A cell of a table."""
    if result is None:
        return "-"
    return "**no**" if isinstance(result, str) else f"{result:{digits}}" if result else "0"


def tables(results: Results) -> str:
    """The Markdown of results by precision, runtime and graph."""
    lines = ["| runtime | version | sizes |", "|---|---|---|"]
    lines += [f"| {row['title']} | {row['version']} | {row['sizes']} |" for row in results.values()]
    faults: dict[tuple[str, str], dict[str, list[str]]] = {}
    for precision in PRECISIONS:
        rows = {row["title"]: row[precision] for row in results.values() if precision in row}
        lines += ["", f"### {precision}", "", f"| runtime | {' | '.join(COMPONENTS)} | picture, of 255 |"]
        lines += ["|---|" + "---|" * (len(COMPONENTS) + 1)]
        for title, found in rows.items():
            cells = [cell(found.get(component), ".0e") for component in COMPONENTS]
            lines.append(f"| {title} | {' | '.join(cells)} | {cell(found.get('picture'), '.0f')} |")
            for component, result in found.items():
                if isinstance(result, str):
                    faults.setdefault((title, result), {}).setdefault(precision, []).append(component)
        whole = sum(map(is_whole, rows.values()))
        lines += ["", f"All five graphs within {GRAPH_TOLERANCE:.0e}: {whole} of {len(rows)} runtimes."]
    if faults:
        lines += ["", "### What they said", "", "| runtime | graphs | message |", "|---|---|---|"]
    for (title, fault), graphs in faults.items():
        where = "; ".join(f"{precision}: {', '.join(names)}" for precision, names in graphs.items())
        lines.append(f"| {title} | {where} | `{fault}` |")
    return "\n".join(lines) + "\n"


def write_results(results: Results) -> None:
    """Keep results, and put their tables into the page."""
    ordered = {name: results[name] for name in RUNTIMES if name in results}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")
    PAGE.write_text(with_tables(PAGE.read_text("utf-8"), ordered), "utf-8")


def with_tables(page: str, results: Results) -> str:
    """The page with the tables of results."""
    return page.split(BEGIN)[0] + BEGIN + tables(results) + END + page.split(END)[1]
