"""A comparison of precisions as tables for the terminal, and as a page with pictures and plots."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from fluxonnx.errors import FluxonnxError
from fluxonnx.files import describe_os_error
from fluxonnx.measure.quality import REFERENCE, Layer, Report, worst
from fluxonnx.measure.tables import table
from fluxonnx.runtime.outputs import write_output
from fluxonnx.version import __version__

# Layers of each graph in the table of what the export expected.
MOST_ROUNDINGS = 5
ROUNDINGS = "Estimated at export from the weights, for activations without outliers:"
# So that a reader can place a figure. Those files were compared with bf16 on the trained weights, over many pictures.
ORIENTATION = (
    "For comparison: published int8 files of FLUX.2-klein reach a PSNR of 24 to 30 dB and an LPIPS of 0.06 to 0.09 on "
    "the trained weights."
)
COLOURS = ("#c1121f", "#0a6ebd", "#2a9d4a", "#8a4fbf", "#d98200")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .8rem; text-align: right }
th { border-bottom: 1px solid #999 } td:first-child, th:first-child { text-align: left }
figure { display: inline-block; margin: 0 .6rem .6rem 0 } figcaption { font-size: .85em; color: #555 }
img { image-rendering: pixelated; max-width: 100%; min-width: 8rem } svg { background: #fafafa }
"""

Rows = list[list[str]]


def graph_rows(report: Report) -> tuple[list[str], Rows]:
    """Return the table of graphs."""
    header = ["graph", "precision", "relative error", "cosine", "SNR, dB"]
    rows = [
        [graph, result.precision, f"{found.relative:.3%}", f"{found.cosine:.6f}", decibels(found.snr)]
        for result in report.results
        for graph, found in result.graphs.items()
    ]
    return header, rows


def picture_rows(report: Report) -> tuple[list[str], Rows]:
    """Return the table of pictures."""
    count = range(1, len(report.pictures) + 1)
    header = ["precision", "MB", *(f"PSNR {i}, dB" for i in count), *(f"SSIM {i}" for i in count)]
    rows = [
        [result.precision, f"{result.megabytes:.0f}", *map(decibels, result.psnr), *(f"{x:.4f}" for x in result.ssim)]
        for result in report.results
    ]
    return header, rows


def step_rows(report: Report) -> tuple[list[str], Rows]:
    """Return the table of the velocity's signal to noise ratio at each step."""
    count = max(len(result.velocity) for result in report.results)
    header = ["velocity's SNR, dB", *(f"step {i + 1}" for i in range(count))]
    return header, [[result.precision, *map(decibels, result.velocity)] for result in report.results]


def rounding_rows(report: Report) -> tuple[list[str], Rows]:
    """Return the table of the layers that the export expected to be worst, those first that it therefore kept."""
    header = ["layer", "graph", "precision", "stored as", "error expected at export"]
    rows = []
    for result in report.results:
        for graph, found in result.roundings.items():
            names = sorted(found.errors, key=lambda name: (name not in found.kept, -found.errors[name]))
            precision = report.plan.precision_of(graph, result.precision)
            for name in names[:MOST_ROUNDINGS]:
                stored = "checkpoint's" if name in found.kept else precision
                rows.append([name, graph, result.precision, stored, f"{found.errors[name]:.3%}"])
    return header, rows


def rounding_summary(report: Report) -> str:
    """Say how many layers the exports of the builds rounded and kept; an empty string if they say nothing of that."""
    parts = [
        f"{result.precision} {graph}: {len(found.errors)} layers, {len(found.kept)} of them kept as in the checkpoint"
        for result in report.results
        for graph, found in result.roundings.items()
    ]
    return "; ".join(parts)


def layer_rows(report: Report) -> tuple[list[str], Rows]:
    """Return the table of the layers that add most to the error."""
    header = ["layer [tokens]", "graph", "precision", "added error", "error after it"]
    rows = []
    for result in report.results:
        for graph in result.graphs:
            layers = worst([layer for layer in result.layers if layer.graph == graph])
            rows += [[x.name, graph, result.precision, f"{x.added:.3%}", f"{x.relative:.3%}"] for x in layers]
    return header, rows


def decibels(value: float) -> str:
    """Write a ratio in dB; an infinite one is that of identical values."""
    return "identical" if math.isinf(value) else f"{value:.1f}"


