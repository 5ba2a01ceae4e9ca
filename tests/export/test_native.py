"""bf16-native builds: arithmetic in bfloat16 from the inputs to the outputs, on the checkpoint's own bytes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fluxonnx.checkpoint.manifest import graph_file, read_manifest
from fluxonnx.errors import FluxonnxError, UsageError
from fluxonnx.export import export
from fluxonnx.runtime.engine import SessionOptions
from fluxonnx.runtime.session import Session
from tests.support import Case, golden_inputs, relative_error, run_graph

pytestmark = pytest.mark.slow

TRANSFORMERS = ["text_encoder", "transformer"]


def graph(root, component: str) -> onnx.ModelProto:
    return onnx.load(root / graph_file(component, "bf16-native", "ort"), load_external_data=False)


@pytest.mark.parametrize("component", TRANSFORMERS)
def test_floats_are_bfloat16_between_inputs_and_outputs(checkpoints, component):
    model = graph(checkpoints.exported(Case("odd-heads"), "bf16-native"), component)
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    floats = {value.name for value in model.graph.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    # the mask of the text encoder is made of integers, and cast once
    made_by = {node.output[0]: node.op_type for node in model.graph.node}
    assert {made_by[name] for name in floats - ends} <= {"Where", "Max"}
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert len(casts) <= len(model.graph.input) + len(model.graph.output) + 1
    weights = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert weights
    assert {tensor.data_type for tensor in weights} == {TensorProto.BFLOAT16}


def test_weights_of_a_bfloat16_checkpoint_stay_in_its_files(checkpoints):
    root = checkpoints.exported(Case("odd-heads"), "bf16-native")
    manifest = read_manifest(root)
    assert manifest is not None
    for component in manifest.builds["bf16-native"].components.values():
        assert not [name for name in component.weights if "native" in name]


def in_float32(model: onnx.ModelProto, root) -> onnx.ModelProto:
    """Return the same graph with float32 in place of bfloat16, and its weights inside: the CPU can run that."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            array = numpy_helper.to_array(tensor, base_dir=str(root)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                attribute.CopyFrom(helper.make_attribute("to", TensorProto.FLOAT))
    del model.graph.value_info[:]
    return model


@pytest.mark.parametrize("component", TRANSFORMERS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_is_the_graph_of_the_checkpoint(checkpoints, component, dtype):
    """But for the rounding of values, which no kernel of the CPU does.

    The text encoder's rotary tables are rounded, as transformers rounds them, and weights of float32 are.
    """
    case = Case("odd-heads", dtype=dtype)
    root = checkpoints.exported(case, "bf16-native")
    model = in_float32(graph(root, component), root)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, golden_inputs(component))
    checkpoints.exported(case, "bf16")
    expected = run_graph(root, component, "bf16")
    assert relative_error(found, expected) < (1e-3 if dtype == "bf16" else 2e-2)


@pytest.mark.parametrize("component", ["vae_encoder", "vae_decoder"])
def test_autoencoder_computes_in_float32(checkpoints, component):
    root = checkpoints.exported(Case("odd-heads"), "bf16-native")
    checkpoints.exported(Case("odd-heads"), "bf16")
    assert relative_error(run_graph(root, component, "bf16-native"), run_graph(root, component, "bf16")) < 1e-6


@pytest.mark.parametrize("precision", ["bf16-native", "fp16"])
def test_group_norms_are_those_that_kernels_of_gpus_know(checkpoints, precision):
    root = checkpoints.exported(Case("odd-heads"), precision)
    for component in ("vae_encoder", "vae_decoder"):
        model = onnx.load(root / graph_file(component, precision, "ort"), load_external_data=False)
        assert {opset.domain: opset.version for opset in model.opset_import}[""] <= 21


def test_other_flavours_are_refused(checkpoints):
    with pytest.raises(UsageError, match="bf16-native graphs are of the flavour ort, not portable"):
        export(checkpoints.get(Case("odd-heads")), precision="bf16-native", flavour="portable")


def test_a_cpu_says_that_it_has_no_such_arithmetic(checkpoints):
    root = checkpoints.exported(Case("odd-heads"), "bf16-native")
    with pytest.raises(FluxonnxError, match=r"the cpu provider can't compute this .* choose another --precision"):
        Session(root / graph_file("transformer", "bf16-native", "ort"), "transformer", SessionOptions())
