"""Copies of channels: which, how often, and that the network's function stays."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnx_lwdf
from onnx_lwdf.emit import qdq
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import find_layers, weight_of
from onnx_lwdf.precondition import copies
from onnx_lwdf.precondition.channels import find_groups
from onnx_lwdf.ranges import ActivationGrid
from onnx_lwdf.sites import Site
from tests.nets import answers, samples, with_weights
from tests.precondition.test_transform import prepared

NET = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,12,12] x) => (float[N,64] y) {
    a = Conv <pads = [1,1,1,1]> (x, w0, b0)
    b = Relu (a)
    c = Conv <pads = [1,1,1,1], group = 6> (b, w1, b1)
    d = Clip (c, zero, six)
    e = Conv (d, w2, b2)
    f = Add (e, e)
    g = Conv (f, w3, b3)
    p = GlobalAveragePool (g)
    y = Flatten (p)
}
"""


def network():
    rng = np.random.default_rng(8)
    shapes = {"w0": (6, 3, 3, 3), "w1": (6, 1, 3, 3), "w2": (4, 6, 1, 1), "w3": (64, 4, 3, 3)}
    tensors = {name: rng.normal(0, 0.4, shape) for name, shape in shapes.items()}
    tensors |= {f"b{i}": rng.normal(0.3, 0.2, size) for i, size in enumerate((6, 6, 4, 64))}
    tensors["w1"] = np.abs(tensors["w1"])
    tensors["b0"][2] = 40.0  # a large offset that carries little: the range of all follows it
    model = with_weights(NET, tensors | {"zero": np.array(0.0), "six": np.array(900.0)})
    return onnx.shape_inference.infer_shapes(model)


def parts(step):
    graph, layers, _, _, seen = prepared(network(), 8)
    grids = {name: ActivationGrid(step, 0, 8) for name in "bd"} | {"f": ActivationGrid(step, 128, 8)}
    gradients = {"b": np.diag([1.0, 1, 90, 1, 1, 1]), "d": np.eye(6), "f": 1e-9 * np.eye(4)}
    return graph, layers, grids, seen, gradients


def copied(graph, layers, grids, seen, gradients):
    groups = find_groups(graph, layers)
    return copies.copy_channels(graph, layers, groups, grids, seen, {}, gradients, samples(network()))


def test_a_path_runs_through_depthwise_layers_to_those_that_mix_the_channels():
    graph, layers, grids, _, _ = parts(0.1)
    (path,) = copies.find_paths(graph, find_groups(graph, layers), grids)  # e is added to itself: no single path
    assert [layer.output for layer in path.writers] == ["a", "c"]
    assert [layer.output for layer in path.readers] == ["e"]
    assert copies.find_paths(graph, find_groups(graph, layers), {"b": grids["b"]}) == []


