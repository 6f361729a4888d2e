"""Layers that share a weight are found, solved together, and stored once."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnx_lwdf
from onnx_lwdf.activations.moments import Moments
from onnx_lwdf.activations.taps import Samples
from onnx_lwdf.config import Config
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, Pruning, find_layers, weight_of
from onnx_lwdf.layerwise import solve_layers
from onnx_lwdf.precondition import copies
from onnx_lwdf.preparation import prepare
from onnx_lwdf.sharing import factors, sharing
from onnx_lwdf.solvers import SOLVERS
from onnx_lwdf.solvers.problem import LayerProblem
from tests.nets import FAST, answers, residual, samples, sqnr_db, trained, with_weights
from tests.precondition.test_copies import network as copyable

# Two levels of a pyramid, a head of two layers that runs over both, normalized apart on each as EfficientDet's.
PYRAMID = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,16,16] x) => (float[N,4,16,16] y, float[N,4,8,8] z) {
    a = Conv <pads = [1,1,1,1]> (x, w0)
    p = Relu (a)
    q = Conv <pads = [1,1,1,1], strides = [2,2]> (p, w1)
    p0 = Conv <pads = [1,1,1,1]> (p, w2, b2)
    p1 = BatchNormalization (p0, g0, s0, m0, v0)
    p2 = Relu (p1)
    y = Conv (p2, w3, b3)
    q0 = Conv <pads = [1,1,1,1]> (q, w2, b2)
    q1 = BatchNormalization (q0, g1, s1, m1, v1)
    q2 = Relu (q1)
    z = Conv (q2, w3, b3)
}
"""
HEAD = [(32, 16, 3, 3), (4, 32, 1, 1)]  # shapes of its two weights


def pyramid(sign: float = 1.0) -> onnx.ModelProto:
    """`sign`: of one channel's factor in front of the second level's activation."""
    rng = np.random.default_rng(5)
    tensors = {
        "w0": rng.normal(0, 0.3, (16, 3, 3, 3)),
        "w1": rng.normal(0, 0.2, (16, 16, 3, 3)),
        "w2": rng.normal(0, 0.2, (32, 16, 3, 3)),
        "b2": rng.normal(0, 0.1, 32),
        "w3": rng.normal(0, 0.3, (4, 32, 1, 1)),
        "b3": rng.normal(0, 0.1, 4),
    }
    for i in range(2):
        tensors |= {f"g{i}": rng.uniform(0.5, 1.5, 32), f"s{i}": rng.normal(0.3, 0.5, 32)}
        tensors |= {f"m{i}": np.zeros(32), f"v{i}": np.ones(32)}
    tensors["g1"][3] *= sign
    return trained(with_weights(PYRAMID, tensors))


def stored(model: onnx.ModelProto) -> list[tuple[int, ...]]:
    """Shapes of the integers that weights are made of."""
    values = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    return [value.shape for value in values if value.dtype.itemsize == 1 and value.size >= 64 and value.ndim > 1]


def plain() -> onnx.ModelProto:
    """The pyramid without BatchNormalization."""
    text = re.sub(r"\s+[pq]1 = BatchNormalization.*", "", PYRAMID).replace("p1)", "p0)").replace("q1)", "q0)")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in pyramid().graph.initializer}
    return with_weights(text, {name: value for name, value in tensors.items() if name[0] in "wb"})


def folded(model: onnx.ModelProto) -> tuple[Graph, list]:
    prepared = prepare(model, Config())
    return prepared.graph, list(prepared.layers)


def test_found_by_values_and_positive_factors():
    graph, layers = folded(pyramid())
    named = [[layer.node.output[0] for layer in same] for same in sharing(graph, layers)]
    assert sorted(map(len, named)) == [1, 1, 2, 2]
    assert ["p1", "q1"] in named or ["p2", "q2"] in named
    graph, layers = folded(pyramid(-1.0))
    assert sorted(map(len, sharing(graph, layers))) == [1, 1, 1, 1, 2]  # codes have no sign to change


