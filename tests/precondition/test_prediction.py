"""The predicted error follows the laws of rounding, and counts what the gradients say."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lwdf import compress
from onnx_lwdf.activations.moments import Moments
from onnx_lwdf.activations.taps import Samples
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, find_layers
from onnx_lwdf.precondition.channels import find_groups
from onnx_lwdf.precondition.prediction import predicted_error
from onnx_lwdf.precondition.readers import ALIKE, Gated, answers_to
from onnx_lwdf.precondition.transform import diagonal
from onnx_lwdf.solvers.gptq import conditional_variances
from tests.nets import FAST, answers, samples, sqnr_db, with_weights

CHANNELS, VALUES = 6, 4096
TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,4,4] x) => (float[N,5,4,4] y) {
    a = Conv (x, w0, b0)
    b = Relu (a)
    y = Conv (b, w1, b1)
}
"""


def group_and_samples():
    rng = np.random.default_rng(0)
    shapes = {"w0": (CHANNELS, 3, 1, 1), "b0": CHANNELS, "w1": (5, CHANNELS, 1, 1), "b1": 5}
    graph = Graph(with_weights(TEXT, {name: rng.normal(size=shape) for name, shape in shapes.items()}))
    layers, _ = find_layers(graph)
    (group,) = find_groups(graph, layers)
    values = {name: rng.normal(size=(count, VALUES)).astype(np.float32) for name, count in (("x", 3), ("a", CHANNELS))}
    values["b"] = np.maximum(values["a"], 0)
    moments = {
        layer.name: Moments(
            values[layer.input].mean(1)[None].astype(np.float64),
            (values[layer.input] @ values[layer.input].T / VALUES)[None].astype(np.float64),
            np.zeros(1),
        )
        for layer in layers
    }
    return graph, layers, group, Samples(moments, values)


def predicted(weight_bits, activation_bits, gradients, transform=None):
    graph, layers, group, samples = group_and_samples()
    plan = {layer.name: Bits(weight_bits, activation_bits) for layer in layers}
    answers = answers_to(graph, group, plan, samples, Gated({}, {}), gradients)
    importance = {layer.name: conditional_variances(samples.moments[layer.name].hessian) for layer in group.producers}
    return predicted_error(
        graph, group, plan, samples, answers, {}, importance, transform or diagonal(np.ones(CHANNELS))
    )


def gradients(grid=1.0, weights=1.0):
    return {"b": np.full(CHANNELS, grid), "a": np.full(CHANNELS, weights), "y": np.full(5, weights)}


@pytest.mark.parametrize("which", [{"weights": 1e-12}, {"grid": 1e-12}], ids=["activations", "weights"])
def test_a_bit_less_costs_four_times_as_much(which):
    """Half the steps, four times the power of rounding; clipping makes it less. Three bits in one: weights are few."""
    first, last = (predicted(bits, bits, gradients(**which)) for bits in (8, 5))
    assert 3 < (last / first) ** (1 / 3) < 4.5


def test_errors_of_weights_count_as_errors_that_are_alike_over_positions():
    """By hand, at 8 bits: uniform errors of a step, one scale per output channel."""
    found = predicted(8, 8, gradients(grid=1e-12))
    graph, layers, _, samples = group_and_samples()
    by_hand = 0.0
    for layer in layers:
        weight = graph.constant(layer.weight).reshape(-1, samples.values[layer.input].shape[0]).astype(np.float64)
        step = np.abs(weight).max(1) / 127
        power = np.diagonal(samples.moments[layer.name].hessian[0]).sum()
        by_hand += ALIKE * float((step**2 / 12 * power).sum())
    # Columns carry each other's errors, which only lowers them; the few weights of a row are no uniform sample of errors.
    assert 0.2 * by_hand < found < 1.5 * by_hand


def test_the_answer_is_in_the_units_of_the_gradients():
    one = predicted(6, 6, gradients())
    assert predicted(6, 6, gradients(3.0, 3.0)) == pytest.approx(3 * one)
    # A channel that is doubled has half the gradient: read back, all is as it was, but for the grid that all channels share.
    same = diagonal(np.full(CHANNELS, 2.0))
    assert predicted(6, 6, gradients(), same) == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("size", [1.0, 100.0, 1e6])
def test_outputs_that_never_vary_are_no_reason_to_overflow(linear, size):
    """A dead layer behind which weights are large: nothing is known of what an error adds to its readers' outputs."""
    rng = np.random.default_rng(0)
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,12,12] x) => (float[N,4,12,12] y) {
        a = Conv <pads = [1,1,1,1]> (x, w0, b0)
        b = Relu (a)
        c = Conv (b, w1, b1)
        d = Relu (c)
        e = Conv (d, w2)
        f = Conv (x, w3)
        y = Add (e, f)
    }
    """
    if linear:  # a bottleneck, whose channels may be mixed
        text = text.replace("d = Relu (c)", "").replace("(d, w2)", "(c, w2)")
    shapes = {"w0": (6, 3, 3, 3), "w1": (8, 6, 1, 1), "b1": 8, "w2": (4, 8, 1, 1), "w3": (4, 3, 1, 1)}
    tensors = {name: rng.normal(0, size, shape) for name, shape in shapes.items()}
    tensors |= {"w0": tensors["w0"] / size / 10, "b0": np.full(6, -50.0)}  # no value gets through the Relu
    model = with_weights(text, tensors)
    done, feeds = compress(model, **FAST), samples(model)
    assert sqnr_db(answers(model, feeds)[0], answers(done.model, feeds)[0]) > 30
