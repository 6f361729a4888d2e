"""Folding leaves the float function as it was and keeps the statistics."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_lwdf.errors import ModelError
from onnx_lwdf.graph import Graph
from onnx_lwdf.precondition.fold import fold
from tests.nets import answers, residual, samples, with_weights

# Folding multiplies weights in float64 and rounds them once to float32: a few units in the last place.
ROUNDING = 1e-5


def test_function_is_unchanged_and_batchnorm_is_gone():
    model = residual()
    feeds, before = samples(model), answers(model, samples(model))
    statistics = fold(Graph(model))
    onnx.checker.check_model(model, full_check=True)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    np.testing.assert_allclose(answers(model, feeds)[0], before[0], rtol=ROUNDING, atol=ROUNDING)
    assert set(statistics) == {"a1", "c1", "d1"}  # the names of the tensors survive


def test_statistics_are_those_of_the_definition():
    model = residual()
    stored = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    statistics = fold(Graph(model))
    np.testing.assert_allclose(statistics["a1"].mean, stored["b0"])
    expected = np.abs(stored["g0"]) * np.sqrt(stored["v0"] / (stored["v0"] + 1e-5))
    np.testing.assert_allclose(statistics["a1"].deviation, expected)


PADDED = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,2,9,9] x) => (float[N,4,M,K] y) {
    p = Pad (x, widths, fill)
    a = Conv <strides = [2,2], pads = [1,0,0,1]> (p, w)
    b = Add (a, shift)
    c = Mul (b, factor)
    y = BatchNormalization (c, g, bb, m, v)
}
"""


def padded(fill: float = 0.0) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    tensors = {
        "w": rng.normal(size=(4, 2, 3, 3)),
        "shift": rng.normal(size=(1, 4, 1, 1)),
        "factor": np.array(1.7),
        "widths": np.array([0, 0, 0, 0, 0, 0, 1, 2], np.int64),
        "fill": np.array(fill),
        "g": rng.uniform(0.5, 1, 4),
        "bb": rng.normal(size=4),
        "m": rng.normal(size=4),
        "v": rng.uniform(0.5, 1, 4),
    }
    return with_weights(PADDED, tensors)


def test_pad_add_and_mul_join_the_layer():
    model = padded()
    feeds, before = samples(model), answers(model, samples(model))
    fold(Graph(model))
    assert [node.op_type for node in model.graph.node] == ["Conv"]
    assert list(model.graph.node[0].output) == ["y"]
    np.testing.assert_allclose(answers(model, feeds)[0], before[0], rtol=ROUNDING, atol=ROUNDING)


def test_pad_with_another_value_stays():
    model = padded(fill=1.0)
    feeds, before = samples(model), answers(model, samples(model))
    fold(Graph(model))
    assert "Pad" in {node.op_type for node in model.graph.node}
    np.testing.assert_allclose(answers(model, feeds)[0], before[0], rtol=ROUNDING, atol=ROUNDING)


def test_a_shared_weight_is_not_changed_for_the_other_reader():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,8,8] x) => (float[N,3,8,8] y, float[N,3,8,8] z) {
        a = Conv (x, w)
        y = BatchNormalization (a, g, b, m, v)
        z = Conv (x, w)
    }
    """
    rng = np.random.default_rng(0)
    tensors = {name: rng.uniform(0.5, 2, 3) for name in "gbmv"} | {"w": rng.normal(size=(3, 3, 1, 1))}
    model = with_weights(text, tensors)
    feeds, before = samples(model), answers(model, samples(model))
    fold(Graph(model))
    for exact, answer in zip(before, answers(model, feeds), strict=True):
        np.testing.assert_allclose(answer, exact, rtol=ROUNDING, atol=ROUNDING)


def test_a_reader_that_leads_nowhere_does_not_count():
    model = padded()
    model.graph.node.append(onnx.helper.make_node("Relu", ["c"], ["unused"]))
    fold(Graph(model))
    assert [node.op_type for node in model.graph.node] == ["Conv"]


def test_batchnorm_read_by_two_keeps_its_function():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,8,8] x) => (float[N,3,8,8] y) {
        a = Conv (x, w)
        b = BatchNormalization (a, g, bb, m, v)
        r = Sigmoid (a)
        y = Mul (b, r)
    }
    """
    rng = np.random.default_rng(0)
    tensors = {name: rng.uniform(0.5, 2, 3) for name in ("g", "bb", "m", "v")} | {"w": rng.normal(size=(3, 3, 1, 1))}
    model = with_weights(text, tensors)
    feeds, before = samples(model), answers(model, samples(model))
    fold(Graph(model))
    assert "BatchNormalization" in {node.op_type for node in model.graph.node}
    np.testing.assert_allclose(answers(model, feeds)[0], before[0], rtol=ROUNDING)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("v0", -1.0, "negative variance"),
        ("v0", np.nan, "NaN or infinite variance"),
        ("g1", np.inf, "NaN or infinite scale"),
        ("w2", np.nan, "NaN or infinite weights"),
    ],
)
def test_what_cannot_be_a_trained_network_is_refused(name, value, words):
    model = residual()
    tensor = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    with pytest.raises(ModelError, match=words):
        fold(Graph(model))


def test_statistics_follow_what_is_folded_behind_batchnorm():
    """BatchNormalization, then scale and shift: two nodes of the same meaning in files that came from Caffe."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,2,4,4] x) => (float[N,2,4,4] y) {
        a = Conv (x, w)
        b = BatchNormalization (a, one, beta, mean, variance)
        c = Mul (b, scale)
        d = Add (c, shift)
        y = Relu (d)
    }
    """
    values = {"w": np.ones((2, 2, 1, 1)), "one": np.ones(2), "beta": np.array([1.0, 2.0]), "mean": np.zeros(2)}
    values |= {"variance": np.array([4.0, 9.0]), "scale": np.array([[[2.0]], [[-3.0]]]), "shift": np.ones((2, 1, 1))}
    graph = Graph(with_weights(text, values))
    (known,) = fold(graph).items()
    assert known[0] == "d"
    np.testing.assert_allclose(known[1].mean, [3, -5], rtol=1e-6)
    np.testing.assert_allclose(known[1].deviation, [2, 3], rtol=1e-5)
