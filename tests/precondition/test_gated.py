"""Factors beside gated activations: where they are found, that the function stays, and that grids gain by them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from onnx_lwdf.activations.inputs import read_inputs
from onnx_lwdf.activations.sampler import draw_chunks, synthesize
from onnx_lwdf.api import compress
from onnx_lwdf.config import Config
from onnx_lwdf.gates import find_gates, response
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, find_layers
from onnx_lwdf.precondition import channels, equalization
from onnx_lwdf.precondition.channels import find_groups
from onnx_lwdf.precondition.fold import fold
from onnx_lwdf.statistics import ChannelStatistics
from tests.nets import FAST, answers, samples, sqnr_db, with_weights

GATES = {  # x -> y, and the operators that stand there afterwards, an entrance and an exit multiplied
    "h-swish, written out": ("p = Add (x, three) q = Clip (p, zero, six) r = Mul (x, q) y = Div (r, six)", 11, "MACMD"),
    "h-swish of opset 7": (
        "p = Add (x, three) q = Clip <min = 0.0, max = 6.0> (p) r = Mul (q, x) y = Div (r, six)",
        7,
        "MACMD",
    ),
    "h-swish with a Mul": (
        "p = Add (three, x) q = Relu (p) r = Min (q, six) s = Mul (x, r) y = Mul (sixth, s)",
        13,
        "MARMMM",
    ),
    "h-swish by HardSigmoid": ("p = HardSigmoid <alpha = 0.1666667> (x) y = Mul (x, p)", 10, "MHMM"),
    "HardSwish": ("y = HardSwish (x)", 14, "MHM"),
    "SiLU": ("p = Sigmoid (x) y = Mul (x, p)", 9, "MSMM"),
    "GELU": ("p = Div (x, two) q = Erf (p) r = Add (q, one) s = Mul (x, r) y = Mul (s, half)", 13, "MDEAMM"),
    "Gelu": ("y = Gelu (x)", 20, "MGM"),
    "Mish": ("p = Softplus (x) q = Tanh (p) y = Mul (x, q)", 8, "MSTMM"),
    "Sigmoid": ("y = Sigmoid (x)", 7, "MS"),
    "per channel": ("p = Sigmoid (x) q = Mul (p, x) y = Mul (q, channels)", 13, "MSMM"),
}
CONSTANTS = {"three": 3.0, "zero": 0.0, "six": 6.0, "sixth": 1 / 6, "two": 2.0, "one": 1.0, "half": 0.5}
HEAD = """
<ir_version: 7, opset_import: ["" : {opset}]>
net (float[N,3,12,12] i) => (float[N,4,12,12] o{outputs}) {{
    x = Conv <pads = [1,1,1,1]> (i, w0, b0)
    {gate}
    d = Conv <pads = [1,1,1,1], group = 8> (y, w1, b1)
    o = Conv (d, w2)
    {more}
}}
"""


def network(gate, opset, *, more="", outputs=""):
    """A wide channel with weights near 0 behind the gate, narrow ones with large weights: no grid holds both."""
    rng = np.random.default_rng(2)
    tensors = {"w0": rng.normal(0, 0.3, (8, 3, 3, 3)), "w1": rng.normal(0, 1, (8, 1, 3, 3)), "b1": rng.normal(0, 1, 8)}
    tensors |= {"w2": rng.normal(0, 1, (4, 8, 1, 1)), "b0": rng.normal(0, 0.5, 8)}
    tensors["w0"][0] *= 40
    tensors["w1"][0] /= 100
    text = HEAD.format(gate=gate, opset=opset, more=more, outputs=outputs)
    known = {name: np.array(value) for name, value in CONSTANTS.items()}
    known |= {"channels": np.linspace(0.5, 2, 8).reshape(8, 1, 1), "columns": np.linspace(0.5, 2, 12)}
    return with_weights(
        text, tensors | {name: value for name, value in known.items() if name in text.replace(",", " ")}
    )


def transformed(model):
    graph = Graph(model)
    statistics = fold(graph)
    layers, _ = find_layers(graph)
    config = Config(samples=16)
    inputs, _ = read_inputs(graph, config, statistics)
    groups = find_groups(graph, layers)
    tensors = [name for layer in layers for name in (layer.input, layer.output)]
    seen = synthesize(Graph(model), layers, tensors, statistics, draw_chunks(inputs, config), config)
    plan = dict.fromkeys((layer.name for layer in layers), Bits(8, 8))
    equalization.transform_groups(graph, groups, plan, seen, statistics)
    graph.commit()
    return graph


def by_reference(model, feeds):
    with np.errstate(over="ignore", invalid="ignore"):  # its Sigmoid computes both branches
        return ReferenceEvaluator(model).run(None, feeds)


@pytest.mark.parametrize(("gate", "opset", "operators"), GATES.values(), ids=GATES.keys())
def test_factors_stand_beside_a_gate_and_the_function_stays(gate, opset, operators):
    model = network(gate, opset)
    feeds = samples(model)
    before = answers(model, feeds)[0]
    graph = transformed(model)
    between = [node.op_type[0] for node in graph.nodes if node.op_type != "Conv"]
    assert "".join(between) == operators
    old, new = (Graph(network(gate, opset)).constant("w0"), graph.constant("w0"))
    assert np.abs(new).max((1, 2, 3))[0] < np.abs(old).max((1, 2, 3))[0]  # the wide channel became narrower
    for run in (answers, by_reference):
        np.testing.assert_allclose(run(graph.model, feeds)[0], before, rtol=0, atol=2e-5 * np.abs(before).max())
    onnx.checker.check_model(graph.model)


HSWISH, _, _ = GATES["h-swish, written out"]
LEFT = {
    "a second reader of the output": {"more": "z = Identity (y)", "outputs": ", float[N,8,12,12] z"},
    "a reader inside": {"more": "z = Neg (p)", "outputs": ", float[N,8,12,12] z"},
    "the output of the model": {"outputs": ", float[N,8,12,12] y"},
    "the input is an output of the model": {"outputs": ", float[N,8,12,12] x"},
}


@pytest.mark.parametrize("more", LEFT.values(), ids=LEFT.keys())
def test_a_gate_that_others_read_keeps_what_they_see(more):
    model = network(HSWISH, 13, **more)
    feeds, before = samples(model), answers(model, samples(model))
    graph = transformed(model)
    for old, new in zip(before, answers(graph.model, feeds), strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=2e-5 * np.abs(old).max())


@pytest.mark.parametrize(
    "gate",
    [
        "p = Sigmoid (x) q = Mul (p, x) y = Mul (q, columns)",  # another factor in every column
        "p = Softmax <axis = 1> (x) y = Mul (x, p)",  # channels depend on each other
        "y = Relu (x)",  # takes a factor as it is
        "y = Clip (x, zero, six)",
    ],
)
def test_what_is_no_gate(gate):
    graph = Graph(network(gate, 13))
    found = find_gates(graph, find_layers(graph)[0])
    assert all(item.output != "y" for item in found)


def test_a_gate_that_a_subgraph_reads_is_none():
    model = network(HSWISH, 13)
    then = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["p"], ["t"])], "then", [], [onnx.helper.make_empty_tensor_value_info("t")]
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(onnx.helper.make_node("If", ["yes"], ["z"], then_branch=then, else_branch=then))
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info("z"))
    graph = Graph(model)
    assert not find_gates(graph, find_layers(graph)[0])


EXCITED = """
<ir_version: 8, opset_import: ["" : 14]>
net (float[N,3,12,12] i) => (float[N,4,12,12] o) {
    x = Conv <pads = [1,1,1,1]> (i, w0)
    y = HardSwish (x)
    a = GlobalAveragePool (y)
    b = Conv (a, w1)
    c = Relu (b)
    d = Conv (c, w2)
    e = HardSigmoid (d)
    f = Mul (e, y)
    g = Conv (f, w3)
    h = HardSwish (g)
    s = Add (y, h)
    t = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (s)
    o = Conv (t, w4)
}
"""


def test_one_factor_serves_an_excited_residual_chain():
    """Two gates, joined by an Add, and the pool and the product of squeeze and excitation: one group."""
    rng = np.random.default_rng(4)
    shapes = {"w0": (8, 3, 3, 3), "w1": (2, 8, 1, 1), "w2": (8, 2, 1, 1), "w3": (8, 8, 1, 1), "w4": (4, 8, 1, 1)}
    tensors = {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()}
    tensors["w0"][0] *= 30
    tensors["w4"][:, 0] /= 30
    model = with_weights(EXCITED, tensors)
    graph = Graph(model)
    group = next(group for group in find_groups(graph, find_layers(graph)[0]) if "y" in group.tensors)
    assert set(group.tensors) == {"y", "a", "f", "h", "s", "t"}
    assert [gate.output for gate in group.written] == ["y", "h"]
    assert {layer.input for layer in group.consumers} == {"a", "f", "t"}
    feeds, before = samples(model), answers(model, samples(model))[0]
    after = transformed(model)
    assert sum(node.op_type == "Mul" for node in after.nodes) > 2
    for run in (answers, by_reference):
        np.testing.assert_allclose(run(after.model, feeds)[0], before, rtol=0, atol=2e-5 * np.abs(before).max())


def test_a_product_with_its_own_pool_takes_no_factor():
    """It would come out squared."""
    rng = np.random.default_rng(4)
    text = """
    <ir_version: 8, opset_import: ["" : 14]>
    net (float[N,3,8,8] i) => (float[N,4,8,8] o) {
        x = Conv (i, w0)
        y = HardSwish (x)
        a = GlobalAveragePool (y)
        f = Mul (y, a)
        o = Conv (f, w1)
    }
    """
    graph = Graph(with_weights(text, {"w0": rng.normal(size=(8, 3, 1, 1)), "w1": rng.normal(size=(4, 8, 1, 1))}))
    assert not any("y" in group.tensors for group in find_groups(graph, find_layers(graph)[0]))


def test_the_response_of_h_swish():
    """It is flat below -3, and what it may reach follows from mean and deviation, not from the samples alone."""
    graph = Graph(network(HSWISH, 13))
    (gate,) = find_gates(graph, find_layers(graph)[0])
    values = np.random.default_rng(0).normal(0, 1, (8, 500))
    known = ChannelStatistics(np.zeros(8), np.ones(8), np.ones(8))
    answer = response(graph, gate, values, known)
    np.testing.assert_allclose(answer.input.low, -3, atol=0.2)
    np.testing.assert_allclose(answer.input.high, 12)
    np.testing.assert_allclose(answer.output.high, 12)
    np.testing.assert_allclose(answer.output.low, -0.375, atol=0.01)
    assert np.all((answer.slope > 0.2) & (answer.slope < 0.6))  # about 1/2 + x / 3
    doubled = response(graph, gate, values, None)
    np.testing.assert_allclose(doubled.input.high, 2 * values.max(1))


@pytest.mark.parametrize("opset", [7, 13])
def test_a_network_that_no_grid_could_hold_comes_out_sound(opset, monkeypatch):
    gate, *_ = GATES["h-swish of opset 7" if opset == 7 else "h-swish, written out"]
    model = network(gate, opset)
    feeds = samples(model)
    found = answers(compress(model, **FAST).model, feeds)[0]
    monkeypatch.setattr(channels, "find_gates", lambda *_: [])
    without = answers(compress(model, **FAST).model, feeds)[0]
    exact = answers(model, feeds)[0]
    assert sqnr_db(exact, found) > 24
    assert sqnr_db(exact, without) < 18
