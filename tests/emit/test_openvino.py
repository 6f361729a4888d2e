"""The same files in a second runtime: OpenVINO beside onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_lwdf.runtime import Array
from tests.emit.test_emit import RUNNABLE, written
from tests.nets import answers, samples, sqnr_db

openvino = pytest.importorskip("openvino", reason="openvino is not installed, or has no wheel for this Python")


# By itself OpenVINO computes in bfloat16 where the processor has it, and rounds the inputs of a Gemm whose weight is int8.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def openvino_answers(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", EXACT)
    return np.array(compiled(list(feeds.values()))[0])


@pytest.mark.parametrize(
    ("name", "weights", "activations"), [row for row in RUNNABLE if row[0] != "sparse-initializer"]
)
def test_the_answers_are_onnxruntimes(name, weights, activations):
    model, _ = written(name, weights, activations)
    feeds = samples(model)
    # Integer kernels differ by a code where a sum lands on a tie.
    least = 30 if activations == "integer" else 100
    assert sqnr_db(answers(model, feeds)[0], openvino_answers(model, feeds)) > least


@pytest.mark.parametrize("weights", ["integer", "float"])
def test_sparse_initializers_are_refused(weights):
    model, _ = written("sparse-initializer", weights, "float")
    with pytest.raises(RuntimeError):
        openvino_answers(model, samples(model))
