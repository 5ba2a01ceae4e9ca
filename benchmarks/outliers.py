"""What outlier channels cost a precision: the error of graphs on checkpoints that `tools/outliers.py` changes.

    python benchmarks/outliers.py -d DIR [--kind norm-gains values ...] [--scale 1 100 300] [--precision int8 int4]

Each build is compared with the float32 build of the same checkpoint, on the same inputs: the text encoder by the
prompt_embeds of a prompt, the transformer by the velocity of noise at one sigma, the decoder of the autoencoder by the
picture of noise. A kind that preserves the function has the same float32 outputs at every scale, so that its rows show
what the outliers alone cost.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from fluxonnx.checkpoint.manifest import build_name, graph_file, read_manifest
from fluxonnx.contract import Architecture, grid_ids, open_checkpoint, text_ids
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.export import export
from fluxonnx.export.components import read_architecture
from fluxonnx.export.precisions import Precision
from fluxonnx.measure.tables import machine, table
from fluxonnx.runtime.engine import SessionOptions
from fluxonnx.runtime.session import Session
from fluxonnx.runtime.text import Tokenizer
from tools.outliers import KINDS, inject

REFERENCE = "fp32"
PROMPT = "a lighthouse on a cliff at night, waves breaking below, long exposure photograph"
TEXT_TOKENS = 32
# Latent tokens along each side, and the sigma at which the transformer is run.
GRID = 8
SIGMA = 0.7
# The graph of each part of the model whose output is compared.
GRAPHS = {"text_encoder": "text_encoder", "transformer": "transformer", "vae": "vae_decoder"}
FLAVOUR = "ort"

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        kind: The kind of outliers.
        graph: The graph.
        precision: The build.
        scale: By how much the channels were multiplied.
        error: Relative L2 error of the output.
        worst: The largest relative L2 error of a token (of a row of pixels for the autoencoder).
    """

    kind: str
    graph: str
    precision: str
    scale: float
    error: float
    worst: float


