"""Channel groups are found where theory allows them, and transforms do not change the function."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_lwdf.activations.inputs import read_inputs
from onnx_lwdf.activations.moments import Moments
from onnx_lwdf.activations.sampler import draw_chunks, synthesize
from onnx_lwdf.config import Config
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, find_layers
from onnx_lwdf.precondition import equalization, transform
from onnx_lwdf.precondition.bounds import highest
from onnx_lwdf.precondition.channels import find_groups
from onnx_lwdf.precondition.fold import fold
from tests.nets import answers, residual, samples, with_weights

BOTTLENECK = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,12,12] x) => (float[N,4] y) {
    a = Conv <pads = [1,1,1,1]> (x, w0)
    b = BatchNormalization (a, g, bb, m, v)
    c = Relu (b)
    p = Conv (c, w1, b1)
    e = Conv (p, w2, b2)
    f = Relu (e)
    q = Conv (f, w3, b3)
    s = Add (p, q)
    h = Conv (s, w4, b4)
    i = Relu (h)
    j = Conv <pads = [1,1,1,1], group = 6> (i, w5)
    k = GlobalAveragePool (j)
    l = Flatten (k)
    y = Gemm <transB = 1> (l, w6, b6)
}
"""


INTERPOLATED = BOTTLENECK.replace(
    "q = Conv (f, w3, b3)",
    """g0 = MaxPool <kernel_shape = [2,2], strides = [2,2]> (f)
    r = Conv (g0, w3, b3)
    q = Resize <mode = "linear"> (r, region, factors)""",
)


def bottleneck(text=BOTTLENECK):
    rng = np.random.default_rng(3)
    shapes = {"w0": (8, 3, 3, 3), "w1": (5, 8, 1, 1), "w2": (7, 5, 1, 1), "w3": (5, 7, 1, 1), "w4": (6, 5, 1, 1)}
    shapes |= {"w5": (6, 1, 3, 3), "w6": (4, 6), "b1": 5, "b2": 7, "b3": 5, "b4": 6, "b6": 4}
    tensors = {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()}
    tensors["w1"][0] *= 30  # one wide channel, which a grid for all would follow
    tensors["w4"][2] *= 20
    tensors |= {name: rng.uniform(0.5, 1.5, 8) for name in ("g", "bb", "m", "v")}
    if "Resize" in text:
        tensors |= {"region": np.zeros(0), "factors": np.array([1.0, 1.0, 2.0, 2.0])}
    return with_weights(text, tensors)


def prepared(model, bits):
    graph = Graph(model)
    statistics = fold(graph)
    layers, _ = find_layers(graph)
    config = Config(weight_bits=bits, activation_bits=bits, samples=32)
    inputs, _ = read_inputs(graph, config, statistics)
    groups = find_groups(graph, layers)
    tensors = [name for layer in layers for name in (layer.input, layer.output)]
    seen = synthesize(graph, layers, tensors, statistics, draw_chunks(inputs, config), config)
    return graph, layers, groups, dict.fromkeys((layer.name for layer in layers), Bits(bits, bits)), seen


def test_groups_of_a_residual_chain():
    _, _, groups, _, _ = prepared(bottleneck(), 8)
    found = {frozenset(group.tensors): group for group in groups}
    chain = found[frozenset({"p", "q", "s"})]
    assert chain.linear
    assert chain.channels == 5
    assert {layer.output for layer in chain.producers} == {"p", "q"}
    assert {layer.input for layer in chain.consumers} == {"p", "s"}
    assert not found[frozenset({"h", "i"})].linear
    assert found[frozenset({"j", "k", "l"})].linear
    assert not any("y" in group.tensors for group in groups)  # an output keeps its scale


def test_interpolation_is_within_a_linear_group_unless_it_crops():
    found = {frozenset(group.tensors): group for group in prepared(bottleneck(INTERPOLATED), 8)[2]}
    chain = found[frozenset({"p", "r", "q", "s"})]
    assert chain.linear
    assert {layer.output for layer in chain.producers} == {"p", "r"}
    cropped = bottleneck(
        INTERPOLATED.replace('"linear"', '"linear", coordinate_transformation_mode = "tf_crop_and_resize"')
    )
    graph = Graph(cropped)
    fold(graph)
    assert not any("q" in group.tensors for group in find_groups(graph, find_layers(graph)[0]))


