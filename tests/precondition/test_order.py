"""Orders of channels: the network's function stays, and neighbours no longer ask for sums that are too large."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import onnx_lwdf
from onnx_lwdf.activations.taps import sample
from onnx_lwdf.channels.groups import find_groups
from onnx_lwdf.channels.ties import ties_of
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import committed, find_layers, weight_of
from onnx_lwdf.precondition import order
from tests.channels.nets import other_twins, twins
from tests.nets import answers, samples, sqnr_db, with_weights
from tests.networks import networks
from tests.test_fuzz import feeds_of

fuzz = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
EXACT = 1e-5  # of the largest answer: sums in another order, in float32


def shuffled(model, feed, seed=0):
    """The model with every set of channels that may be reordered in a random order, its samples, and how many sets."""
    graph = Graph(onnx.ModelProto.FromString(model.SerializeToString()))
    graph.commit()  # layers that nothing reads go
    layers, _ = find_layers(graph)
    made = [name for node in graph.nodes for name in node.output if name and graph.constant(name) is None]
    ties = ties_of(graph, layers, feed)
    rng, orders, sets = np.random.default_rng(seed), {}, 0
    seen = sample(graph.snapshot(), layers, made, [feed], np.random.default_rng(0), {}, None)
    for group in find_groups(graph, layers, ties):
        slots = order.slots_of(ties, group.units)
        if order.is_free(group, slots, ties, seen):
            orders = order.placed(orders, slots, ties, rng.permutation(len(group.units)))
            sets += 1
    done, _ = order.rearranged(graph, layers, ties, orders, seen, {})
    layers = committed(graph, layers)
    return graph, layers, seen, done, sets


@fuzz
@given(networks(), st.integers(0, 3))
def test_any_order_keeps_the_function_of_any_network(model, seed):
    feed = feeds_of(model)
    graph, *_ = shuffled(model, feed, seed)
    onnx.checker.check_model(graph.snapshot(), full_check=True)
    for exact, answer in zip(answers(model, feed), answers(graph.snapshot(), feed), strict=True):
        np.testing.assert_allclose(answer, exact, rtol=0, atol=EXACT * np.abs(exact).max())


@pytest.mark.parametrize("make", [twins, other_twins])
def test_residuals_depthwise_gates_concatenations_slopes_and_flattened_maps(make):
    model = make()
    feed = samples(model, 8)
    graph, layers, before, done, sets = shuffled(model, feed)
    assert sets > 3
    exact, answer = answers(model, feed)[0], answers(graph.snapshot(), feed)[0]
    np.testing.assert_allclose(answer, exact, rtol=0, atol=EXACT * np.abs(exact).max())
    assert any(not np.array_equal(before.values[name], done.values[name]) for name in before.values)
    # Samples are those of the network as it is now: what layers make of the same draws.
    again = sample(graph.snapshot(), layers, list(done.values), [feed], np.random.default_rng(0), {}, None)
    for layer in layers:
        moments, expected = done.moments[layer.name], again.moments[layer.name]
        size = np.abs(expected.hessian).max()
        np.testing.assert_allclose(moments.mean, expected.mean, atol=1e-4 * np.sqrt(size))
        np.testing.assert_allclose(moments.hessian, expected.hessian, atol=1e-4 * size)


def test_a_pair_costs_the_least_error_of_codes_whose_sum_is_at_the_limit():
    """Brute force: the least v_i e_i^2 + v_j e_j^2 over a fine grid of codes that are moved until the sum fits."""
    rng = np.random.default_rng(2)
    weight, variance = rng.normal(size=(5, 4)), rng.uniform(0.1, 2, 4)
    scale = np.abs(weight).max(1) / 127
    costs = order.pair_costs(weight, scale, variance, 128)
    moves = np.linspace(0, 130, 130 * 32 + 1)
    for i, j in itertools.combinations(range(4), 2):
        least = 0.0
        for row, step in zip(weight, scale, strict=True):
            over = max(abs(row[i] + row[j]) / step - 128, 0.0)
            errors = variance[i] * moves**2 + variance[j] * np.maximum(over - moves, 0.0) ** 2
            least += step**2 * errors.min()
        assert costs[i, j] == costs[j, i] == pytest.approx(least, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_costs_of_weights_whose_squares_float32_does_not_hold(size):
    rng = np.random.default_rng(2)
    weight, variance = rng.normal(size=(5, 4)), rng.uniform(0.1, 2, 4)
    costs = [order.pair_costs(w, np.abs(w).max(1) / 127, variance, 128) for w in (weight, size * weight)]
    np.testing.assert_allclose(costs[1], size**2 * costs[0], rtol=1e-5)  # float32


def matchings(channels):
    """Every way to split these channels into pairs."""
    if not channels:
        yield []
        return
    first, *rest = channels
    for partner in rest:
        for others in matchings([channel for channel in rest if channel != partner]):
            yield [(first, partner), *others]


@pytest.mark.parametrize("seed", range(6))
def test_pairs_cost_little_more_than_the_best(seed):
    """Against all 105 ways to pair 8 channels: no swap of two pairs is left to gain by, and most often that is the best."""
    root = np.random.default_rng(seed).exponential(size=(8, 8)) ** 2
    costs = root + root.T
    found = order.pair_up(costs)
    assert sorted(found) == list(range(8))
    cost = sum(costs[a, b] for a, b in found.reshape(-1, 2))
    every = sorted(sum(costs[a, b] for a, b in pairs) for pairs in matchings(list(range(8))))
    assert cost <= every[3]


def test_an_odd_channel_is_left_over_and_nothing_moves_without_need():
    assert order.pair_up(np.zeros((6, 6))).tolist() == [0, 1, 2, 3, 4, 5]
    costs = np.zeros((5, 5))
    costs[0, 1] = costs[1, 0] = 1.0
    found = order.pair_up(costs)
    assert sorted(found) == list(range(5))
    assert {0, 1} not in [set(pair) for pair in found[:4].reshape(2, 2).tolist()]


NET = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,10,10] x) => (float[N,10] y) {
    a = Conv <pads = [1,1,1,1]> (x, w0, b0)
    b = Relu (a)
    c = Conv <pads = [1,1,1,1], group = 16> (b, w1, b1)
    d = Relu (c)
    r = Conv (d, w2, b2)
    e = Relu (r)
    p = GlobalAveragePool (e)
    q = Flatten (p)
    y = Gemm <transB = 1> (q, w3, b3)
}
"""


