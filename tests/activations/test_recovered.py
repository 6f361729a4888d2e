"""A network with BatchNormalization is its own oracle: what it stored is recovered from its folded form."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lwdf.activations.images import scenes
from onnx_lwdf.activations.recovered import bottlenecks, left_over, recover
from onnx_lwdf.config import Config
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Layer, bias_of, find_layers, set_bias, set_weight, weight_of
from onnx_lwdf.precondition.fold import fold
from onnx_lwdf.preparation import prepare
from onnx_lwdf.runtime import copy_of
from onnx_lwdf.statistics import Statistics, origin
from tests.nets import answers, samples, trained, with_weights

BLOCKS = 3


def bottleneck_net(seed: int = 0, feeds: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    """Expansion-BN-Relu, projection-BN, three times, the last two residual; then a layer behind a Relu.

    Trained on standard normal values, or these; the projections have beta 0 and gammas of one rms.
    """
    rng = np.random.default_rng(seed)
    lines, source, width, tensors = [], "x", 3, {}
    for i in range(BLOCKS):
        shapes = {f"we{i}": (24, width, 1, 1), f"wp{i}": (8, 24, 1, 1)}
        tensors |= {name: rng.normal(0, 1 / np.sqrt(shape[1]), shape) for name, shape in shapes.items()}
        for kind, channels, shift in (("e", 24, rng.normal(0.3, 0.3, 24)), ("p", 8, np.zeros(8))):
            tensors |= {f"g{kind}{i}": rng.permutation(np.linspace(0.7, 1.3, channels)), f"b{kind}{i}": shift}
            tensors |= {f"m{kind}{i}": np.zeros(channels), f"v{kind}{i}": np.ones(channels)}
        lines += [
            f"a{i} = Conv ({source}, we{i})",
            f"e{i} = BatchNormalization (a{i}, ge{i}, be{i}, me{i}, ve{i})",
            f"r{i} = Relu (e{i})",
            f"c{i} = Conv (r{i}, wp{i})",
            f"p{i} = BatchNormalization (c{i}, gp{i}, bp{i}, mp{i}, vp{i})",
            *([f"s{i} = Add ({source}, p{i})"] if i else []),
        ]
        source, width = (f"s{i}" if i else f"p{i}"), 8
    tensors |= {"wz": rng.normal(size=(5, 8, 1, 1)), "wy": rng.normal(size=(4, 5, 1, 1))}
    lines += [f"z = Conv ({source}, wz)", "rz = Relu (z)", "y = Conv (rz, wy)"]
    body = "\n".join(lines)
    text = f'<ir_version: 8, opset_import: ["" : 17]> net (float[N,3,12,12] x) => (float[N,4,12,12] y) {{ {body} }}'
    return trained(with_weights(text, tensors), feeds)


def folded(model: onnx.ModelProto) -> tuple[Graph, list[Layer], Statistics]:
    """The network without BatchNormalization, and what it had stored."""
    graph = Graph(model)
    stored = fold(graph)
    return graph, find_layers(graph)[0], stored


def chunks(graph: Graph) -> list[dict[str, np.ndarray]]:
    return [samples(graph.model, 16, seed=seed) for seed in (2, 3)]


def layer_behind(layers: list[Layer], tensor: str) -> Layer:
    return next(layer for layer in layers if layer.output == tensor)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


@pytest.mark.parametrize("seed", range(3))
def test_what_batchnorm_stored_comes_back(seed):
    """On inputs like those of the training nothing starves."""
    graph, layers, stored = folded(bottleneck_net(seed))
    found = recover(graph, layers, {}, chunks(graph))
    assert found.keys() == {f"p{i}" for i in range(BLOCKS)}
    for name, known in found.items():
        np.testing.assert_array_equal(known.mean, stored[name].mean)
        np.testing.assert_allclose(known.deviation, stored[name].deviation, rtol=0.1)


@settings(max_examples=10, deadline=None)
@given(starved=st.integers(0, BLOCKS - 1), factor=st.floats(0.01, 0.5))
def test_a_starved_bottleneck_has_the_typical_deviation(starved, factor):
    """Weights and bias smaller by a factor: as if the images excited the block too little."""
    graph, layers, _ = folded(bottleneck_net())
    layer = layer_behind(layers, f"p{starved}")
    set_weight(graph, layer, factor * weight_of(graph, layer))
    set_bias(graph, layer, factor * bias_of(graph, layer))
    graph.commit()
    names = [f"p{i}" for i in range(BLOCKS)]
    runs = [answers(copy_of(graph.model, names), feed) for feed in chunks(graph)]
    seen = {
        name: np.concatenate(found).std((0, 2, 3)) for name, found in zip(names, zip(*runs, strict=True), strict=True)
    }
    found = recover(graph, find_layers(graph)[0], {}, chunks(graph))
    typical = np.median([rms(deviation) for deviation in seen.values()])
    assert rms(found[f"p{starved}"].deviation) == pytest.approx(typical, rel=0.05)
    lift = found[f"p{starved}"].deviation / seen[f"p{starved}"]
    np.testing.assert_allclose(lift, lift[0], rtol=0.1)  # one factor for all channels


def test_biases_that_cancel_no_mean_tell_nothing():
    graph, layers, _ = folded(bottleneck_net())
    rng = np.random.default_rng(0)
    for i in range(BLOCKS):
        layer = layer_behind(layers, f"p{i}")
        set_bias(graph, layer, rng.normal(0, rms(bias_of(graph, layer)), 8))
    graph.commit()
    assert recover(graph, find_layers(graph)[0], {}, chunks(graph)) == {}


def test_without_biases_there_is_nothing_to_read():
    graph, layers, _ = folded(bottleneck_net())
    for i in range(BLOCKS):
        set_bias(graph, layer_behind(layers, f"p{i}"), np.zeros(8))
    graph.commit()
    assert bottlenecks(graph, find_layers(graph)[0], {}) == []


def test_few_biases_are_no_evidence():
    """Of one projection alone: its eight could cancel its mean by chance."""
    graph, _, _ = folded(bottleneck_net())
    for i in (1, 2):
        graph.reroute([graph.producer[f"s{i}"]], f"p{i}", graph.producer[f"s{i}"].input[0])
    graph.commit()
    layers = find_layers(graph)[0]
    assert {layer.output for layer in layers} == {"e0", "p0", "z", "y"}
    assert bottlenecks(graph, layers, {}) == []


def test_a_group_of_which_something_is_stored_is_left_alone():
    graph, layers, stored = folded(bottleneck_net())
    assert recover(graph, layers, {"p1": stored["p1"]}, chunks(graph)) == {}
    assert recover(graph, layers, {"e0": stored["e0"]}, chunks(graph)).keys() == {"p0", "p1", "p2"}


def test_a_tensor_behind_which_an_activation_stands_is_no_bottleneck():
    """Its mean matters to what follows."""
    graph, layers, _ = folded(bottleneck_net())
    written = {layer.output for group in bottlenecks(graph, layers, {}) for layer in group.producers}
    assert written == {"p0", "p1", "p2"}


def test_what_is_left_over():
    graph, layers, _ = folded(bottleneck_net())
    layer = layer_behind(layers, "p0")
    assert left_over(graph, [layer], {"p0": bias_of(graph, layer) / 2}) == pytest.approx(0.25)


def test_the_rung_of_every_layer():
    graph, layers, stored = folded(bottleneck_net())
    found = recover(graph, layers, {}, chunks(graph))
    rungs = {layer.output: origin(graph, layer.input, {}, found, ["x"]) for layer in layers}
    assert rungs == {
        **{"e0": "bn", "p0": "propagated", "e1": "recovered", "p1": "propagated"},
        **{"e2": "recovered", "p2": "propagated", "z": "recovered", "y": "propagated"},
    }
    mixed = {name: found[name] for name in ("p1", "p2")}
    assert origin(graph, "s2", {"p0": stored["p0"]}, mixed, []) == "recovered"  # the weakest of the ways back names it
    assert origin(graph, "p0", {"p0": stored["p0"]}, mixed, []) == "bn"


@pytest.mark.parametrize(("source", "recovered"), [("aligned", True), ("gaussian", False)])
def test_only_images_are_aligned_to_what_is_recovered(source, recovered):
    images = 2 * scenes(64, 3, 12, 12, np.random.default_rng(1)) - 1
    graph, _, _ = folded(bottleneck_net(feeds={"x": images}))
    prepared = prepare(graph.model, Config(activations_from=source, input_range=(-1.0, 1.0)))
    assert ("recovered" in prepared.origins.values()) == recovered
    assert ("p0" in prepared.statistics) == recovered


@pytest.mark.parametrize(
    ("middle", "words"),
    [
        ("b = Relu (a)", "the model has no normalization"),
        ("c = BatchNormalization (a, g, s, s, g)  b = Relu (c)", ""),
        ("c = InstanceNormalization (a, g, s)  b = Relu (c)", ""),
    ],
)
def test_what_folding_lost_is_said(middle, words):
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,8,8] x) => (float[N,4,6,6] y) {{ a = Conv (x, w)  {middle}  y = Conv (b, v) }}
    """
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(0, 0.3, (6, 3, 3, 3)), "v": rng.normal(0, 0.3, (4, 6, 1, 1))}
    model = with_weights(text, {**weights, "g": np.ones(6), "s": np.zeros(6)})
    warnings = prepare(model, Config(input_range=(-1.0, 1.0))).warnings
    assert any(words in text for text in warnings) if words else not warnings
