"""No image exceeds the bounds, and the worst one reaches them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnx_lwdf.activations.inputs import read_inputs
from onnx_lwdf.config import Config
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import find_layers
from onnx_lwdf.precondition.bounds import highest, pixel_ranges
from tests.nets import answers, with_weights

NET = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,6,6,3] x) => (float[N,4,K,K] y, float[N,2,M,M] z) {
    t = Transpose <perm = [0,3,1,2]> (x)
    y = Conv <pads = [1,1,1,1]> (t, w0, b0)
    z = Conv (y, w1)
}
"""


def model():
    rng = np.random.default_rng(0)
    return with_weights(
        NET, {"w0": rng.normal(size=(4, 3, 3, 3)), "b0": rng.normal(size=4), "w1": np.ones((2, 4, 1, 1))}
    )


def test_the_worst_image_reaches_the_bound_and_no_other_exceeds_it():
    net = model()
    graph = Graph(net)
    inputs, _ = read_inputs(graph, Config(input_range=(-2.0, 1.0)), {})
    first, second = find_layers(graph)[0]
    ranges = pixel_ranges(graph, inputs)
    assert ranges == {"x": (-2.0, 1.0), "t": (-2.0, 1.0)}
    bound = highest(graph, first, ranges)
    weight = graph.constant("w0").astype(np.float64)
    for channel in range(4):
        worst = np.where(weight[channel] > 0, 1.0, -2.0)  # [3, 3, 3]: under the kernel when it stands inside
        image = np.zeros((1, 3, 6, 6), np.float32)
        image[0, :, 1:4, 1:4] = worst
        answer = answers(net, {"x": image.transpose(0, 2, 3, 1)})[0]
        np.testing.assert_allclose(answer[0, channel].max(), bound[channel], rtol=1e-5)  # float32 sums of 27 products
    images = np.random.default_rng(1).uniform(-2, 1, (50, 6, 6, 3)).astype(np.float32)
    assert (answers(net, {"x": images})[0].max((0, 2, 3)) < bound).all()
    assert np.isinf(highest(graph, second, ranges)).all()  # what stands behind a layer has no range of pixels


def test_an_assumed_normalization_bounds_nothing():
    inputs, _ = read_inputs(Graph(model()), Config(input_range=(-2.0, 1.0)), {})
    assert pixel_ranges(Graph(model()), [replace(spec, inferred=False) for spec in inputs]) == {}