def heavy(seed=0, classes=10):
    """Two of sixteen channels are large, in every filter of w2, and stand side by side."""
    rng = np.random.default_rng(seed)
    shapes = {"w0": (16, 3, 3, 3), "w1": (16, 1, 3, 3), "w2": (12, 16, 1, 1), "w3": (classes, 12)}
    tensors = {name: rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    tensors |= {f"b{i}": rng.normal(0.2, 0.1, shape[0]) for i, shape in enumerate(shapes.values())}
    tensors["w2"][:, 6:8] = 1.5 + rng.normal(0, 0.1, (12, 2, 1, 1))
    return with_weights(NET.replace("N,10]", f"N,{classes}]"), tensors)


def ordered(limits, **options):
    model = heavy(**options)
    graph = Graph(onnx.ModelProto.FromString(model.SerializeToString()))
    layers, _ = find_layers(graph)
    seen = sample(graph.snapshot(), layers, ["b", "d"], [samples(model, 32)], np.random.default_rng(0), {}, None)
    names = {f"w{i}": layer.name for i, layer in enumerate(layers)}
    limits = {names[weight]: limit for weight, limit in limits.items()}
    return model, graph, layers, order.order_channels(graph, layers, limits, seen, {}, samples(model))[0]


def test_heavy_neighbours_are_parted():
    model, graph, before, layers = ordered({"w2": 128})
    old, new = (weight_of(Graph(model), before[2])[0], weight_of(graph, layers[2])[0])
    assert sorted(map(tuple, old.T)) == sorted(map(tuple, new.T))
    pairs = np.abs(new.reshape(12, -1, 2).sum(2)) / np.abs(new).max(1, keepdims=True)
    assert np.abs(old[:, 6:8].sum(1)).min() / np.abs(old).max() > 1.5  # twice the largest weight
    assert pairs.max() < 1.25  # some light neighbours are left that are not light in every filter
    for exact, answer in zip(answers(model, samples(model)), answers(graph.snapshot(), samples(model)), strict=True):
        np.testing.assert_allclose(answer, exact, rtol=0, atol=EXACT * np.abs(exact).max())


@pytest.mark.parametrize("limits", [{}, {"w0": 128}, {"w1": 128}])  # nothing; pixels; filters of one channel each
def test_nothing_moves_where_no_kernel_saturates(limits):
    model, graph, *_ = ordered(limits)
    for name in ("w0", "w1", "w2", "w3"):
        np.testing.assert_array_equal(graph.constant(name), Graph(model).constant(name))


@pytest.mark.parametrize("most", [12, 11])
def test_what_a_layer_of_many_channels_reads_has_an_order(monkeypatch, most):
    """Wider tensors, here of 16 and 20 channels, are not followed, and cost neither memory nor the order beside them."""
    monkeypatch.setattr(order, "MOST_CHANNELS", most)
    model, graph, *_ = ordered({"w2": 128, "w3": 128}, classes=20)
    old = Graph(model)
    np.testing.assert_array_equal(graph.constant("w1"), old.constant("w1"))
    moved = not np.array_equal(graph.constant("w3"), old.constant("w3"))
    assert moved == (most == 12)
    for exact, answer in zip(answers(model, samples(model)), answers(graph.snapshot(), samples(model)), strict=True):
        np.testing.assert_allclose(answer, exact, rtol=0, atol=EXACT * np.abs(exact).max())


def test_grids_are_finer_on_kernels_that_saturate(monkeypatch):
    def scales(**options):
        options |= {"bits": 8, "samples": 32, "input_mean": [0.0], "input_std": [255.0], "jobs": 1}
        return Graph(onnx_lwdf.compress(heavy(), **options).model).constant("w2.scale")

    found, free = scales().mean(), np.sort(scales(target="x86-vnni"))
    monkeypatch.setattr(order, "MOST_CHANNELS", 0)
    np.testing.assert_array_equal(np.sort(scales(target="x86-vnni")), free)
    assert free.mean() <= found < 0.9 * scales().mean()


def test_sequences_have_no_channels_and_stop_nothing():
    """Of unlike tensors: no array holds them."""
    text = NET.replace(
        "e = Relu (r)", "s = SplitToSequence <axis = 1> (r, parts) i = ConcatFromSequence <axis = 1> (s) e = Relu (i)"
    )
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(heavy().graph.initializer)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([5, 7]), "parts"))
    result = onnx_lwdf.compress(model, bits=8, samples=16, input_mean=[0.0], input_std=[255.0], jobs=1)
    assert len(result.report.compressed) == 4
    feeds = {"x": np.random.default_rng(1).uniform(0, 1, (8, 3, 10, 10)).astype(np.float32)}
    assert sqnr_db(answers(model, feeds)[0], answers(result.model, feeds)[0]) > 20
