"""The budget is met exactly, and spent as an exhaustive search would."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lwdf.allocate import SPARSITIES, Curve, allocate

fuzz = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    steps = draw(st.lists(st.floats(0, 10), min_size=len(SPARSITIES) + 1, max_size=len(SPARSITIES) + 1))
    costs = np.cumsum(steps)
    return Curve(draw(st.integers(1, 5000)), tuple(map(float, costs[:-1])), float(costs[-1]))


@fuzz
@given(st.lists(curves(), min_size=1, max_size=8), st.floats(0, 0.999))
def test_the_budget_is_met_exactly(layers: list[Curve], sparsity: float) -> None:
    shares = allocate(layers, sparsity)
    zeros = [round(share * curve.size) for share, curve in zip(shares, layers, strict=True)]
    assert sum(zeros) == round(sparsity * sum(curve.size for curve in layers))
    assert all(0 <= share <= 1 for share in shares)


@fuzz
@given(st.lists(curves(), min_size=1, max_size=6), st.floats(0, 0.9), st.floats(0, 0.9))
def test_a_larger_budget_takes_no_zero_back(layers: list[Curve], one: float, other: float) -> None:
    less, more = (allocate(layers, sparsity) for sparsity in sorted((one, other)))
    assert all(a <= b + 1e-12 for a, b in zip(less, more, strict=True))


def cubic(size: int, weight: float) -> Curve:
    return Curve(size, tuple(weight * s**3 for s in SPARSITIES), weight)


def test_as_good_as_an_exhaustive_search() -> None:
    layers = [cubic(1000, 1.0), cubic(1000, 8.0), cubic(3000, 2.0)]
    shares = allocate(layers, 0.4)

    def cost(candidate: tuple[float, ...]) -> float:
        return sum(curve.full * share**3 for curve, share in zip(layers, candidate, strict=True))

    grid = np.linspace(0, 0.95, 39)
    every = (c for c in product(grid, repeat=3) if c[0] * 1000 + c[1] * 1000 + c[2] * 3000 >= 0.4 * 5000)
    assert cost(tuple(shares)) <= 1.01 * min(map(cost, every))


def test_equal_layers_share_equally_and_a_costly_one_gets_less() -> None:
    even = allocate([cubic(1000, 1.0), cubic(1000, 1.0)], 0.5)
    assert abs(even[0] - even[1]) <= 0.021  # one piece
    costly = allocate([cubic(1000, 1.0), cubic(1000, 20.0)], 0.5)
    assert costly[0] > 2 * costly[1]


def test_no_layer_loses_everything_where_others_can_give() -> None:
    assert max(allocate([cubic(1000, 0.0), cubic(1000, 1.0)], 0.5)) <= 0.95
