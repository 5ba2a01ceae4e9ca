"""The loss of quality of a precision: its graphs, layers and pictures against those of the reference.

The reference is the build that uses the checkpoint's weights as they are and computes in float32.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from PIL import Image

from fluxonnx import api
from fluxonnx.checkpoint.manifest import DEFAULT_FLAVOUR, DEFAULT_PRECISION, Build, build_name, read_manifest
from fluxonnx.contract import COMPONENTS
from fluxonnx.errors import UsageError
from fluxonnx.measure.picture import PROMPT
from fluxonnx.measure.similarity import ssim
from fluxonnx.runtime.engine import SessionOptions
from fluxonnx.runtime.events import Event, GraphRan, Watch
from fluxonnx.runtime.images import image_to_sample
from fluxonnx.runtime.request import Request
from fluxonnx.runtime.session import Session

if TYPE_CHECKING:
    from fluxonnx.runtime.pipeline import Flux

REFERENCE = DEFAULT_PRECISION

PROMPTS = ("a red circle on a blue background", PROMPT)
SEED = 1

# The module lists of the models: graphs are compared at the outputs of their members.
LAYERS = ("model/layers.", "transformer_blocks.", "single_transformer_blocks.")

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Plan:
    """What to compare; see the flags of `fluxonnx compare`."""

    model: Path
    precisions: tuple[str, ...]
    prompts: tuple[str, ...] = PROMPTS
    seed: int = SEED
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    text_encoder_precision: str | None = None

    def precision_of(self, graph: str, precision: str) -> str:
        """Return the precision of a graph where one of `precisions` is compared; the reference is never mixed."""
        mixed = graph == "text_encoder" and precision != REFERENCE
        return self.text_encoder_precision or precision if mixed else precision


@dataclass(frozen=True)
class Distance:
    """The distance of an array from the reference's.

    Attributes:
        relative: L2 norm of the difference over that of the reference.
        cosine: Cosine of the angle between both.
    """

    relative: float
    cosine: float

    @property
    def snr(self) -> float:
        """Signal to noise ratio in dB."""
        return float("inf") if self.relative == 0 else -20 * float(np.log10(self.relative))


@dataclass(frozen=True)
class Layer:
    """The error of one layer's output.

    Attributes:
        graph: The graph's name.
        name: The module, the stream of a double block (picture or text), and the number of tokens.
        relative: The relative error of the residual stream after this layer.
        added: The error that this layer added, if errors of layers are independent: what has to be added in quadrature
            to the error before the layer.
    """

    graph: str
    name: str
    relative: float
    added: float


@dataclass(frozen=True)
class Rounding:
    """What the export estimated of one graph, see `manifest.Component`.

    Attributes:
        errors: The relative error of a product, for each layer that was to be rounded; from the weights alone.
        kept: Those of the layers that stay as in the checkpoint, because their error would be too large.
    """

    errors: dict[str, float]
    kept: tuple[str, ...]


@dataclass
class Result:
    """How one precision compares with the reference.

    Attributes:
        precision: Which one.
        graphs: The distance of each graph's output, on the inputs of one of the reference's runs.
        layers: The errors inside of the graphs.
        roundings: What the export estimated, by graph; none for graphs without rounded layers.
        velocity: For each step of the first picture the signal to noise ratio of the velocity in dB. The latents are
            those of the reference at that step, so that a step's figure has no part in the errors of earlier steps.
        pictures: One for each prompt.
        psnr: In dB, one for each picture.
        ssim: Likewise, at most 1.
        megabytes: The size of the build's files.
    """

    precision: str
    graphs: dict[str, Distance] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    roundings: dict[str, Rounding] = field(default_factory=dict)
    velocity: list[float] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    megabytes: float = 0.0


@dataclass
class Report:
    """All results; `pictures` are the reference's."""

    plan: Plan
    pictures: list[Image.Image]
    results: list[Result]


def distance(found: np.ndarray, expected: np.ndarray) -> Distance:
    """Compare two arrays of the same shape, in float64."""
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    norm = float(np.linalg.norm(b)) or 1.0
    cosine = float(a @ b) / ((float(np.linalg.norm(a)) or 1.0) * norm)
    return Distance(float(np.linalg.norm(a - b)) / norm, min(cosine, 1.0))