JOINED = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,12,12] x) => (float[N,4] y) {
    a = Conv <pads = [1,1,1,1]> (x, w0, b0)
    b = Relu (a)
    p = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (b)
    c = Conv <pads = [1,1,1,1]> (x, w1, b1)
    r = Relu (c)
    d = Concat <axis = 1> (b, r, p)
    e = Conv (d, w2, b2)
    f = Conv <group = 3> (b, w3, b3)
    g = Concat <axis = 1> (f, e)
    n = BatchNormalization (g, ga, be, m, v)
    o = Relu (n)
    q = Conv (o, w4, b4)
    k = GlobalAveragePool (q)
    l = Flatten (k)
    y = Gemm <transB = 1> (l, w5)
}
"""


def joined(text=JOINED):
    rng = np.random.default_rng(3)
    shapes = {"w0": (3, 3, 3, 3), "w1": (2, 3, 3, 3), "w2": (4, 8, 1, 1), "w3": (3, 1, 1, 1), "w4": (4, 7, 1, 1)}
    shapes |= {"w5": (4, 4), "b0": 3, "b1": 2, "b2": 4, "b3": 3, "b4": 4}
    tensors = {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()}
    tensors["w0"][0] *= 30  # wide channels, which a grid for all would follow
    tensors["w2"][1] *= 30
    tensors |= {name: rng.uniform(0.5, 1.5, 7) for name in ("ga", "be", "m", "v")}
    return with_weights(text, tensors)


def test_a_concat_lines_up_the_channels_of_its_parts():
    found = {frozenset(group.tensors): group for group in prepared(joined(), 8)[2]}
    group = found[frozenset({"a", "b", "p", "c", "r", "d"})]
    assert group.channels == 5
    assert {name: list(group.places[name]) for name in "bprd"} == {
        "b": [0, 1, 2],
        "p": [0, 1, 2],
        "r": [3, 4],
        "d": [0, 1, 2, 3, 4, 0, 1, 2],
    }
    assert not group.linear
    assert not group.centred
    behind = found[frozenset({"f", "e", "g"})]
    assert behind.centred
    assert [norm.output for norm in behind.norms_read] == ["n"]
    assert [norm.output for norm in found[frozenset({"n", "o"})].norms_written] == ["n"]
    np.testing.assert_array_equal(group.spread("d", np.arange(8.0)), [5, 7, 9, 3, 4])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("d = Concat <axis = 1>", "d = Concat <axis = 2>"),
        ("(b, r, p)", "(b, r, w1)"),
        ("r = Relu (c)", "r = Floor (c)"),
        ("e = Conv (d", "e = ConvTranspose (d"),
    ],
)
def test_a_concat_of_anything_else_ends_a_group(old, new):
    graph = Graph(joined(JOINED.replace(old, new)))
    assert not any("d" in group.tensors for group in find_groups(graph, find_layers(graph)[0]))


@pytest.mark.parametrize("bits", [4, 8])
def test_transforms_through_a_concat_keep_the_function_and_are_taken(bits):
    model = joined()
    feeds, before = samples(model), answers(model, samples(model))
    graph, _, groups, plan, seen = prepared(model, bits)
    # All channels count alike, so that their sizes alone decide.
    widths = {"a": 3, "b": 3, "c": 2, "d": 8, "e": 4, "f": 3, "o": 7, "q": 4}
    gradients = {name: np.ones(count) for name, count in widths.items()}
    moved, _, found = equalization.transform_groups(graph, groups, plan, seen, {}, gradients)
    assert not np.allclose(found["d"], 1)
    assert not np.allclose(found["e"], 1)
    np.testing.assert_allclose(found["d"][:3], found["b"])  # one factor a channel, wherever it is held
    np.testing.assert_allclose(found["d"][5:], found["b"])
    after = graph.snapshot()
    # Factors are applied in float64, and weights are rounded once to float32.
    np.testing.assert_allclose(answers(after, feeds)[0], before[0], rtol=1e-4, atol=1e-4 * np.abs(before[0]).max())
    factor = 1 / np.sqrt(found["d"])  # what multiplies a channel divides its gradient
    np.testing.assert_allclose(moved.values["d"], seen.values["d"] * factor[:, None], rtol=1e-5)


CLIPPED = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,8,8] x) => (float[N,4,4,4] y) {{
    a = Conv <pads = [1,1,1,1]> (x, w0)
    b = BatchNormalization (a, g, bb, m, v)
    c = Clip (b, {low}, six)
    d = MaxPool <kernel_shape = [2,2], strides = [2,2]> (c)
    e = Conv <pads = [1,1,1,1], group = 8> (d, w1)
    y = Conv (e, w2)
}}
"""


