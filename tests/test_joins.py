"""Steps that are shared at joins: sums become exact, noise never grows, and what must not widen does not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnx_lwdf
from onnx_lwdf.graph import Graph
from onnx_lwdf.joins import share_steps
from onnx_lwdf.ranges import ActivationGrid, grid_for
from onnx_lwdf.sites import Site
from tests.nets import FAST, with_weights

CHAIN = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,4,8,8] x) => (float[N,8,8,8] y) {
    a = Identity (x)
    f = Abs (a)
    s = Add (a, f)
    r = Relu (s)
    g = Neg (r)
    t = Add (r, g)
    y = Concat <axis = 1> (t, g)
}
"""
JOINS = {"r": ("a", "f"), "t": ("r", "g"), "y": ("t", "g")}
NAMES = "afrgty"


def shared(steps, weights, sites=None, fixed=frozenset()):
    sites = sites or [Site((name,), 8, None, None) for name in NAMES]
    grids = {name: ActivationGrid(float(np.float32(step)), 7, 8) for name, step in zip(NAMES, steps, strict=True)}
    gradients = {name: np.array([weight / 2, weight / 2]) for name, weight in zip(NAMES, weights, strict=True)}
    return grids, share_steps(Graph(onnx.parser.parse_model(CHAIN)), sites, grids, gradients, fixed)


def noise(grids, weights, exact=True):
    """Of the formula; a join adds nothing where all that it reads has its step."""
    total = 0.0
    for name, weight in zip(NAMES, weights, strict=True):
        same = exact and all(
            grids[other].scale == grids[name].scale for other in JOINS.get(name, ["none"]) if other in grids
        )
        total += 0.0 if same and name in JOINS else weight * grids[name].scale ** 2
    return total


some = st.lists(st.floats(0.01, 100), min_size=6, max_size=6)


@given(some, some)
def test_noise_never_grows_and_no_range_ends_earlier(steps, weights):
    before, after = shared(steps, weights)
    assert noise(after, weights) <= noise(before, weights, exact=False) * (1 + 1e-12)
    for name in NAMES:
        assert after[name].scale >= before[name].scale
        assert (after[name].zero_point, after[name].bits) == (7, 8)


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0.1, 10), st.floats(0.1, 10))
def test_one_join_is_decided_by_the_formula(a, f, r, own, read):
    """The others count nothing: t and y are outputs that no gradient reaches, g is fixed."""
    steps, weights = [a, f, r, 1000.0, 1000.0, 1000.0], [own, read, read, 0.0, 0.0, 0.0]
    before, after = shared(steps, weights, fixed={"g"})
    most = max(before[name].scale for name in "afr")
    apart = own * before["a"].scale ** 2 + read * (before["f"].scale ** 2 + before["r"].scale ** 2)
    together = most**2 * (own + read)
    assert {after[name].scale for name in "afr"} == ({most} if together < apart else {before[n].scale for n in "afr"})
    assert after["g"] == before["g"]


def test_what_is_read_by_a_concat_alone_has_its_step():
    _, after = shared([1, 2, 1000, 3, 5, 4], [0, 0, 0, 1, 1, 2], fixed={"r"})
    assert {after[name].scale for name in "gty"} == {5.0}
    assert {name: after[name].scale for name in "afr"} == {"a": 1.0, "f": 2.0, "r": 1000.0}


def test_without_gradients_nothing_is_known_to_pay():
    grids = {name: ActivationGrid(step, 7, 8) for name, step in zip(NAMES, (1, 1.1, 1.2, 1.3, 1.4, 1.5), strict=True)}
    sites = [Site((name,), 8, None, None) for name in NAMES]
    assert share_steps(Graph(onnx.parser.parse_model(CHAIN)), sites, grids, {}) == grids


@pytest.mark.parametrize("reason", ["a bound", "other bits", "fixed"])
def test_what_stays_as_it_is(reason):
    steps, weights = [1, 1.1, 1.2, 1000, 1000, 1000], [1, 1, 1, 0, 0, 0]
    assert shared(steps, weights)[1]["a"].scale == pytest.approx(1.2)
    high, bits = (6.0 if reason == "a bound" else None), 6 if reason == "other bits" else 8
    sites = [Site(("a",), bits, None, high), *(Site((name,), 8, None, None) for name in NAMES[1:])]
    before, after = shared(steps, weights, sites, {"a"} if reason == "fixed" else set())
    assert after["a"] == before["a"]


def test_sums_of_multiples_are_multiples():
    rng = np.random.default_rng(0)
    step = grid_for(-3.0, 5.0, 8).scale
    operands = ActivationGrid(step, 96, 8), ActivationGrid(step, 40, 8)
    parts = [grid.quantize(rng.uniform(-0.5, 1.5, 1000)) for grid in operands]
    total = parts[0] + parts[1]
    np.testing.assert_allclose(ActivationGrid(step, 100, 8).quantize(total), total, atol=1e-12)


def test_in_a_file_the_operands_of_a_sum_and_the_sum_have_one_step():
    """Two branches that nothing else reads: two squares of the widest step are less than three that differ little."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,8,8] x) => (float[N,4,8,8] y) {
        a = Conv (x, u)
        b = Conv (x, v)
        s = Add (a, b)
        y = Conv (s, w)
    }
    """
    rng = np.random.default_rng(0)
    shapes = {"u": (6, 3, 1, 1), "v": (6, 3, 1, 1), "w": (4, 6, 1, 1)}
    model = with_weights(text, {name: rng.normal(size=shape) for name, shape in shapes.items()})
    graph = Graph(onnx_lwdf.compress(model, **FAST).model)
    (add,) = [node for node in graph.nodes if node.op_type == "Add"]
    (reader,) = graph.consumers[add.output[0]]
    names = [*(graph.producer[name].input[1] for name in add.input), reader.input[1]]
    assert len({float(graph.constant(name)) for name in names}) == 1