def psnr(found: Image.Image, expected: Image.Image) -> float:
    """Return the peak signal to noise ratio of two pictures in dB; infinity if they are identical."""
    error = np.square(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def run(plan: Plan, say: Callable[[str], None]) -> Report:
    """Compare precisions with the reference.

    Args:
        plan: What to compare.
        say: Called with each line of progress.

    Raises:
        UsageError: A value is out of its range, or there is nothing to compare.
        FluxonnxError: The model can't be used.
    """
    precisions = tuple(dict.fromkeys(name for name in plan.precisions if name != REFERENCE))
    if not precisions:
        raise UsageError(f"there is nothing to compare with {REFERENCE}: choose others with --precision")
    if not plan.prompts:
        raise UsageError("there is no prompt to compare with: give one with -p")
    for name in (REFERENCE, *precisions):
        with _loaded(plan, name, on_export=lambda root: say(f"Exporting {root} ...")) as flux:
            for prompt in plan.prompts:
                flux.check(_request(plan, prompt))

    say(f"{REFERENCE}: pictures")
    pictures, calls = _reference(plan)
    inputs = _one_run_each(calls, pictures[0])
    results = [Result(name) for name in precisions]
    for graph, values in inputs.items():
        say(f"{graph}: layer by layer")
        expected = _run_with_layer_outputs(plan, graph, REFERENCE, values)
        for result in results:
            found = _run_with_layer_outputs(plan, graph, result.precision, values)
            outputs = [name for name in expected if not name.startswith("/")]
            result.graphs[graph] = distance(found[outputs[0]], expected[outputs[0]])
            result.layers += layer_errors(graph, found, expected)
    say("velocity: step by step")
    steps = first_picture(calls["transformer"])
    velocity = _velocities(plan, REFERENCE, steps)
    for result in results:
        result.velocity = [
            distance(*pair).snr for pair in zip(_velocities(plan, result.precision, steps), velocity, strict=True)
        ]
        result.roundings = _roundings(plan, result.precision)
        say(f"{result.precision}: pictures")
        result.pictures = _pictures(plan, result.precision)
        result.psnr = [psnr(*pair) for pair in zip(result.pictures, pictures, strict=True)]
        result.ssim = [ssim(*pair) for pair in zip(result.pictures, pictures, strict=True)]
        result.megabytes = _megabytes(plan, result.precision)
    return Report(plan, pictures, results)


def _request(plan: Plan, prompt: str) -> Request:
    return Request(prompt=prompt, width=plan.width, height=plan.height, steps=plan.steps)


def _loaded(plan: Plan, precision: str, **options: Any) -> Flux:
    encoder = plan.precision_of("text_encoder", precision)
    return api.load(plan.model, precision=precision, text_encoder_precision=encoder, **options)


def _reference(plan: Plan) -> tuple[list[Image.Image], dict[str, list[Inputs]]]:
    """Return the reference's pictures, and the inputs of all runs of its graphs."""
    calls: dict[str, list[Inputs]] = {}

    def record(event: Event) -> None:
        if isinstance(event, GraphRan):
            calls.setdefault(event.component, []).append(event.inputs)

    return _pictures(plan, REFERENCE, record), calls


def _one_run_each(calls: dict[str, list[Inputs]], picture: Image.Image) -> dict[str, Inputs]:
    """Return the inputs of one run of each graph: of several runs the one in the middle.

    The conditioning graph is left out: it is the same in all precisions.
    """
    inputs = {graph: made[len(made) // 2] for graph, made in calls.items() if graph != "conditioning"}
    inputs["vae_encoder"] = {"sample": image_to_sample(picture)}
    return inputs


def first_picture(calls: Sequence[Inputs]) -> list[list[Inputs]]:
    """Return the runs of the transformer for the first picture, by step: those at one timestep.

    Timesteps fall while a picture is made, so the first one that was there before begins the next picture.
    """
    steps: list[list[Inputs]] = []
    known: set[bytes] = set()
    for timestep, group in groupby(calls, lambda inputs: inputs["timestep_proj"].tobytes()):
        if timestep in known:
            break
        known.add(timestep)
        steps.append(list(group))
    return steps


def _velocities(plan: Plan, precision: str, steps: Sequence[Sequence[Inputs]]) -> list[np.ndarray]:
    """Run the transformer on given inputs; returns the velocities of each step as one array."""
    build = _build(plan.model, precision)
    path = plan.model / build.components["transformer"].graph
    with Session(path, "transformer", SessionOptions(), build) as session:
        return [np.concatenate([session.run(**inputs)[0] for inputs in step]) for step in steps]


def _roundings(plan: Plan, precision: str) -> dict[str, Rounding]:
    """Return what the export of a precision estimated, by graph."""
    found = {}
    for graph in COMPONENTS:
        component = _build(plan.model, plan.precision_of(graph, precision)).components[graph]
        if component.errors:
            found[graph] = Rounding(component.errors, tuple(component.kept))
    return found


def _pictures(plan: Plan, precision: str, watch: Watch | None = None) -> list[Image.Image]:
    with _loaded(plan, precision, watch=watch) as flux:
        return [flux.run(_request(plan, prompt), [plan.seed])[0] for prompt in plan.prompts]


def _build(model: Path, precision: str) -> Build:
    manifest = read_manifest(model)
    assert manifest is not None  # `run` has exported every build
    name = build_name(precision, DEFAULT_FLAVOUR)
    if name not in manifest.builds:
        cure = f"add one for any size with fluxonnx export -d {model} --precision {precision}"
        raise UsageError(f"{model} has only static builds of {precision}, of which no graphs can be compared: {cure}")
    return manifest.builds[name]


def _megabytes(plan: Plan, precision: str) -> float:
    parts = [_build(plan.model, plan.precision_of(graph, precision)).components[graph] for graph in COMPONENTS]
    names = {name for part in parts for name in (part.graph, *part.weights)}
    names |= {name for part in parts if not part.self_contained for name in part.sources}
    return sum((plan.model / name).stat().st_size for name in names) / 1e6


def _run_with_layer_outputs(plan: Plan, graph: str, precision: str, inputs: Inputs) -> dict[str, np.ndarray]:
    """Run a graph; returns its output and those of its layers, by name."""
    build = _build(plan.model, plan.precision_of(graph, precision))
    with (
        _with_layer_outputs(plan.model / build.components[graph].graph) as (path, names),
        Session(path, graph, SessionOptions(), build) as session,
    ):
        return dict(zip(names, session.run(**inputs), strict=True))


@contextmanager
def _with_layer_outputs(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield a copy of a graph whose outputs include those of its layers, and the names of all outputs.

    The copy is in the folder of the graph, because locations of weights are relative to it.
    """
    model = onnx.load(path, load_external_data=False)
    types = {info.name: info for info in model.graph.value_info}
    model.graph.output.extend(types[name] for name in layer_outputs(model))
    copy = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        onnx.save(model, copy)
        yield copy, [output.name for output in model.graph.output]
    finally:
        with suppress(OSError):
            copy.unlink()


def layer_outputs(model: onnx.ModelProto) -> list[str]:
    """Return the values that are computed inside a layer and used outside of it, in order."""
    maker = {name: layer_of(node.name) for node in model.graph.node for name in node.output}
    used = {
        name
        for node in model.graph.node
        if node.op_type != "Shape"  # shared by all layers, and depends on no values
        for name in node.input
        if maker.get(name) not in (None, layer_of(node.name))
    }
    return [name for name in maker if name in used]


def layer_of(node: str) -> str | None:
    """Return the layer that a node is part of: transformer_blocks.3 for /transformer_blocks.3/attn/to_q/Gemm."""
    for prefix in LAYERS:
        if node.startswith(f"/{prefix}"):
            return "/".join(node[1:].split("/")[: prefix.count("/") + 1])
    return None


def layer_errors(graph: str, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[Layer]:
    """Return the errors of all layers of a graph, in order, from the outputs of the layers by name."""
    layers: list[Layer] = []
    before: dict[tuple[tuple[int, ...], int], float] = {}
    names = [name for name in expected if layer_of(name) is not None and name in found]
    for layer, group in groupby(names, layer_of):
        # By shape, and a number that tells the two streams of a double block apart where they are equally long.
        errors: dict[tuple[tuple[int, ...], int], float] = {}
        outputs = list(group)
        # The exporter computes the picture's stream first.
        streams = (" picture", " text") if len(outputs) == 2 else ("",) * len(outputs)
        for name, stream in zip(outputs, streams, strict=True):
            shape = expected[name].shape
            key = shape, sum(other == shape for other, _ in errors)
            relative = errors[key] = distance(found[name], expected[name]).relative
            # The first single block joins the streams, and the last one drops the text tokens.
            known = before.get(key, min(before.values(), default=0.0))
            layers.append(
                Layer(graph, f"{layer}{stream} [{shape[1]}]", relative, max(0.0, relative**2 - known**2) ** 0.5)
            )
        before = errors
    return layers


def worst(layers: Sequence[Layer], count: int = 5) -> list[Layer]:
    """Return the layers that add most to the error, the worst first."""
    return sorted(layers, key=lambda layer: layer.added, reverse=True)[:count]
