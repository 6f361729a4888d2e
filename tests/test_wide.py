"""Fully connected layers of a great many inputs, whose moments are kept by blocks: here of a few hundred."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import onnx_lwdf
from onnx_lwdf import layers
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import find_layers, input_blocks
from tests.nets import FAST, answers, samples, sqnr_db, with_weights

NET = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,12,12] x) => (float[N,5] y) {
    a = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w0, b0)
    r = Relu (a)
    f = Flatten (r)
    g = Gemm <transB = 1> (f, w1, b1)
    s = Relu (g)
    y = Gemm <transB = 1> (s, w2, b2)
}
"""
WIDE = 16 * 6 * 6
OPTIONS = [
    {},
    {"activation_bits": "float"},
    {"bits": 4, "method": "squant"},
    {"bits": 5, "method": "gptq"},
    {"activation_bits": "float", "weight_bits": 4, "activations_from": "none"},
    {"sparsity": 0.5},
    {"nm": (2, 4), "bits": 8},
    {"nm": (1, 3)},
    {"max_size": 0.2},
    {"channels": 0.25},
]


def net() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    shapes = {"w0": (16, 3, 3, 3), "w1": (24, WIDE), "w2": (5, 24), "b0": (16,), "b1": (24,), "b2": (5,)}
    return with_weights(NET, {name: rng.normal(0, shape[-1] ** -0.5, shape) for name, shape in shapes.items()})


@pytest.fixture
def narrowed(monkeypatch):
    monkeypatch.setattr(layers, "MOST_INPUTS", 100)
    monkeypatch.setattr(layers, "LARGEST_BLOCK", 80)
    monkeypatch.setattr(layers, "MULTIPLE", 8)


@pytest.mark.usefixtures("narrowed")
def test_only_pointwise_layers_of_many_inputs_are_split():
    graph = Graph(net())
    assert [input_blocks(graph, layer) for layer in find_layers(graph)[0]] == [1, WIDE // 72, 1]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_answers_are_as_good_as_with_all_correlations(options, monkeypatch, request):
    """Within 3 dB: 16 samples know little of the correlations of 576 inputs, and what they tell beyond is chance."""
    source, feeds = net(), samples(net(), 64)
    exact = answers(source, feeds)[0]
    whole = answers(onnx_lwdf.compress(source, **FAST, **options).model, feeds)[0]
    request.getfixturevalue("narrowed")
    split = answers(onnx_lwdf.compress(source, **FAST, **options).model, feeds)[0]
    assert sqnr_db(exact, split) > sqnr_db(exact, whole) - 3
    assert not np.array_equal(whole, split) or "channels" in options or options.get("method") == "squant"
