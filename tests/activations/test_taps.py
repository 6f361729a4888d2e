"""Taps see what the network computes; aligned and Gaussian activations have the stored statistics."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import onnx
import pytest

from onnx_lwdf.activations import taps
from onnx_lwdf.activations.aligned import align
from onnx_lwdf.activations.sources import SOURCES
from onnx_lwdf.activations.taps import pads_for, sample, tensor_shapes
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Window, find_layers, weight_of
from onnx_lwdf.precondition.fold import fold
from tests.nets import answers, residual, samples, with_weights


def folded():
    model = residual()
    graph = Graph(model)
    statistics = fold(graph)
    return model, graph, statistics, find_layers(graph)[0]


def test_patches_times_weights_are_the_layers_output(monkeypatch):
    """With every position sampled, W E[x] is the mean of the convolution's own output, whatever its geometry."""
    monkeypatch.setattr(taps, "MOST_POSITIONS", 2**20)
    model, graph, _, layers = folded()
    feed = samples(model, 8)
    seen = sample(model, layers, [], [feed], np.random.default_rng(0), MappingProxyType({}), None)
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    outputs = [layer.output for layer in layers]
    exposed.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs if name != "y")
    values = dict(zip(["y", *outputs[:-1]], answers(exposed, feed, optimize=False), strict=True))
    for layer in layers:
        weight, node = weight_of(graph, layer), layer.node
        bias = graph.constant(node.input[2]) if len(node.input) > 2 else 0.0
        expected = values[layer.output].mean(axis=(0, *range(2, values[layer.output].ndim)))
        answer = np.einsum("goi,gi->go", weight, seen.moments[layer.name].mean).ravel() + bias
        np.testing.assert_allclose(answer, expected, rtol=1e-3, atol=1e-4)  # float32 convolutions


def test_shapes_are_those_of_a_single_sample_where_the_batch_is_open_as_minus_one():
    model, _, statistics, _ = folded()
    feed = samples(model, 8)
    expected = tensor_shapes(model, statistics, feed)
    assert {shape[0] for shape in expected.values()} == {1}
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert tensor_shapes(model, statistics, feed) == expected


def test_aligned_tensors_have_the_stored_mean_and_deviation():
    model, graph, statistics, _ = folded()
    shapes = tensor_shapes(model, statistics, samples(model))
    names = {name: align(graph, name, known, shapes[name]) for name, known in statistics.items()}
    del model.graph.output[:]
    graph.outputs = list(names.values())
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in graph.outputs)
    graph.commit()
    for (_, known), value in zip(statistics.items(), answers(model, samples(model, 8)), strict=True):
        np.testing.assert_allclose(value.mean((0, 2, 3)), known.mean, atol=1e-4)
        np.testing.assert_allclose(value.std((0, 2, 3)), known.deviation, rtol=1e-3)


@pytest.mark.parametrize("source", ["aligned", "gaussian"])
def test_layer_inputs_behind_a_relu_have_the_statistics_of_a_clipped_gaussian(source):
    """E[relu(z)] of z ~ N(mean, deviation^2) in closed form; aligned activations need not be Gaussian, only near."""
    from math import erf, exp, pi, sqrt

    model, _, statistics, layers = folded()
    chunks = [samples(model, 16, seed) for seed in range(4)]
    seen = sample(model, layers, ["a2"], chunks, np.random.default_rng(0), statistics, SOURCES[source])
    known = statistics["a1"]
    pairs = zip(known.mean, known.deviation, strict=True)
    expected = [m * (1 + erf(m / s / sqrt(2))) / 2 + s * exp(-((m / s) ** 2) / 2) / sqrt(2 * pi) for m, s in pairs]
    np.testing.assert_allclose(seen.values["a2"].mean(1), expected, atol=0.08 if source == "gaussian" else 0.2)


def test_moments_and_values_are_what_keep_made_of_them():
    """Of a model too large for memory, samples are in files."""
    model, graph, _, layers = folded()
    kept = []

    def keep(array):
        kept.append(array.copy())
        return kept[-1]

    chunks = [samples(model, 4)]
    tensors = [layer.input for layer in layers]
    found = sample(graph.model, layers, tensors, chunks, np.random.default_rng(0), {}, None, keep)
    held = {id(array) for array in kept}
    assert {id(value) for value in found.values.values()} <= held
    assert {id(moments.hessian) for moments in found.moments.values()} <= held


def test_gaussian_draws_are_uncorrelated_and_seeded():
    model, _, statistics, layers = folded()
    chunks = [samples(model, 16)]
    runs = [
        sample(model, layers, ["d1"], chunks, np.random.default_rng(0), statistics, SOURCES["gaussian"]).values["d1"]
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*runs)
    correlation = np.corrcoef(runs[0])
    assert np.abs(correlation - np.eye(8)).max() < 0.15  # 2,048 draws: 6 standard errors


def test_row_taps_of_a_matmul():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,7,4] x) => (float[N,7,3] y) { y = MatMul (x, w) }
    """
    model = with_weights(text, {"w": np.random.default_rng(0).normal(size=(4, 3))})
    layers, _ = find_layers(Graph(model))
    feed = samples(model, 5)
    seen = sample(model, layers, ["x"], [feed], np.random.default_rng(0), MappingProxyType({}), None)
    np.testing.assert_allclose(seen.moments[layers[0].name].mean[0], feed["x"].mean((0, 1)), rtol=1e-5, atol=1e-6)
    assert seen.values["x"].shape == (4, 35)


@pytest.mark.parametrize(
    ("auto_pad", "size", "expected"),
    [("SAME_UPPER", 8, ((0,), (1,))), ("SAME_LOWER", 8, ((1,), (0,))), ("SAME_UPPER", 7, ((1,), (1,)))],
)
def test_auto_pad(auto_pad, size, expected):
    assert pads_for(Window((3,), (2,), (1,), None, auto_pad), [size]) == expected
