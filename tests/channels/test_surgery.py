"""A channel that carries nothing is taken out of everything that holds it, and nothing changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_lwdf.activations.taps import sample, tensor_shapes
from onnx_lwdf.channels.spread import pooled_sources, spread
from onnx_lwdf.channels.surgery import cut
from onnx_lwdf.channels.ties import tie_channels
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import find_layers, weight_of
from tests.channels.nets import constant_channels, other_twins, twins
from tests.nets import answers, samples, sqnr_db, with_weights

EXACT_DB = 70  # float32 moments, and a ridge of 1e-4
PARTNERS_LAST = {"a0": 11, "p": 7, "q0": 9, "e0": 5, "t0": 8, "v0": 6}  # tensor -> its channel that goes
OTHERS_LAST = {"a0": 5, "u0": 4, "c0": 8, "h0": 6}


def without(model, gone):
    """The model without these channels of tensors, the layers and the samples that go with it, and how they were."""
    graph = Graph(onnx.ModelProto.FromString(model.SerializeToString()))
    layers, _ = find_layers(graph)
    feed = samples(model, 400, seed=5)  # more than the 112 inputs of the classifier
    made = [name for node in graph.nodes for name in node.output]
    ties = tie_channels(graph, layers, tensor_shapes(graph.model, ["x", *made], feed))
    sources = pooled_sources(graph, layers)
    seen = sample(graph.model, layers, made, [feed], np.random.default_rng(0), {}, None)
    spreads = {layer.name: spread(layer, seen, sources) for layer in layers if layer.groups == 1}
    units = [ties.units[name][channel] for name, channel in gone.items()]
    assert not any(unit in ties.reasons for unit in units)
    kept = {name: ~np.isin(members, units) for name, members in ties.units.items()}
    done, smaller = cut(graph, layers, seen, ties, spreads, kept)
    graph.commit()
    return graph.model, done, smaller, seen, kept


def shapes(model):
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


@pytest.mark.parametrize("make", [twins, constant_channels])
def test_residuals_depthwise_gates_concatenations_and_flattened_maps(make):
    source = make()
    model, *_ = without(source, PARTNERS_LAST)
    onnx.checker.check_model(model, full_check=True)
    now = shapes(model)
    rows = {"w0": 11, "wd": 11, "slope": 11, "w1": 7, "w2": 9, "w3": 7, "w4": 5, "w5": 7, "w6": 8, "w7": 6, "w8": 4}
    columns = {"w1": 11, "w2": 7, "w3": 9, "w4": 7, "w5": 5, "w6": 7, "w7": 15, "w8": 96}
    assert {name: now[name][0] for name in rows} == rows
    assert {name: now[name][1] for name in columns} == columns
    feeds = samples(source, 8)
    assert sqnr_db(answers(source, feeds)[0], answers(model, feeds)[0]) > EXACT_DB


def test_transposed_convolutions_matmuls_and_a_reshape_that_names_the_channels():
    source = other_twins()
    model, *_ = without(source, OTHERS_LAST)
    onnx.checker.check_model(model, full_check=True)
    now = shapes(model)
    assert [now[name][:2] for name in ("w0", "w1", "w2", "w3", "w4")] == [(5, 3), (5, 4), (8, 4), (8, 6), (6, 3)]
    feeds = samples(source, 8)
    assert sqnr_db(answers(source, feeds)[0], answers(model, feeds)[0]) > EXACT_DB


def test_samples_are_those_of_the_smaller_layers():
    model, done, smaller, seen, kept = without(twins(), PARTNERS_LAST)
    graph = Graph(model)
    for item, layer in zip(done, find_layers(graph)[0], strict=True):
        assert item.layer.name == layer.name
        assert (item.layer.groups, item.layer.window) == (layer.groups, layer.window)
        groups, _, inputs = weight_of(graph, layer).shape
        assert smaller.moments[layer.name].mean.shape == (groups, inputs)
        assert smaller.moments[layer.name].hessian.shape == (groups, inputs, inputs)
    for name, values in smaller.values.items():
        np.testing.assert_array_equal(values, seen.values[name][kept[name]])


def test_layers_that_share_a_weight_lose_the_same_channels():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,8,8] x) => (float[N,2] y) {
        a = Conv (x, w)
        b = Relu (a)
        c = Conv (b, v)
        d = Relu (c)
        e = Conv (d, v)
        g = GlobalAveragePool (e)
        f = Flatten (g)
        y = Gemm (f, z)
    }
    """
    rng = np.random.default_rng(0)
    drawn = {"w": rng.normal(size=(6, 3, 1, 1)), "v": rng.normal(0, 0.4, (6, 6, 1, 1)), "z": rng.normal(size=(6, 2))}
    drawn["w"][5], drawn["v"][5] = drawn["w"][0], drawn["v"][0]
    source = with_weights(text, drawn)
    model, *_ = without(source, {"a": 5})
    feeds = samples(source)
    assert sqnr_db(answers(source, feeds)[0], answers(model, feeds)[0]) > EXACT_DB
    weights = [shapes(model)[node.input[1]] for node in model.graph.node if node.op_type == "Conv"]
    assert weights == [(5, 3, 1, 1), (5, 5, 1, 1), (5, 5, 1, 1)]