def relative_errors(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Return the relative L2 error of an output, and the largest one of a vector along its last dimension."""
    difference = np.linalg.norm(found.astype(np.float64) - expected, axis=-1)
    size = np.linalg.norm(expected.astype(np.float64), axis=-1)
    return float(np.linalg.norm(difference) / np.linalg.norm(size)), float((difference / size).max())


def run_graph(root: Path, component: str, precision: str, inputs: Inputs) -> np.ndarray:
    """Run a graph of a build in `root`; returns its first output."""
    manifest = read_manifest(root)
    assert manifest is not None  # `measure` exported it
    build = manifest.builds[build_name(precision, FLAVOUR)]
    with Session(root / graph_file(component, precision, FLAVOUR), component, SessionOptions(), build) as session:
        return session.run(**inputs)[0]


def graph_inputs(root: Path, graph: str, sizes: Architecture) -> Inputs:
    """Return the inputs of a graph; the transformer gets the prompt_embeds of the float32 text encoder in `root`."""
    rng = np.random.default_rng(0)
    if graph == "vae_decoder":
        return {"latents": rng.standard_normal((1, sizes.vae.patch_channels, GRID, GRID), np.float32)}
    tokens = Tokenizer(root / "tokenizer").encode(PROMPT, TEXT_TOKENS)
    # Padding would only repeat what the end of the prompt shows.
    count = int(tokens.attention_mask.sum())
    text = {"input_ids": tokens.input_ids[:, :count], "attention_mask": tokens.attention_mask[:, :count]}
    if graph == "text_encoder":
        return text
    place = {"txt_ids": text_ids(count), "img_ids": grid_ids(GRID, GRID)}
    conditioning = read_manifest(root)
    assert conditioning is not None
    build = conditioning.builds[build_name(REFERENCE, FLAVOUR)]
    path = root / graph_file("conditioning", REFERENCE, FLAVOUR)
    with Session(path, "conditioning", SessionOptions(), build) as session:
        proj, cos, sin = session.run(timestep=np.array([SIGMA], np.float32), **place)
    return {
        "hidden_states": rng.standard_normal((1, GRID * GRID, sizes.transformer.in_channels), np.float32),
        "encoder_hidden_states": run_graph(root, "text_encoder", REFERENCE, text),
        "timestep_proj": proj,
        "rotary_cos": cos,
        "rotary_sin": sin,
    }


def measure(
    source: Path,
    work: Path,
    kinds: Sequence[str],
    scale: float,
    precisions: Iterable[str | Precision],
    *,
    channels: int = 2,
    seed: int = 0,
    components: Sequence[str] | None = None,
) -> list[Row]:
    """Measure the errors of builds of a checkpoint with outliers.

    Args:
        source: The checkpoint; it is not changed.
        work: A folder for the changed one, which is removed again.
        kinds: Some of `tools.outliers.KINDS`, all at once.
        scale: The factor; 1 for the checkpoint as it is.
        precisions: The builds.
        channels: How many channels, per norm, block or layer.
        seed: Chooses them.
        components: text_encoder, transformer, vae; by default those that have the kind.

    Returns:
        A row for each graph and build.
    """
    parts = [part for part in GRAPHS if any(part in KINDS[kind] for kind in kinds) and part in (components or GRAPHS)]
    # What a token of the text encoder does to the transformer is part of the question.
    graphs = [GRAPHS[part] for part in parts]
    if {"token", "massive"} & set(kinds) and not components:
        graphs.append("transformer")
    kind = "+".join(kinds)
    root = work / f"{kind}-{scale:g}-{channels}"
    rows = []
    try:
        inject(source, root, kinds, channels=channels, scale=scale, seed=seed, components=parts, sigmas=[SIGMA])
        sizes = read_architecture(open_checkpoint(root), None)
        needed = {*graphs, *(("text_encoder", "conditioning") if "transformer" in graphs else ())}
        export(root, precision=REFERENCE, components=sorted(needed))
        for graph in graphs:
            inputs = graph_inputs(root, graph, sizes)
            expected = run_graph(root, graph, REFERENCE, inputs)
            for precision in precisions:
                export(root, precision=precision, components=[graph])
                name = precision if isinstance(precision, str) else precision.name
                errors = relative_errors(run_graph(root, graph, name, inputs), expected)
                rows.append(Row(kind, graph, name, scale, *errors))
        return rows
    finally:
        shutil.rmtree(root, ignore_errors=True)


def render(rows: Sequence[Row], scales: Sequence[float]) -> str:
    """Lay out a table with a column for each scale: the error, and behind it that of the worst token."""
    cells: dict[tuple[str, str, str], dict[float, str]] = {}
    for row in rows:
        text = f"{row.error:.2%} ({row.worst:.1%})"
        cells.setdefault((row.kind, row.graph, row.precision), {})[row.scale] = text
    header = ["kind", "graph", "precision", *(f"s = {scale:g}" for scale in scales)]
    return table(header, [[*key, *(found.get(scale, "") for scale in scales)] for key, found in cells.items()])


def run(arguments: argparse.Namespace, say: Callable[[str], None]) -> list[Row]:
    """Measure everything that is asked for."""
    rows = []
    if arguments.work:
        Path(arguments.work).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="outliers-") as work:
        for kind in arguments.kind:
            for scale in arguments.scale:
                found = measure(
                    arguments.dir,
                    Path(work),
                    [kind],
                    scale,
                    arguments.precision,
                    channels=arguments.channels,
                    seed=arguments.seed,
                    components=arguments.component,
                )
                rows += found
                for row in found:
                    say(f"{row.kind} {row.graph} {row.precision} s = {row.scale:g}: {row.error:.3%} ({row.worst:.3%})")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure what outlier channels cost a precision.")
    parser.add_argument("-d", "--dir", type=Path, required=True, metavar="DIR", help="a checkpoint; it is not changed")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--component", nargs="+", choices=GRAPHS, help="default: those that have the kind")
    parser.add_argument(
        "--scale", nargs="+", type=float, default=[1.0, 10.0, 30.0, 100.0, 300.0], help="default: 1 to 300"
    )
    parser.add_argument("--precision", nargs="+", default=["int8", "int4"], metavar="NAME", help="default: int8 int4")
    parser.add_argument("--channels", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where changed checkpoints are written for a while")
    parsed = parser.parse_args(arguments)
    try:
        if not any(not parsed.component or set(parsed.component) & set(KINDS[kind]) for kind in parsed.kind):
            raise UsageError(f"{', '.join(parsed.kind)}: {', '.join(parsed.component)} has no such outliers")
        parsed.kind = [k for k in parsed.kind if not parsed.component or set(parsed.component) & set(KINDS[k])]
        rows = run(parsed, lambda line: print(line, file=sys.stderr))
    except FluxonnxError as error:
        print(f"outliers: {error}", file=sys.stderr)
        return 1
    here = machine()
    print(
        f"{here['processor']}, {here['cores']} cores, onnxruntime {here['onnxruntime']}; {parsed.channels} channels\n"
    )
    print(render(rows, parsed.scale))
    return 0


if __name__ == "__main__":
    sys.exit(main())