@pytest.mark.parametrize(("sizes", "paths"), [("scales", 1), (", sizes", 0)])
def test_a_resize_that_names_sizes_keeps_its_channels(sizes, paths):
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[1,3,8,8] x) => (float[1,4,16,16] y) {{
        a = Conv (x, w0, b0)
        b = Relu (a)
        c = Resize (b, , {sizes})
        y = Conv (c, w1, b1)
    }}
    """
    rng = np.random.default_rng(0)
    shapes = {"w0": (6, 3, 1, 1), "b0": (6,), "w1": (4, 6, 1, 1), "b1": (4,)}
    tensors = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    tensors |= {"scales": np.array([1, 1, 2, 2], np.float32), "sizes": np.array([1, 6, 16, 16], np.int64)}
    graph = Graph(with_weights(text, tensors))
    groups = find_groups(graph, find_layers(graph)[0])
    assert len(groups) == 1
    assert len(copies.find_paths(graph, groups, {"b": ActivationGrid(0.1, 0, 8)})) == paths


def test_the_function_stays(monkeypatch):
    monkeypatch.setattr(copies, "MOST_ADDED", 2.0)  # of 30 bits
    feeds = samples(network())
    before = answers(network(), feeds)[0]
    graph, layers, _, seen, gradients = parts(1.0)
    fine = {name: ActivationGrid(1e-6, 0, 30) for name in "bd"} | {"f": ActivationGrid(0.1, 128, 8)}
    done = copied(graph, layers, fine, seen, gradients)
    assert any("copied" in note for note in done.notes.values())
    np.testing.assert_allclose(answers(graph.snapshot(), feeds)[0], before, rtol=1e-4, atol=1e-4)
    onnx.checker.check_model(graph.snapshot(), full_check=True)  # the stated shapes are those of the copies


def test_offsets_are_within_half_a_step_and_cancel(monkeypatch):
    monkeypatch.setattr(copies, "MOST_ADDED", 0.5)
    monkeypatch.setattr(copies, "AT_A_TIME", 1)
    graph, layers, grids, seen, gradients = parts(0.5)
    old = graph.constant("b0").copy()
    done = copied(graph, layers, grids, seen, gradients)
    first = done.layers[0]
    weight, bias = weight_of(graph, first)[0], graph.constant(first.node.input[2])
    same = [np.flatnonzero((weight == weight[c]).all(1)) for c in range(6)]
    assert len(same[2]) == copies.MOST_COPIES
    for channel, places in enumerate(same):
        moved = (bias[places] - old[channel]) / 0.5
        k = len(places)
        np.testing.assert_allclose(np.sort(moved), (np.arange(k) - (k - 1) / 2) / k, atol=1e-5)
    reader = weight_of(graph, done.layers[2])[0]
    total = np.array([reader[:, places].sum(1) for places in same]).T
    np.testing.assert_allclose(total, weight_of(Graph(network()), find_layers(Graph(network()))[0][2])[0], rtol=1e-6)
    assert done.layers[1].groups == len(bias) == len(done.samples.values["b"]) == len(done.samples.values["d"])
    assert done.samples.moments[done.layers[1].name].mean.shape == (len(bias), 9)
    assert done.samples.moments[done.layers[2].name].hessian.shape == (1, len(bias), len(bias))


def test_what_a_relu_holds_at_0_stays_there_whatever_the_offset():
    values = np.array([[0.0, 0.2, 3.0, 6.0]] * 2, np.float32)
    moved = copies._moved(values, np.array([-0.5, 0.5]), (0.0, 6.0))
    np.testing.assert_allclose(moved, [[0, 0, 2.5, 6], [0, 0.7, 3.5, 6]], atol=1e-6)
    np.testing.assert_allclose(
        copies._moved(values, np.array([-0.5, 0.5]), (None, None))[0], values[0] - 0.5, atol=1e-6
    )


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_mean_of_k_rounded_copies_is_rounding_to_a_kth_of_the_step(k):
    x = np.random.default_rng(0).uniform(2, 9, 1000)
    offsets = (np.arange(k) - (k - 1) / 2) / k
    mean = np.rint(x[:, None] + offsets).mean(1)
    fine = np.rint(k * x - (k - 1) / 2) / k + (k - 1) / (2 * k)  # its levels lie between, for even k
    assert np.abs(mean - x).max() <= 0.5 / k + 1e-12
    assert np.isclose(
        np.abs(mean - x), np.minimum(np.abs(fine - x), np.abs(np.rint(k * x) / k - x)), atol=0.5 / k
    ).all()


def test_the_choice_is_the_best_for_its_price(monkeypatch):
    """Against all choices of the same multiplications: greedy is exact where all prices are equal."""
    monkeypatch.setattr(copies, "AT_A_TIME", 1)
    rng = np.random.default_rng(3)
    noise = rng.exponential(1.0, 4)
    (counts,) = copies.choose([noise], [0.01], float(noise.sum()))
    spent = int(counts.sum()) - 4
    assert 0 < spent <= round(copies.MOST_ADDED / 0.01)
    every = (c for c in itertools.product(range(1, copies.MOST_COPIES + 1), repeat=4) if sum(c) - 4 == spent)
    least = min(float((noise / np.square(c)).sum()) for c in every)
    assert float((noise / counts**2).sum()) == pytest.approx(least)


def test_what_takes_less_noise_than_it_costs_is_not_copied():
    (counts,) = copies.choose([np.ones(8)], [0.001], total=1000.0)
    assert (counts == 1).all()
    dear, cheap = copies.choose([np.ones(2), np.ones(2)], [0.5, 0.01], total=4.0)
    assert (dear == 1).all()
    assert cheap.max() > 1


@given(
    widths=st.lists(st.sampled_from([1, 6, 24, 32, 40, 48, 100, 144]), min_size=1, max_size=4),
    price=st.floats(1e-5, 1e-2),
    seed=st.integers(0, 2**32 - 1),
)
def test_channels_stay_a_multiple_of_what_a_kernel_takes_at_a_time(widths, price, seed):
    """The budget holds, none is taken away, and no path is divided worse by powers of 2, up to 16, than it was."""
    rng = np.random.default_rng(seed)
    noise = [rng.exponential(1.0, width) ** 3 for width in widths]
    chosen = copies.choose(noise, [price] * len(widths), 0.0)
    added = 0
    for width, counts in zip(widths, chosen, strict=True):
        assert counts.min() >= 1
        assert counts.max() <= copies.MOST_COPIES
        assert counts.sum() % math.gcd(width, 16) == 0
        added += int(counts.sum()) - width
    assert added * price <= copies.MOST_ADDED + 1e-12


def test_rounding_what_the_copies_hold_costs_a_fraction(monkeypatch):
    """Of four copies of every channel at most a tenth; a sixteenth is what the formula says of a linear path."""
    monkeypatch.setattr(copies, "choose", lambda *_: [np.full(6, 4)])
    graph, layers, grids, seen, gradients = parts(0.5)
    feeds, noise = samples(network(), 32), []
    for taken in (False, True):
        if taken:
            done = copied(graph, layers, {name: grids[name] for name in "bd"}, seen, gradients)
            assert len(done.samples.values["b"]) == 24
        twin = graph.twin()
        twin.set_outputs(["e"])
        twin.commit()
        exact = answers(twin.model, feeds)[0]
        qdq.activations(twin, [Site(("b",), 8, 0.0, None)], grids, signed=False)
        twin.commit()
        error = (answers(twin.model, feeds, optimize=False)[0] - exact)[:, :, 1:-1, 1:-1]  # without the padded border
        noise.append(float((error - error.mean((0, 2, 3), keepdims=True)).var()))
    assert noise[1] < noise[0] / 10


def test_copies_are_made_and_named(monkeypatch):
    monkeypatch.setattr(copies, "shares", lambda graph, layers, feed: {layer.name: 1e-3 for layer in layers})
    model = network()
    result = onnx_lwdf.compress(model, bits=8, samples=32, input_mean=[0.0], input_std=[1.0])
    assert any("channels copied" in row.reason for row in result.report.layers)
    weights_only = onnx_lwdf.compress(model, weight_bits=8, activation_bits="float", samples=32)
    assert not any("copied" in row.reason for row in weights_only.report.layers)


def test_excited_channels_are_not_copied(monkeypatch):
    """A Mul's other side has as many channels as before."""
    monkeypatch.setattr(copies, "choose", lambda noise, *_: [np.full(len(one), 2) for one in noise])
    text = NET.replace(
        "e = Conv (d, w2, b2)",
        "q = GlobalAveragePool (d) r = Conv (q, w4) s = HardSigmoid (r) t = Mul (d, s) e = Conv (t, w2, b2)",
    )
    rng = np.random.default_rng(0)
    model = onnx.ModelProto.FromString(network().SerializeToString())
    nodes = onnx.parser.parse_model(text).graph.node
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=(6, 6, 1, 1)).astype(np.float32), "w4"))
    graph, layers, *_ = prepared(model, 8)
    grids = {name: ActivationGrid(0.1, 0, 8) for name in ("b", "d", "t", "q", "f")}
    assert copies.find_paths(graph, find_groups(graph, layers), grids) == []
    assert onnx_lwdf.compress(model, bits=8, samples=16, input_mean=[0.0], input_std=[255.0]).report.compressed