def test_single_numbers_share_where_they_are_equal():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,1,8,8] x) => (float[N,4,8,8] y, float[N,4,8,8] z, float[N,4,8,8] u) {
        y = Conv (x, w)
        z = Conv (x, v)
        u = Conv (x, w)
    }
    """
    w = np.arange(1.0, 5.0).reshape(4, 1, 1, 1)
    graph = Graph(with_weights(text, {"w": w, "v": 2 * w}))
    assert [len(same) for same in sharing(graph, find_layers(graph)[0])] == [2, 1]


def test_factors_are_what_rows_were_multiplied_by():
    rng = np.random.default_rng(0)
    weight, by = rng.standard_normal((2, 5, 7)), rng.uniform(0.1, 10, (2, 5))
    weight[1, 2] = 0
    by[1, 2] = 1  # nothing says otherwise
    np.testing.assert_allclose(factors(weight, by[..., None] * weight), by, rtol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_bits": 4},
        {"weight_bits": 4, "activation_bits": 4},
        {"nm": (2, 4), "weight_bits": 8},
        {"sparsity": 0.4, "weight_bits": 8},
        {"channels": 0.2, "weight_bits": 8},
    ],
    ids=str,
)
def test_codes_are_written_once_and_both_readers_have_integer_kernels(options, tmp_path):
    model, path = pyramid(), tmp_path / "out.onnx"
    result = onnx_lwdf.compress(model, path, **options, **FAST)
    assert len(stored(result.model)) == 4
    assert not result.report.warnings
    shared = [layer for layer in result.report.compressed if "has the weights of" in layer.reason]
    assert len(shared) == 2
    feeds = samples(model, 16)
    for exact, answer in zip(answers(model, feeds), answers(onnx.load(path), feeds), strict=True):
        assert sqnr_db(exact, answer) > (5 if options else 25)


def test_a_reader_with_opposite_signs_has_codes_of_its_own():
    model = pyramid(-1.0)
    result = onnx_lwdf.compress(model, **FAST)
    assert sorted(stored(result.model)) == sorted([*HEAD, HEAD[0], (16, 3, 3, 3), (16, 16, 3, 3)])
    assert [text for text in result.report.warnings if "written more than once" in text]
    feeds = samples(model, 16)
    for exact, answer in zip(answers(model, feeds), answers(result.model, feeds), strict=True):
        assert sqnr_db(exact, answer) > 25


@pytest.mark.parametrize("options", [{"nm": (2, 4)}, {"sparsity": 0.4}, {"channels": 0.2}], ids=str)
def test_floats_are_written_once_where_nothing_makes_them_differ(options):
    model = plain()
    result = onnx_lwdf.compress(model, format="dense", **options, **FAST)
    shapes = [tensor.dims for tensor in result.model.graph.initializer]
    assert sum(len(shape) == 4 for shape in shapes) == 4
    assert not [text for text in result.report.warnings if "written more than once" in text]
    for pair in zip(*(answers(one, samples(model, 16)) for one in (model, result.model)), strict=True):
        assert sqnr_db(*pair) > 5
    apart = onnx_lwdf.compress(pyramid(), format="dense", **options, **FAST)
    assert [text for text in apart.report.warnings if "written more than once" in text]


@pytest.mark.parametrize("form", ["folded", "packed", "sparse"])
def test_every_storage_of_codes_writes_them_once(form):
    model = pyramid()
    alone, both = (
        onnx_lwdf.compress(one, format=form, weight_bits=6, activation_bits="float", **FAST).model.ByteSize()
        for one in (pyramid(-1.0), model)
    )
    assert both < alone - 0.5 * np.prod(HEAD[0])  # 6 of 8 bits of them


def test_the_joint_problem_counts_the_relative_error_of_each_reader():
    """The solver's own answer to the sum that the formula says, written out."""
    graph, layers = folded(pyramid())
    first, second = next(same for same in sharing(graph, layers) if same[0].kernel_size > 1 and len(same) > 1)
    rng = np.random.default_rng(1)
    weights = [weight_of(graph, layer) for layer in (first, second)]
    inputs = [
        rng.standard_normal((width, 300)) * rng.uniform(0.1, 30, (width, 1)) for width in (weights[0].shape[2],) * 2
    ]
    moments = [(x @ x.T / x.shape[1])[None] for x in inputs]
    powers = [np.trace(weights[0][0] @ moment[0] @ weights[0][0].T) for moment in moments]
    total = sum(moment / power for moment, power in zip(moments, powers, strict=True))
    still = np.zeros((1, weights[0].shape[2]))
    samples = {
        layer.name: Moments(still, moment, np.zeros(1)) for layer, moment in zip((first, second), moments, strict=True)
    }
    config = Config(weight_bits=4, activation_bits=None, vector_size=0)
    plan, pruning = ({layer.name: each for layer in (first, second)} for each in (Bits(4, None), Pruning()))
    one, other = solve_layers(
        graph, (first, second), plan, pruning, {}, Samples(samples, {}), config, {second.name: first.name}
    )
    problem = LayerProblem(weights[0], total / total.max(), 4, np.zeros(weights[0].shape[:2]), first.kernel_size)
    expected = SOLVERS["descent"].solve(problem).rounding
    for answer in (one, other):
        np.testing.assert_array_equal(answer.solution.rounding.codes, expected.codes)
    by = factors(*weights)
    np.testing.assert_allclose(one.solution.rounding.scale, expected.scale, rtol=1e-6)  # float32
    np.testing.assert_allclose(other.solution.rounding.scale, expected.scale * by, rtol=1e-6)


