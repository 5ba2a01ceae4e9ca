"""ONNX's own tests of operators, for every operator that the openblas provider claims."""

from __future__ import annotations

import unittest
import warnings
from typing import Any

import onnx.backend.test
import pytest

from fluxonnx.openblas.backend import BlasBackend, BlasRep
from fluxonnx.openblas.call import OPERATORS
from fluxonnx.openblas.plan import OLDEST, OLDEST_OPSET, unknown
from tests.support import optional

pytestmark = [pytest.mark.slow, optional("threadpoolctl")]

KINDS = ("OnnxBackendNodeModelTest", "OnnxBackendSimpleModelTest", "OnnxBackendPyTorchConvertedModelTest",
         "OnnxBackendPyTorchOperatorModelTest")  # fmt: skip

# What is refused with a message, and why it is not needed.
EXCLUDED = {
    "strings": r"test_(equal|cast|identity|castlike)_.*(string|STRING|opt|sequence).*",
    "Resize only repeats values, as the autoencoder's upsampling does": r"test_resize_.*",
    "Pad only puts constants around": r"test_(edge|reflect|wrap)_pad_.*",
    "DequantizeLinear and QuantizeLinear of floats": r"test_(de)?quantizelinear_(e4m3|e5m2|float4).*",
    "QuantizeLinear to less than 8 bits": r"test_quantizelinear_u?int[24]_.*",
    "dtypes of 8 bits and fewer that are no integers": r"test_cast(like)?_.*(FLOAT8|E8M0|FLOAT4).*",
}

# Their only tests are excluded; test_operators.py has others.
NOT_TESTED = {"Resize"}


class Claimed(BlasBackend):
    """Skips what holds operators that are not claimed, or of opsets that are refused."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> BlasRep:
        opset = next((entry.version for entry in model.opset_import if not entry.domain), OLDEST_OPSET)
        if unknown(model) or any(opset < OLDEST.get(node.op_type, OLDEST_OPSET) for node in model.graph.node):
            raise unittest.SkipTest("not claimed")
        TESTED.update(node.op_type for node in model.graph.node if not node.domain)
        return super().prepare(model, device, threads=1, **kwargs)


# The operators that tests ran for.
TESTED: set[str] = set()


def test_official_tests():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tests' own arithmetic
        runner = onnx.backend.test.BackendTest(Claimed, __name__)
    for pattern in EXCLUDED.values():
        runner.exclude(pattern)
    runner.exclude(r".*_cuda")
    cases = runner.test_cases
    suite = unittest.TestSuite(
        unittest.defaultTestLoader.loadTestsFromTestCase(cases[kind]) for kind in KINDS if kind in cases
    )
    result = unittest.TestResult()
    suite.run(result)
    failures = [f"{case}: {trace.splitlines()[-1]}" for case, trace in (*result.failures, *result.errors)]
    assert not failures, "\n".join(failures)
    assert {name for domain, name in OPERATORS if not domain} - TESTED == NOT_TESTED
