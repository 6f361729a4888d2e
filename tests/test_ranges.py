"""Activation grids: zero is exact, ranges never exceed a Clip, the search beats min/max."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lwdf.ranges import grid_for, search_grid, widened


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.integers(2, 8))
def test_zero_is_exact_and_codes_cover_the_range(a, b, bits):
    low, high = min(a, b), max(a, b)
    grid = grid_for(low, high, bits)
    assert grid.quantize(np.zeros(1))[0] == 0
    assert 0 <= grid.zero_point <= grid.levels
    assert np.float32(grid.scale) == grid.scale
    if high - min(low, 0) > 1e-3:
        ends = grid.quantize(np.array([min(low, 0.0), max(high, 0.0)]))
        np.testing.assert_allclose(ends, [min(low, 0.0), max(high, 0.0)], atol=grid.scale)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("high", [6.0, 1.0, 0.1, 5.999])
def test_the_top_code_never_exceeds_a_clip(bits, high):
    grid = grid_for(0.0, high, bits)
    assert np.float32(grid.scale) * np.float32(grid.levels) <= np.float32(high)
    assert grid.zero_point == 0


def test_symmetric_grids_have_their_zero_in_the_middle():
    grid = grid_for(-1.0, 3.0, 8, symmetric=True)
    assert grid.zero_point == 128
    np.testing.assert_allclose(grid.quantize(np.array([3.0]))[0], 3.0, atol=grid.scale)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_search_is_not_worse_than_min_max_and_better_on_heavy_tails(bits):
    values = np.random.default_rng(0).standard_t(3, 50_000)
    weights = np.ones_like(values)

    def error(grid):
        return ((grid.quantize(values) - values) ** 2).mean()

    found, plain = error(search_grid(values, weights, bits)), error(grid_for(values.min(), values.max(), bits))
    assert found <= plain * 1.001
    if bits < 8:
        assert found < 0.7 * plain


def test_a_wider_grid_stays_within_its_bounds():
    grid = grid_for(-1.0, 3.0, 8)
    wider, bounded = widened(grid, 1.5), widened(grid, 1.5, -1.25, 4.0)
    step = grid.scale  # zero points are whole numbers of steps
    np.testing.assert_allclose(wider.quantize(np.array([-9.0, 9.0])), [-1.5, 4.5], atol=step)
    np.testing.assert_allclose(bounded.quantize(np.array([-9.0, 9.0])), [-1.25, 4.0], atol=step)
    assert widened(grid_for(0.0, 5.0, 6), 1.5, 0.0, 6.0) == grid_for(0.0, 6.0, 6)


def test_search_respects_the_bounds_of_the_activation():
    values = np.random.default_rng(0).uniform(0, 6, 10_000)
    grid = search_grid(values, np.ones_like(values), 8, low=0.0, high=6.0)
    assert grid.scale * grid.levels <= 6
    assert grid.zero_point == 0


def test_weights_decide_what_may_be_clipped():
    values = np.concatenate([np.random.default_rng(0).uniform(0, 1, 5000), np.full(50, 20.0)])
    ignored = search_grid(values, np.where(values > 2, 1e-9, 1.0), 4)
    heeded = search_grid(values, np.where(values > 2, 1e3, 1.0), 4)
    assert ignored.scale * ignored.levels < 3
    assert heeded.scale * heeded.levels > 15


def test_a_tensor_of_zeros_has_a_grid():
    grid = search_grid(np.zeros(10), np.ones(10), 8)
    assert grid.scale > 0
    assert grid.quantize(np.zeros(3)).tolist() == [0, 0, 0]