def test_a_size_is_kept_and_readers_have_the_same_bits():
    model = pyramid()
    most = int(0.42 * model.ByteSize())  # 8 bits take 0.45
    result = onnx_lwdf.compress(model, bits="auto", max_size=most, **FAST)
    assert result.model.ByteSize() <= most
    widths = {layer.name: layer.weight_bits for layer in result.report.compressed}
    twins = {layer.name: layer.reason.split()[-1] for layer in result.report.compressed if "weights of" in layer.reason}
    assert len(twins) == 2
    assert all(widths[name] == widths[first] for name, first in twins.items())


def siamese(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network twice, on two inputs, with one set of weights."""
    both = onnx.ModelProto()
    both.CopyFrom(model)
    weights = {tensor.name for tensor in model.graph.initializer}
    for field in ("node", "input", "output"):
        del getattr(both.graph, field)[:]
    for side in ("left", "right"):
        for node in model.graph.node:
            twin = both.graph.node.add()
            twin.CopyFrom(node)
            twin.name = f"{side}.{node.name}"
            twin.input[:] = [name if name in weights or not name else f"{side}.{name}" for name in node.input]
            twin.output[:] = [f"{side}.{name}" for name in node.output]
        for field in ("input", "output"):
            for value in getattr(model.graph, field):
                twin = getattr(both.graph, field).add()
                twin.CopyFrom(value)
                twin.name = f"{side}.{value.name}"
    return both


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("network", "copied"), [(lambda: residual(width=24), 0), (copyable, 1)], ids=["", "copies"])
def test_siamese_networks_keep_one_set_of_codes(network, copied, bits, monkeypatch):
    """Clips, a residual sum, depthwise layers, channels that are copied: all of them keep what is shared."""
    monkeypatch.setattr(copies, "MOST_ADDED", 0.5)
    one = network()
    single = onnx_lwdf.compress(one, bits=bits, **FAST)
    both = onnx_lwdf.compress(siamese(one), bits=bits, **FAST)
    assert len(both.report.compressed) == 2 * len(single.report.compressed)
    assert sum("channels copied" in layer.reason for layer in both.report.compressed) == copied * (bits < 8)
    shared = [layer for layer in both.report.compressed if "has the weights of" in layer.reason]
    assert len(shared) == len(single.report.compressed)
    feeds = samples(siamese(one), 16)
    alone = [sqnr_db(*pair) for pair in _sides(one, single.model, feeds)]
    joint = zip(answers(siamese(one), feeds), answers(both.model, feeds), strict=True)
    for expected, (exact, answer) in zip(alone, joint, strict=True):
        assert sqnr_db(exact, answer) > expected - 6  # from seed to seed such small networks vary by 4


def _sides(one: onnx.ModelProto, small: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> Iterator[list[np.ndarray]]:
    for value in feeds.values():
        yield [answers(model, {"x": value})[0] for model in (one, small)]


def test_what_one_reader_silences_costs_the_other_nothing():
    """A gamma next to 0 with a bias leaves rows whose int32 bias wants a scale beyond all that the others have."""
    decibels = []
    for gamma in (1.0, 1e-8, 1e-12, 0.0):
        model = pyramid()
        (factors_of,) = [tensor for tensor in model.graph.initializer if tensor.name == "g1"]
        values = numpy_helper.to_array(factors_of).copy()
        values[::8] *= gamma
        factors_of.CopyFrom(numpy_helper.from_array(values, "g1"))
        result = onnx_lwdf.compress(model, **FAST)
        assert len(stored(result.model)) == 4
        feeds = samples(model, 16)
        decibels.append(
            [sqnr_db(*pair) for pair in zip(answers(model, feeds), answers(result.model, feeds), strict=True)]
        )
    assert np.min(decibels, axis=0).min() > np.array(decibels[0]).min() - 4  # other channels reach elsewhere


def test_matmuls_over_rows_of_other_lengths_are_no_channels():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,10,16] x, float[N,20,16] u) => (float[N,10,12] y, float[N,20,12] z) {
        a = MatMul (x, w)
        b = Relu (a)
        y = MatMul (b, v)
        c = MatMul (u, w)
        d = Relu (c)
        z = MatMul (d, v)
    }
    """
    rng = np.random.default_rng(0)
    model = with_weights(text, {"w": rng.normal(0, 0.3, (16, 24)), "v": rng.normal(0, 0.3, (24, 12))})
    result = onnx_lwdf.compress(model, **FAST)
    assert sorted(stored(result.model)) == [(16, 24), (24, 12)]
    feeds = samples(model, 16)
    for pair in zip(answers(model, feeds), answers(result.model, feeds), strict=True):
        assert sqnr_db(*pair) > 25


LEVELS = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,12,12] x) => (float[N,4,12,12] y, float[N,4,6,6] z) {
    a = Conv <pads = [1,1,1,1]> (x, w0, b0)
    b = Relu (a)
    c = Conv <pads = [1,1,1,1], group = 16> (b, w1, b1)
    d = Relu (c)
    y = Conv (d, v)
    A = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w2, b2)
    B = Relu (A)
    C = Conv <pads = [1,1,1,1], group = 16> (B, w3, b3)
    D = Relu (C)
    z = Conv (D, v)
}
"""


@pytest.mark.parametrize("seed", range(3))
def test_copies_run_through_the_depthwise_layers_of_all_levels(seed, monkeypatch):
    monkeypatch.setattr(copies, "MOST_ADDED", 0.5)
    monkeypatch.setattr(copies, "AT_A_TIME", 1)  # sixteen more would be all of these small layers
    rng = np.random.default_rng(seed)
    shapes = {"w0": (16, 3, 3, 3), "w1": (16, 1, 3, 3), "w2": (16, 3, 3, 3), "w3": (16, 1, 3, 3), "v": (4, 16, 1, 1)}
    tensors = {name: rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    tensors |= {f"b{i}": rng.normal(0.2, 0.2, 16) for i in range(4)}
    tensors["b0"][3] = tensors["b2"][5] = 60.0
    model = with_weights(
        LEVELS, {name: np.abs(value) if name in ("w1", "w3") else value for name, value in tensors.items()}
    )
    result = onnx_lwdf.compress(model, bits=6, **FAST)
    assert [layer.reason for layer in result.report.compressed if "channels copied" in layer.reason]
    feeds = samples(model, 16)
    for pair in zip(answers(model, feeds), answers(result.model, feeds), strict=True):
        assert sqnr_db(*pair) > 25


@pytest.mark.parametrize(
    "options",
    [lambda name: {"exclude": [name]}, lambda name: {"bits_for": {name: 8}, "bits": 4}],
    ids=["excluded", "other bits"],
)
def test_readers_that_differ_are_told_apart(options):
    model = plain()
    second = [node.name for node in model.graph.node if node.op_type == "Conv" and "w2" in node.input][1]
    result = onnx_lwdf.compress(model, **options(second), **FAST)
    assert [text for text in result.report.warnings if "written more than once" in text]
    feeds = samples(model, 16)
    for pair in zip(answers(model, feeds), answers(result.model, feeds), strict=True):
        assert sqnr_db(*pair) > 5


def test_a_weight_that_stays_float_is_no_repetition():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,8,6,6] x, float[N,8,4,4] u) => (float[N,4,12,12] y, float[N,4,8,8] z) {
        a = Conv (x, w)
        y = ConvTranspose <strides = [2,2], kernel_shape = [2,2]> (a, t)
        b = Conv (u, w)
        z = ConvTranspose <strides = [2,2], kernel_shape = [2,2]> (b, t)
    }
    """
    rng = np.random.default_rng(0)
    model = with_weights(text, {"w": rng.normal(size=(8, 8, 1, 1)), "t": rng.normal(size=(8, 4, 2, 2))})
    result = onnx_lwdf.compress(model, **FAST)
    assert [tensor.name for tensor in result.model.graph.initializer].count("t") == 1
    assert not [text for text in result.report.warnings if "written more than once" in text]


