"""As good as an exhaustive search, within the limit, always."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lwdf.knapsack import knapsack

fuzz = settings(max_examples=200, deadline=None, derandomize=True)
Table = list[list[float]]


@st.composite
def tables(draw: st.DrawFn) -> tuple[Table, Table]:
    numbers = st.one_of(st.integers(0, 9).map(float), st.floats(0, 1e3, allow_subnormal=False))
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    costs, sizes = ([[draw(numbers) for _ in range(count)] for count in counts] for _ in range(2))
    return costs, sizes


def total(table: Table, chosen: tuple[int, ...] | list[int]) -> float:
    return sum(row[index] for row, index in zip(table, chosen, strict=True))


@fuzz
@given(tables(), st.floats(0, 40))
def test_as_good_as_an_exhaustive_search(both: tuple[Table, Table], limit: float) -> None:
    costs, sizes = both
    fitting = [c for c in product(*(range(len(row)) for row in costs)) if total(sizes, c) <= limit]
    chosen = knapsack(costs, sizes, limit)
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert total(sizes, chosen) <= limit
        assert total(costs, chosen) == pytest.approx(min(total(costs, c) for c in fitting), rel=1e-8)


@fuzz
@given(tables(), st.floats(0, 40), st.floats(0, 40))
def test_more_room_costs_no_more(both: tuple[Table, Table], one: float, other: float) -> None:
    costs, sizes = both
    less, more = (knapsack(costs, sizes, limit) for limit in sorted((one, other)))
    if less is not None:
        assert more is not None
        assert total(costs, more) <= total(costs, less) * (1 + 1e-8)


def test_a_hundred_layers_near_their_relaxed_bound() -> None:
    """No search can reach below the linear relaxation, and one layer's step above it there is a whole solution."""
    rng = np.random.default_rng(0)
    weights = rng.integers(1000, 400_000, 100)
    sizes = [[float(count * bits // 8) for bits in range(2, 9)] for count in weights]
    costs = [[float(scale) * 4.0**-bits for bits in range(2, 9)] for scale in np.exp(rng.normal(0, 2, 100))]
    limit = 0.5 * float(weights.sum())
    chosen = knapsack(costs, sizes, limit)
    assert chosen is not None
    assert total(sizes, chosen) <= limit

    def relaxed(multiplier: float) -> float:
        rows = zip(costs, sizes, strict=True)
        return sum(min(c + multiplier * s for c, s in zip(*row, strict=True)) for row in rows) - multiplier * limit

    bound = max(map(relaxed, np.geomspace(1e-12, 1e-3, 2000)))
    assert bound <= total(costs, chosen) <= 1.01 * bound
