"""Aligned tensors have the statistics that BatchNormalization stored, and reach no further than it lets them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_lwdf.activations.aligned import align
from onnx_lwdf.graph import Graph
from onnx_lwdf.statistics import ChannelStatistics
from tests.nets import answers

TEXT = """
<ir_version: 8, opset_import: ["" : %d]>
net (float[N,3,16,16] x) => (float[N,3,16,16] y) {
    a = Relu (x)
    y = Identity (a)
}
"""
MEAN, GAMMA = np.array([0.5, -2.0, 1.0]), np.array([1.0, 0.1, 2.0])


def aligned(values, *, opset=17, gamma=GAMMA, size=1.0):
    graph = Graph(onnx.parser.parse_model(TEXT % opset))
    known = ChannelStatistics(size * MEAN, size * GAMMA, None if gamma is None else size * gamma)
    (reader,) = graph.consumers["a"]
    graph.connect(reader, 0, align(graph, "a", known, values.shape))
    graph.commit()
    return answers(graph.snapshot(), {"x": values})[0].astype(np.float64)


def images():
    """The second channel answers to one position in 4,096."""
    values = np.random.default_rng(0).uniform(0, 1, (16, 3, 16, 16)).astype(np.float32)
    values[:, 1] = 0
    values[3, 1, 2, 5] = 0.01
    return values


@pytest.mark.parametrize("size", [1, 1e-6, 1e-12])
def test_means_and_deviations_are_the_stored_ones(size):
    """However small the values are that the layer puts out."""
    found = aligned(np.float32(size) * images(), size=size)[:, [0, 2]] / size
    np.testing.assert_allclose(found.mean((0, 2, 3)), MEAN[[0, 2]], atol=1e-4)
    np.testing.assert_allclose(found.std((0, 2, 3)), GAMMA[[0, 2]], rtol=1e-4)


@pytest.mark.parametrize(("opset", "gamma"), [(17, GAMMA), (8, GAMMA), (7, GAMMA), (17, None)])
def test_what_a_few_positions_are_made_of_is_bounded_where_batchnormalization_tells(opset, gamma):
    most = aligned(images(), opset=opset, gamma=gamma)[:, 1].max()
    bounded = opset >= 8 and gamma is not None
    # Of n values one is c and the others are 0: it is sqrt(n - 1) deviations from the mean.
    np.testing.assert_allclose(most, -2.0 + 0.1 * (12 if bounded else np.sqrt(4095)), rtol=1e-3)
