"""What each --target changes, in values and in the kernels that run.

target      weight codes       activations                 kernels in onnxruntime
generic     pair-safe          uint8, any zero point       integer
x86         the same as generic
x86-vnni    free               uint8, any zero point       integer
arm         free               int8, any zero point        integer
tensorrt    free               int8, zero point 0          integer but behind a Relu, which zero point 0 keeps apart
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import onnx_lwdf
from onnx_lwdf.config import TARGETS
from tests.nets import FAST, answers, residual, samples, sqnr_db

MODELS = {target: onnx_lwdf.compress(residual(), target=target, **FAST).model for target in TARGETS}
SIGNED = ("arm", "tensorrt")


def zero_points(model: onnx.ModelProto) -> list[np.ndarray]:
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return [values[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]


def native_kernels(model: onnx.ModelProto, folder) -> Counter[str]:
    """Counts of the kernels; int8 activations stay int8, as on ARM (on x86 onnxruntime would rewrite them)."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("target", TARGETS)
def test_the_type_and_zero_point_of_activations(target):
    zeros = zero_points(MODELS[target])
    assert zeros
    assert {zero.dtype for zero in zeros} == {np.dtype(np.int8 if target in SIGNED else np.uint8)}
    assert all(zero == 0 for zero in zeros) == (target == "tensorrt")


def test_the_words_of_two_targets_mean_the_same():
    assert TARGETS["generic"] == TARGETS["x86"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_that_run(target, tmp_path):
    counts = native_kernels(MODELS[target], tmp_path)
    assert counts["QGemm"] == 1
    behind_a_relu_or_clip = 3
    assert counts["QLinearConv"] == (4 - behind_a_relu_or_clip if target == "tensorrt" else 4)
    assert counts["QLinearAdd"] == 1


@pytest.mark.parametrize("target", TARGETS)
def test_the_answers_are_near_float(target):
    feeds = samples(residual(), 16)
    assert sqnr_db(answers(residual(), feeds)[0], answers(MODELS[target], feeds)[0]) > 18