def clipped(low="zero"):
    """Channels of very different size behind a Clip; those of tiny variance have a large gamma all the same."""
    rng = np.random.default_rng(5)
    tensors = {
        "w0": rng.normal(0, 0.5, (8, 3, 3, 3)),
        "w1": rng.normal(0, 0.5, (8, 1, 3, 3)),
        "w2": rng.normal(0, 1, (4, 8, 1, 1)),
    }
    tensors |= {
        "zero": np.array(0.0),
        "minus": np.array(-1.0),
        "six": np.array(6.0),
        "m": np.zeros(8),
        "v": np.full(8, 3.0),
    }
    tensors |= {"g": np.array([0.02, 0.05, -0.1, 0.2, 0.3, 0.4, 1.0, 2.0]), "bb": np.linspace(-0.1, 0.2, 8)}
    return with_weights(CLIPPED.format(low=low), tensors)


def test_a_clip_is_within_a_group_unless_it_or_others_need_the_values_as_they_are():
    found = {frozenset(group.tensors): group for group in prepared(clipped(), 8)[2]}
    group = found[frozenset({"b", "c", "d"})]
    assert group.ceiling == 6
    assert (group.producers[0].output, group.consumers[0].input, group.linear) == ("b", "d", False)
    assert not any("c" in group.tensors for group in prepared(clipped(low="minus"), 8)[2])
    shared = clipped()
    shared.graph.node.append(onnx.helper.make_node("Sigmoid", ["b"], ["z"]))
    shared.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None))
    assert not any("c" in group.tensors for group in prepared(shared, 8)[2])
    _, _, groups, _, _ = prepared(residual(), 8)  # a Relu first, a Clip behind the depthwise layer
    assert [group.ceiling for group in groups if "c2" in group.tensors] == [6.0]


def behind_clip(graph, feeds):
    model = graph.snapshot()
    model.graph.output.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, None))
    return answers(model, feeds)[-1]


def test_channels_fill_the_range_below_a_clip(monkeypatch):
    """Below beta + 12 |gamma| nothing changes, above the values are cut there."""
    monkeypatch.setattr(equalization, "CLEAR_GAIN", 1.0)
    model = clipped()
    graph, _, groups, plan, seen = prepared(model, 6)
    statistics = fold(Graph(clipped()))
    far = {"x": 40 * next(iter(samples(model).values()))}
    before = [behind_clip(graph, feed) for feed in (samples(model), far)]
    moved, known, _ = equalization.transform_groups(graph, groups, plan, seen, statistics)
    gamma, beta = np.abs([0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 1.0, 2.0]), np.linspace(-0.1, 0.2, 8)
    reach = np.minimum(6, beta + 12 * gamma)
    factor = np.where(reach > 6 / 256, 6 / reach, 1.0)[:, None, None]
    after = [behind_clip(graph, feed) for feed in (samples(model), far)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, np.minimum(factor * old, 6), rtol=1e-5, atol=1e-5)
    assert (factor * before[1] > 6.001).any()
    assert not (factor * before[0] > 6.001).any()
    np.testing.assert_allclose(known["b"].gamma, factor.ravel() * gamma, rtol=1e-6)
    assert moved.values["d"].max() <= 6


