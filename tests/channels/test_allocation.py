"""The budget is kept, and spent where it costs least."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lwdf.channels.allocation import Curve, allocate, most_removed, step_of


def curve(slopes, worth=1.0):
    """Convex: sorted costs of one unit each."""
    return Curve(np.concatenate([[0.0], np.cumsum(np.sort(slopes))]), len(slopes), worth)


@given(st.lists(st.lists(st.floats(0.01, 10), min_size=2, max_size=5), min_size=1, max_size=3), st.integers(0, 12))
def test_the_best_of_all_divisions_for_convex_curves(slopes, budget):
    curves = [curve(s) for s in slopes]
    found = allocate(curves, budget)
    most = [most_removed(c.units) for c in curves]
    spent = min(budget, sum(most))
    assert sum(found) == spent
    divisions = (d for d in product(*(range(m + 1) for m in most)) if sum(d) == spent)
    best = min(sum(c.errors[n] for c, n in zip(curves, d, strict=True)) for d in divisions)
    assert sum(c.errors[n] for c, n in zip(curves, found, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize(("units", "step"), [(960, 8), (64, 8), (32, 4), (16, 4), (15, 1), (2, 1)])
def test_what_remains_of_a_wide_group_is_a_multiple_of_the_step(units, step):
    assert step_of(units) == step
    for budget in range(0, units, 7):
        removed = allocate([curve(np.ones(units))], budget)[0]
        assert budget - step < removed <= budget or removed > most_removed(units) - step
        assert (units - removed) % step == 0


def test_an_odd_width_is_first_brought_to_a_multiple():
    assert allocate([curve(np.ones(105))], 4) == [1]
    assert allocate([curve(np.ones(105))], 9) == [9]


def test_a_worthier_unit_goes_first():
    assert allocate([curve(np.ones(4)), curve(np.full(4, 2.0), worth=3.0)], 2) == [0, 2]


def test_one_always_stays():
    assert allocate([curve(np.zeros(2)), curve(np.zeros(30))], 100) == [1, 26]