def test_blurs_look_alike_and_tie_nothing():
    """Two kernels of the same numbers at unrelated places: the channels of one are an output, of the other they may go."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,12,12] x) => (float[N,8,12,12] y, float[N,4,12,12] z) {
        a = Conv (x, w)
        y = Conv <pads = [1,1,1,1], group = 8> (a, blur)
        c = Conv (x, u)
        d = Relu (c)
        e = Conv <pads = [1,1,1,1], group = 8> (d, blur)
        z = Conv (e, v)
    }
    """
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 3, 1, 1), "u": (8, 3, 1, 1), "v": (4, 8, 1, 1)}
    tensors = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    model = with_weights(text, tensors | {"blur": np.full((8, 1, 3, 3), 1 / 9)})
    result = onnx_lwdf.compress(model, channels=0.4, bits=8, **FAST)
    assert [layer.reason for layer in result.report.compressed if " channels removed" in layer.reason]


def test_a_layer_that_is_also_the_last_keeps_its_bits_everywhere():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,8,8] x) => (float[N,16,8,8] y) {
        a = Conv (x, w)
        b = Relu (a)
        c = Conv <pads = [1,1,1,1]> (b, v)
        d = Relu (c)
        e = Conv <pads = [1,1,1,1]> (d, u)
        f = Relu (e)
        y = Conv <pads = [1,1,1,1]> (f, v)
    }
    """
    rng = np.random.default_rng(0)
    shapes = {"w": (16, 3, 1, 1), "v": (16, 16, 3, 3), "u": (16, 16, 3, 3)}
    model = with_weights(text, {name: rng.normal(0, 0.1, shape) for name, shape in shapes.items()})
    result = onnx_lwdf.compress(model, bits=4, **FAST)
    assert [layer.weight_bits for layer in result.report.layers] == [8, 8, 4, 8]
    assert len(stored(result.model)) == 2  # besides the first layer, which has too few values to be counted