def test_pixels_bound_what_a_channel_behind_them_reaches(monkeypatch):
    """Nearer than 12 |gamma|, and exact: black to white images of any kind pass the moved Clip unchanged."""
    monkeypatch.setattr(equalization, "predicted_error", lambda *arguments: 0.0 if arguments[-1].ceiling else 1.0)
    graph, _, groups, plan, seen = prepared(clipped(), 6)
    rng = np.random.default_rng(1)
    images = {"x": rng.choice([-0.05, 0.05], (64, 3, 8, 8)).astype(np.float32)}
    before, statistics = behind_clip(graph, images), fold(Graph(clipped()))
    small = dataclasses.replace(seen, values={**seen.values, "d": 0.01 * seen.values["d"]})
    ranges = {"x": (-0.05, 0.05)}
    bound = highest(graph, groups[0].producers[0], ranges)
    equalization.transform_groups(graph, groups, plan, small, statistics, pixels=ranges)
    gamma, beta = np.abs([0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 1.0, 2.0]), np.linspace(-0.1, 0.2, 8)
    assert (bound < beta + 12 * gamma).any()
    reach = np.maximum(np.minimum(np.minimum(6, beta + 12 * gamma), bound), small.values["d"].max(1))
    factor = np.where(reach > 6 / 256, 6 / np.maximum(reach, 6 / 256), 1.0)[:, None, None]
    np.testing.assert_allclose(behind_clip(graph, images), factor * before, rtol=1e-5, atol=1e-5)


def test_a_clip_stays_as_it_is_where_no_batchnormalization_tells_the_range():
    graph, _, groups, plan, seen = prepared(clipped(), 6)
    before = behind_clip(graph, samples(clipped()))
    equalization.transform_groups(graph, groups, plan, seen, {})
    np.testing.assert_array_equal(behind_clip(graph, samples(clipped())), before)


POOLED = BOTTLENECK.replace(
    "q = Conv (f, w3, b3)",
    """r = Conv (f, w3, b3)
    q = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = 1> (r)""",
)


@pytest.mark.parametrize("text", [BOTTLENECK, INTERPOLATED, POOLED])
@pytest.mark.parametrize("bits", [4, 8])
def test_transforms_keep_the_function_and_are_taken(bits, text):
    model = bottleneck(text)
    feeds, before = samples(model), answers(model, samples(model))
    graph, _, groups, plan, seen = prepared(model, bits)
    weights = {t.name: numpy_helper.to_array(t) for t in graph.snapshot().graph.initializer}
    equalization.transform_groups(graph, groups, plan, seen, {})
    after = graph.snapshot()
    changed = [
        t.name for t in after.graph.initializer if not np.array_equal(numpy_helper.to_array(t), weights.get(t.name))
    ]
    assert "w1" in changed  # the wide channel was worth it
    # A and its inverse are applied in float64; weights are rounded once to float32, at condition numbers up to about 100.
    np.testing.assert_allclose(answers(after, feeds)[0], before[0], rtol=1e-3, atol=1e-3 * np.abs(before[0]).max())


def test_samples_follow_the_transform():
    graph, layers, groups, plan, seen = prepared(bottleneck(), 4)
    moved, _, _ = equalization.transform_groups(graph, groups, plan, seen, {})
    after = graph.snapshot()
    feeds = samples(after, 64)
    layer = next(layer for layer in layers if layer.input == "s")
    values = moved.values["s"].astype(np.float64)  # [channels, values]
    hessian = moved.moments[layer.name].hessian[0]
    # Two independent draws of positions of the same images: second moments agree within sampling noise.
    np.testing.assert_allclose(values @ values.T / values.shape[1], hessian, atol=0.15 * np.abs(hessian).max())
    assert answers(after, feeds)[0].shape == (64, 4)


def test_the_identity_is_kept_where_nothing_is_gained(monkeypatch):
    graph, _, groups, plan, seen = prepared(bottleneck(), 8)
    before = graph.snapshot().SerializeToString(deterministic=True)
    monkeypatch.setattr(equalization, "CLEAR_GAIN", 0.0)
    assert equalization.transform_groups(graph, groups, plan, seen, {})[0] is seen
    assert graph.snapshot().SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(("groups", "kernel"), [(2, 1), (3, 3), (6, 3)])
