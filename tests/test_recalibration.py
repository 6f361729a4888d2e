"""Channels get back their means and deviations; nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, bias_of, find_layers, weight_of
from onnx_lwdf.layerwise import Solved
from onnx_lwdf.recalibration import MOST_CHANGED, recalibrate
from onnx_lwdf.solvers.problem import LayerSolution, Rounding
from onnx_lwdf.statistics import ChannelStatistics
from tests.nets import answers, with_weights

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,12,12] x) => (float[N,4,12,12] y) {
    a = Conv <pads = [1,1,1,1]> (x, w0, b0)
    r = Relu (a)
    c = Conv (r, w1, b1)
    t = Tanh (c)
    y = Conv (t, w2)
}
"""


def network() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    shapes = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (6, 8, 1, 1), "b1": (6,), "w2": (4, 6, 1, 1)}
    return with_weights(TEXT, {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()})


def chunks(number: int = 2) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(8, 3, 12, 12)).astype(np.float32)} for _ in range(number)]


def damaged(graph: Graph, factor: float, shift: float) -> list[Solved]:
    """Every layer's answer is the float one, each channel's output scaled and shifted."""
    found = []
    for layer in find_layers(graph)[0]:
        weight, bias = factor * weight_of(graph, layer), factor * bias_of(graph, layer) + shift
        solution = LayerSolution(weight, None, 0.0)
        found.append(Solved(layer, Bits(None, None), "", solution, bias, np.zeros_like(bias), None))
    return found


@pytest.mark.parametrize("known", [False, True])
def test_scaled_and_shifted_channels_come_back_exactly(known):
    """Also with stored statistics that are far from what the samples have: they only steer what layers meet."""
    graph = Graph(network())
    statistics = {"a": ChannelStatistics(np.linspace(-1, 1, 8), np.linspace(0.5, 2, 8))} if known else {}
    restored = recalibrate(graph, damaged(graph, 1.3, 0.4), statistics, chunks())
    for answer in restored[:2]:
        np.testing.assert_allclose(answer.solution.weight, weight_of(graph, answer.layer), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(answer.bias, bias_of(graph, answer.layer), atol=1e-3)


def test_outputs_of_the_model_and_the_graph_stay_as_they_are():
    graph = Graph(network())
    before = answers(graph.snapshot(), chunks()[0])
    given = damaged(graph, 1.3, 0.4)
    restored = recalibrate(graph, given, {}, chunks())
    assert restored[2] is given[2]
    np.testing.assert_array_equal(answers(graph.snapshot(), chunks()[0])[0], before[0])


def test_mean_and_deviation_of_a_damaged_network_are_those_of_the_float_network():
    """By onnxruntime, layer by layer behind each other, on the samples that were given."""
    graph = Graph(network())
    rng = np.random.default_rng(2)
    given = [
        replace(
            one, solution=LayerSolution(one.solution.weight + rng.normal(0, 0.15, one.solution.weight.shape), None, 0)
        )
        for one in damaged(graph, 1.0, 0.0)
    ]
    samples = chunks(1)
    restored = recalibrate(graph, given, {}, samples)

    def first(weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """The first layer's output by a plain sum over the window."""
        x = np.pad(samples[0]["x"].astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
        patches = np.stack([x[:, :, i : i + 12, j : j + 12] for i in range(3) for j in range(3)])
        return np.einsum("okc,kncij->noij", weight[0].reshape(8, 9, 3), patches) + bias[:, None, None]

    exact = first(weight_of(graph, restored[0].layer), bias_of(graph, restored[0].layer))
    now = first(restored[0].solution.weight, restored[0].bias)
    np.testing.assert_allclose(now.mean((0, 2, 3)), exact.mean((0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(now.std((0, 2, 3)), exact.std((0, 2, 3)), rtol=1e-4)


def test_codes_stay_and_scales_move_at_most_by_the_limit():
    graph = Graph(network())
    given = []
    for one in damaged(graph, 1.0, 0.0):
        scale = np.full(one.solution.weight.shape[:2], 0.25)
        codes = np.rint(one.solution.weight / 0.25 / 8).astype(np.int8)  # an eighth of the weight: far beyond the limit
        rounding = Rounding(codes, scale)
        given.append(replace(one, solution=LayerSolution(scale[..., None] * codes, rounding, 0.0)))
    for old, new in zip(given, recalibrate(graph, given, {}, chunks()), strict=True):
        assert new.solution.rounding.codes is old.solution.rounding.codes
        ratio = new.solution.rounding.scale / old.solution.rounding.scale
        assert ratio.max() <= MOST_CHANGED * (1 + 1e-6)
        np.testing.assert_array_equal(
            new.solution.weight, new.solution.rounding.scale[..., None] * new.solution.rounding.codes
        )
