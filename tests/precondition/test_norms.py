"""BatchNormalizations that no layer takes up: factors on both sides keep the function, and means are taken up."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lwdf import compress
from onnx_lwdf.activations.taps import Samples
from onnx_lwdf.graph import Graph
from onnx_lwdf.precondition import norms
from onnx_lwdf.precondition.norms import change_norm_input, change_norm_output, find_norms, mean_shifts, take_up
from onnx_lwdf.ranges import ActivationGrid
from tests.nets import FAST, answers, samples, sqnr_db, with_weights

JOINED = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,12,12] x) => (float[N,4] y) {
    a = Conv <pads = [1,1,1,1]> (x, w0, b0)
    c = Conv <pads = [1,1,1,1]> (x, w1, b1)
    d = Concat <axis = 1> (a, c)
    e = BatchNormalization (d, g, bb, m, v)
    f = Relu (e)
    h = Conv <pads = [1,1,1,1]> (f, w2, b2)
    k = GlobalAveragePool (h)
    l = Flatten (k)
    y = Gemm <transB = 1> (l, w3, b3)
}
"""


def joined(text=JOINED):
    """One channel of five hardly varies, far from 0; the normalization makes it as large as the others."""
    rng = np.random.default_rng(3)
    shapes = {
        "w0": (3, 3, 3, 3),
        "w1": (2, 3, 3, 3),
        "w2": (4, 5, 3, 3),
        "w3": (4, 4),
        "b0": 3,
        "b1": 2,
        "b2": 4,
        "b3": 4,
    }
    tensors = {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()}
    tensors["w1"][1] *= 1e-3
    tensors["b1"][1] = 3.0
    tensors |= {"g": np.ones(5), "bb": np.full(5, 0.5), "m": np.array([0, 0, 0, 0, 3.0]), "v": np.ones(5)}
    tensors["v"][4] = 4e-6
    return with_weights(text, tensors)


def test_only_inference_on_constants_counts():
    graph = Graph(joined())
    (norm,) = find_norms(graph)
    assert (norm.input, norm.output, norm.channels) == ("d", "e", 5)
    computed = JOINED.replace("e = Batch", "g1 = Identity (x0)\n    e = Batch").replace("(d, g, bb", "(d, g1, bb")
    computed = computed.replace("(float[N,3,12,12] x)", "(float[N,3,12,12] x, float[5] x0)")
    assert find_norms(Graph(with_weights(computed, {"bb": np.ones(5), "m": np.ones(5), "v": np.ones(5)}))) == []


def test_what_changes_before_and_behind_cancels():
    model, rng = joined(), np.random.default_rng(4)
    feeds, exact = samples(model), answers(joined(), samples(model))[0]
    graph = Graph(model)
    (norm,) = find_norms(graph)
    (reader,) = graph.consumers["e"]
    factor, shift, behind, moved = (rng.uniform(0.1, 10, (5, 1, 1)).astype(np.float32) for _ in range(4))
    centred = graph.add("Sub", ["d", graph.add_constant("shift", shift)], "d")
    graph.connect(norm.node, 0, graph.add("Mul", [centred, graph.add_constant("factor", factor)], "d"))
    divided = graph.add("Div", ["e", graph.add_constant("behind", behind)], "e")
    graph.connect(reader, 0, graph.add("Add", [divided, graph.add_constant("moved", moved)], "e"))
    change_norm_input(graph, norm, factor.ravel(), shift.ravel())
    change_norm_output(graph, norm, behind.ravel(), moved.ravel())
    graph.commit()
    # One channel's variance is 4e-6: what float32 loses of x is multiplied by 500.
    np.testing.assert_allclose(answers(graph.snapshot(), feeds)[0], exact, rtol=1e-3, atol=1e-3)


def test_the_stored_mean_moves_by_what_the_grids_add():
    graph = Graph(joined())
    grid, coarse = ActivationGrid(0.25, 128, 8), ActivationGrid(1.0, 128, 8)
    values = {"a": np.full((3, 8), 0.3, np.float32), "c": np.full((2, 8), 0.9, np.float32)}
    found = mean_shifts(graph, {"a": grid, "c": grid, "d": coarse}, Samples({}, values))
    # 0.3 is stored as 0.25, and that as 0; 0.9 as 1.
    np.testing.assert_allclose(found["e"], [-0.3, -0.3, -0.3, 0.1, 0.1], atol=1e-6)
    take_up(graph, found)
    np.testing.assert_allclose(
        graph.constant(find_norms(graph)[0].node.input[3]), [-0.3, -0.3, -0.3, 0.1, 3.1], atol=1e-6
    )
    assert mean_shifts(graph, {"d": coarse}, Samples({}, {"a": values["a"]})) == {}  # one part was not sampled
    assert mean_shifts(graph, {}, Samples({}, values)) == {}  # activations stay float


@pytest.mark.parametrize("blind", [False, True])
def test_a_channel_that_hardly_varies_is_not_lost_in_a_grid(blind, monkeypatch):
    if blind:
        monkeypatch.setattr("onnx_lwdf.precondition.channels.find_norms", lambda graph: [])
        monkeypatch.setattr(norms, "find_norms", lambda graph: [])
    model = joined()
    feeds = samples(model, 32)
    sound = sqnr_db(answers(model, feeds)[0], answers(compress(model, **FAST).model, feeds)[0])
    assert sound < 8 if blind else sound > 17
