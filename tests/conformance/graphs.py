"""Inputs for any graph, what onnxruntime makes of them, and graphs in the forms that loaders ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

Inputs = dict[str, np.ndarray]
Graph = Callable[[Inputs], list[np.ndarray]]

# Height and width of the picture, and tokens of the prompt: one whose sides differ in either direction.
CASES = ((64, 96, 64), (128, 64, 24))


def component_of(file: Path) -> str:
    """The graph that a file holds, such as transformer."""
    return file.name.partition(".")[0]


def make_inputs(file: Path, height: int, width: int, text: int) -> Inputs:
    """Random inputs of a graph for one picture of this size, the same in each run."""
    rng = np.random.default_rng(0)
    rows, columns = height // 16, width // 16

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    ports = onnx.load(file, load_external_data=False).graph.input
    last = {port.name: [dim.dim_value for dim in port.type.tensor_type.shape.dim] for port in ports}
    match component_of(file):
        case "text_encoder":
            mask = np.ones((1, text), np.int64)
            mask[:, text // 2 :] = 0
            return {"input_ids": rng.integers(0, 255, (1, text)), "attention_mask": mask}
        case "conditioning":
            txt_ids, img_ids = np.zeros((text, 4), np.int64), np.zeros((rows * columns, 4), np.int64)
            txt_ids[:, 3] = np.arange(text)
            img_ids[:, 1:3] = np.indices((rows, columns)).reshape(2, -1).T
            return {"timestep": np.array([0.7], np.float32), "txt_ids": txt_ids, "img_ids": img_ids}
        case "transformer":
            angles = rng.uniform(0, 6, (text + rows * columns, last["rotary_cos"][-1] // 2)).astype(np.float32)
            return {
                "hidden_states": normal(1, rows * columns, last["hidden_states"][-1]),
                "encoder_hidden_states": normal(1, text, last["encoder_hidden_states"][-1]),
                "timestep_proj": normal(1, last["timestep_proj"][-1]),
                "rotary_cos": np.repeat(np.cos(angles), 2, axis=1),
                "rotary_sin": np.repeat(np.sin(angles), 2, axis=1),
            }
        case "vae_encoder":
            return {"sample": normal(1, 3, height, width)}
        case "vae_decoder":
            return {"latents": normal(1, last["latents"][1], rows, columns)}
        case component:
            raise ValueError(component)


def run_onnxruntime(file: Path, inputs: Inputs) -> list[np.ndarray]:
    """What the other runtimes are compared with."""
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, inputs)


def with_weights(file: Path) -> bytes:
    """A graph whose weights are inside, for loaders that know no external data in safetensors files."""
    return onnx.load(file).SerializeToString()


def with_sizes(file: Path, inputs: Inputs) -> onnx.ModelProto:
    """A graph with its weights inside that takes inputs of these sizes only."""
    model = onnx.load(file)
    symbols = {}
    for port in model.graph.input:
        for dim, size in zip(port.type.tensor_type.shape.dim, inputs[port.name].shape, strict=True):
            if dim.dim_param:
                symbols[dim.dim_param] = size
            dim.dim_value = size
    for port in model.graph.output:
        sizes = dict(symbols)
        if component_of(file) == "conditioning":
            sizes["joint_seq"] = len(inputs["txt_ids"]) + len(inputs["img_ids"])
        elif component_of(file) == "vae_encoder":
            sizes |= {"latent_height": symbols["height"] // 16, "latent_width": symbols["width"] // 16}
        elif component_of(file) == "vae_decoder":
            sizes |= {"height": symbols["latent_height"] * 16, "width": symbols["latent_width"] * 16}
        for dim in port.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    return model