def render(report: Report) -> str:
    """Return the report as tables in Markdown."""
    parts = [table(*graph_rows(report)), table(*layer_rows(report))]
    if summary := rounding_summary(report):
        parts += [f"{ROUNDINGS} {summary}.", table(*rounding_rows(report))]
    return "\n\n".join([*parts, table(*step_rows(report)), table(*picture_rows(report)), ORIENTATION])


def save(report: Report, path: Path) -> None:
    """Write the page, which needs no other files; a failure leaves no partial file.

    Raises:
        FluxonnxError: It can't be written.
    """
    try:
        write_output(path, page(report).encode())
    except OSError as error:
        raise FluxonnxError(describe_os_error(error, path)) from None


def page(report: Report) -> str:
    """Return the page as HTML."""
    name = html.escape(report.plan.model.resolve().name)
    names = ", ".join(result.precision for result in report.results)
    parts = [
        f"<h1>{name}: {names} against {REFERENCE}</h1>",
        f"<p>The {REFERENCE} build uses the checkpoint's own weights and computes in float32. Seed {report.plan.seed}, "
        f"fluxonnx {__version__}.</p>",
        "<h2>Pictures</h2>",
        *(_pictures(report, i) for i in range(len(report.pictures))),
        _table(*picture_rows(report)),
        f"<p>{ORIENTATION}</p>",
        "<h2>Steps</h2>",
        f"<p>The velocity at each step of the first picture, on the latents of the {REFERENCE} build.</p>",
        _table(*step_rows(report)),
        "<h2>Graphs</h2>",
        f"<p>Every graph gets the inputs that it had in a run of the {REFERENCE} build.</p>",
        _table(*graph_rows(report)),
        "<h2>Layers</h2>",
        "<p>The plots show the relative error of the residual stream after each layer. The table lists the layers that "
        "add most to it.</p>",
        *(_plot(report, graph) for graph in report.results[0].graphs),
        _table(*layer_rows(report)),
    ]
    if summary := rounding_summary(report):
        parts += [f"<p>{ROUNDINGS} {html.escape(summary)}.</p>", _table(*rounding_rows(report))]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: precisions</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _table(header: Sequence[str], rows: Rows) -> str:
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in header)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _pictures(report: Report, i: int) -> str:
    figures = [_figure(report.pictures[i], REFERENCE)]
    for result in report.results:
        ratio = decibels(result.psnr[i])
        unit = "" if math.isinf(result.psnr[i]) else f" dB, SSIM {result.ssim[i]:.3f}"
        figures.append(_figure(result.pictures[i], f"{result.precision}, {ratio}{unit}"))
    return f"<p>“{html.escape(report.plan.prompts[i])}”</p><div>{''.join(figures)}</div>"


def _figure(image: Image.Image, caption: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt=""><figcaption>{caption}</figcaption></figure>'


def _plot(report: Report, graph: str) -> str:
    """Return a plot of the error over the layers of a graph as SVG; an empty string for a graph without layers."""
    lines = {result.precision: [x for x in result.layers if x.graph == graph] for result in report.results}
    lines = {name: layers for name, layers in lines.items() if layers}
    top = max((layer.relative for layers in lines.values() for layer in layers), default=0.0)
    if not top:
        return ""
    width, height, left, bottom = 640, 200, 60, 30
    parts = [
        f'<text x="{left}" y="14" font-size="13">{graph}</text>',
        f'<line x1="{left}" y1="{height - bottom}" x2="{width}" y2="{height - bottom}" stroke="#999"/>',
        f'<text x="{left - 6}" y="30" font-size="11" text-anchor="end">{top:.2%}</text>',
        f'<text x="{left - 6}" y="{height - bottom}" font-size="11" text-anchor="end">0</text>',
    ]
    for i, (name, layers) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = _points(layers, top, left, width - 80, 26, height - bottom)
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for point, layer in zip(points, layers, strict=True):
            x, y = point.split(",")
            title = f"{name}: {html.escape(layer.name)} {layer.relative:.3%}"
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"><title>{title}</title></circle>')
        parts.append(f'<text x="{width - 70}" y="{40 + 16 * i}" font-size="12" fill="{colour}">{name}</text>')
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">{"".join(parts)}</svg>'


def _points(layers: Sequence[Layer], top: float, left: float, right: float, high: float, low: float) -> list[str]:
    step = (right - left) / max(1, len(layers) - 1)
    return [f"{left + i * step:.1f},{low - (low - high) * x.relative / top:.1f}" for i, x in enumerate(layers)]