def test_a_mean_moves_through_a_grouped_reader(groups, kernel):
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,16,16] x) => (float[N,12,M,M] y) {{
        p = Conv (x, w0, b0)
        y = Conv <group = {groups}> (p, w1)
    }}
    """
    rng = np.random.default_rng(0)
    tensors = {"w0": rng.normal(size=(6, 3, 1, 1)), "b0": rng.normal(2, 3, 6)}
    tensors["w0"][0] *= 30
    model = with_weights(text, tensors | {"w1": rng.normal(size=(12, 6 // groups, kernel, kernel))})
    feeds, before = samples(model), answers(model, samples(model))[0]
    graph, _, channel_groups, plan, seen = prepared(model, 4)
    equalization.transform_groups(graph, channel_groups, plan, seen, {})
    assert not np.array_equal(graph.constant("b0"), tensors["b0"])  # the mean did move
    np.testing.assert_allclose(answers(graph.snapshot(), feeds)[0], before, rtol=0, atol=1e-4 * np.abs(before).max())


def test_no_mean_moves_where_the_reader_has_no_bias():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,8,8] x) => (float[N,4] y) {
        p = Conv (x, w0, b0)
        g = GlobalAveragePool (p)
        f = Flatten (g)
        y = MatMul (f, w1)
    }
    """
    rng = np.random.default_rng(0)
    tensors = {"w0": rng.normal(size=(6, 3, 1, 1)), "b0": rng.normal(2, 3, 6), "w1": rng.normal(size=(6, 4))}
    tensors["w0"][0] *= 30
    model = with_weights(text, tensors)
    feeds, before = samples(model), answers(model, samples(model))[0]
    graph, _, channel_groups, plan, seen = prepared(model, 4)
    equalization.transform_groups(graph, channel_groups, plan, seen, {})
    assert not np.array_equal(graph.constant("w0"), tensors["w0"].astype(np.float32))  # it was transformed all the same
    np.testing.assert_allclose(answers(graph.snapshot(), feeds)[0], before, rtol=0, atol=1e-4 * np.abs(before).max())


@pytest.mark.parametrize(
    ("mixed", "groups", "kernel"),
    [(False, 1, 1), (False, 1, 4), (False, 3, 1), (False, 3, 4), (True, 1, 1), (True, 1, 4)],
)
def test_moments_and_gradients_follow_a_transform_of_the_values(mixed, groups, kernel):
    """Against the moments of patches that are transformed value by value."""
    channels, positions = 6, 50
    rng = np.random.default_rng(groups + kernel)
    patches = rng.normal(1, 2, (kernel, channels, positions))
    matrix = rng.normal(size=(channels, channels)) if mixed else rng.uniform(0.1, 3, channels)
    inverse = np.linalg.inv(matrix) if mixed else 1 / matrix
    one = transform.Transform(matrix, inverse, {"t": rng.normal(size=channels)})
    changed = np.stack([one.values(patch, "t") for patch in patches])
    whole = matrix if mixed else np.diag(matrix)
    np.testing.assert_allclose(changed, np.einsum("ab,kbp->kap", whole, patches - one.shift["t"][:, None]), atol=1e-12)

    def rows(values):
        return values.reshape(kernel, groups, -1, positions).transpose(1, 0, 2, 3).reshape(groups, -1, positions)

    def moments(values):
        x = rows(values)
        return Moments(x.mean(-1), x @ x.transpose(0, 2, 1) / positions, np.zeros(groups))

    found, wanted = one.moments(moments(patches), "t"), moments(changed)
    np.testing.assert_allclose(found.mean, wanted.mean, atol=1e-12)
    np.testing.assert_allclose(found.hessian, wanted.hessian, atol=1e-10)
    # y = w^T t becomes (w^T A^-1)(A t): what an error of A t shows at y, E[g g^T] for g = A^-T w.
    w = rng.normal(size=channels)
    moved = np.linalg.inv(whole).T @ w
    np.testing.assert_allclose(one.gradient(np.outer(w, w)), np.outer(moved, moved), atol=1e-10)
    weight = rng.normal(size=(groups, 2, kernel * channels // groups))
    before = rows(patches - one.shift["t"][:, None])
    np.testing.assert_allclose(one.reader(weight) @ rows(changed), weight @ before, atol=1e-10)
