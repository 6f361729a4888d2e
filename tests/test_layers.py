"""Every weighted node is listed once, with its canonical weight or its reason."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lwdf.config import Config
from onnx_lwdf.errors import OptionError
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import bias_of, find_layers, from_canonical, set_bias, set_weight, to_canonical, weight_of
from onnx_lwdf.plan import first_and_last, plan_bits
from tests.nets import answers, residual, samples, with_weights

EVERY = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,4,8,8] x, float[4,4,3,3] w_in, float[2,2] two) => (float[N,6,17,17] y, float[N,3] z) {
    a = Conv <group = 2, pads = [1,1,1,1]> (x, wg)
    b = Conv <pads = [1,1,1,1]> (a, w_in)
    u = ConvTranspose <strides = [2,2]> (b, wt, bt)
    y = Identity (u)
    p = GlobalAveragePool (b)
    f = Flatten (p)
    g = Gemm <alpha = 0.5> (f, wm)
    h = MatMul (f, wm)
    i = Add (h, bm)
    z = Add (g, i)
    unused = Conv (x, ws)
    left = MatMul (wl, two)
}
"""


def every():
    rng = np.random.default_rng(0)
    shapes = {"wg": (4, 2, 3, 3), "wt": (4, 6, 3, 3), "bt": 6, "wm": (4, 3), "bm": 3, "ws": (4, 4, 3, 3), "wl": (2, 2)}
    return with_weights(EVERY, {name: rng.normal(size=shape) for name, shape in shapes.items()})


def test_each_once_with_its_reason():
    graph = Graph(every())
    layers, skipped = find_layers(graph)
    weighted = [node for node in graph.nodes if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    assert len(layers) + len(skipped) == len(weighted)
    assert {layer.node.output[0] for layer in layers} == {"a", "u", "h", "unused"}
    reasons = {layer.name: layer.reason for layer in skipped}
    assert reasons == {
        "conv_1": "the weight is not constant",
        "gemm_6": "alpha or beta is not 1",
        "matmul_11": "the constant is on the left side",
    }
    assert next(layer for layer in layers if layer.op == "MatMul").output == "i"  # its bias stands in the Add behind it


def test_excluded_layers_say_so():
    _, skipped = find_layers(Graph(residual()), ["Gemm", "conv_0"])
    assert {(layer.op, layer.reason) for layer in skipped} == {("Gemm", "excluded"), ("Conv", "excluded")}


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_canonical_conv_weight_against_its_definition(groups):
    stored = np.random.default_rng(0).normal(size=(8, 4 // groups, 3, 2)).astype(np.float32)
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,4,6,6] x) => (float[N,8,4,5] y) {{ y = Conv <group = {groups}> (x, w) }}
    """
    model = with_weights(text, {"w": stored})
    (layer,), _ = find_layers(Graph(model))
    weight = to_canonical(layer, stored)
    per_group, channels = 8 // groups, 4 // groups
    for o in range(8):
        for i in range(channels):
            for ky in range(3):
                for kx in range(2):
                    place = (ky * 2 + kx) * channels + i
                    assert weight[o // per_group, o % per_group, place] == stored[o, i, ky, kx]
    np.testing.assert_array_equal(from_canonical(layer, weight, stored.shape), stored)


@pytest.mark.parametrize("output", ["a", "u", "h", "unused"])
def test_canonical_form_round_trips_and_is_written_where_it_was(output):
    model = every()
    graph = Graph(model)
    layers, _ = find_layers(graph)
    layer = next(layer for layer in layers if layer.node.output[0] == output)
    before = answers(model, samples(model))
    set_weight(graph, layer, weight_of(graph, layer))
    set_bias(graph, layer, np.zeros(1) if layer.bias is None else bias_of(graph, layer))
    graph.commit()
    for exact, answer in zip(before, answers(model, samples(model)), strict=True):
        np.testing.assert_allclose(answer, exact, rtol=1e-5, atol=1e-5)


def test_first_and_last_and_patterns():
    graph = Graph(residual())
    layers, skipped = find_layers(graph)
    assert first_and_last(graph) == ({"a0"}, {"y"})
    plan = plan_bits(graph, layers, skipped, Config(weight_bits=4, activation_bits=6, bits_for={"conv_9": 5}))
    found = {layer.node.output[0]: (plan[layer.name].weight, plan[layer.name].activation) for layer in layers}
    assert found == {"a0": (8, 8), "c0": (4, 6), "d0": (4, 6), "e0": (5, 5), "y": (8, 8)}
    everywhere = plan_bits(graph, layers, skipped, Config(weight_bits=4, activation_bits=4, keep_first_last=False))
    assert {bits.weight for bits in everywhere.values()} == {4}


@pytest.mark.parametrize("option", ["bits_for", "exclude"])
def test_a_pattern_that_names_nothing_is_an_error(option):
    graph = Graph(residual())
    value = {"nothing*": 4} if option == "bits_for" else ("nothing*",)
    layers, skipped = find_layers(graph)
    with pytest.raises(OptionError, match="matches no layer"):
        plan_bits(graph, layers, skipped, Config(**{option: value}))