def test_copies_of_fewer_bits_cost_less():
    graph, layers, grids, _, _ = parts(0.1)
    (path,) = copies.find_paths(graph, find_groups(graph, layers), grids)
    shares = {layer.name: 0.1 for layer in layers}
    prices = [
        copies._price(graph, path, shares, {name: ActivationGrid(grid.scale, 0, bits) for name, grid in grids.items()})
        for bits in (8, 4)
    ]
    assert prices == pytest.approx([3 * 0.1 / 6, 3 * 0.1 / 12])  # two layers make the six channels, one reads them


def test_noise_is_that_of_rounding_and_adds_up_to_what_was_seen():
    """Values of two channels on a grid up to 15: one is cut off, the other rounded by a quarter either way."""
    values = np.array([[20.0, 30, 40, 50], [1.25, 2.75, 3.25, 4.75]], np.float32)
    grid, strength = ActivationGrid(1.0, 0, 4), np.array([7.0, 3.0])
    np.testing.assert_allclose(copies._noise(values, grid, strength, None), [0, 3 / 16])
    np.testing.assert_allclose(copies._noise(values, grid, strength, 0.5), [0, 0.5])
    np.testing.assert_array_equal(copies._noise(values[:1], grid, strength[:1], 0.5), [0])
    assert copies._noise(values, grid, np.ones(3), 0.5).size == 0
