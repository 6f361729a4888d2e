from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lwdf.grid import nearest, symmetric
from onnx_lwdf.solvers import squant
from onnx_lwdf.solvers.problem import LayerProblem

from . import pair_sums, signed_range

fuzz = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
HALF = 0.5 + 1e-9  # sums of up to a hundred errors in float64


def in_codes(exact: np.ndarray, kernel: int, bits: int = 8, limit: int | None = None) -> LayerProblem:
    """Weights in units of codes; `solved` pins the grid to whole numbers."""
    flat = np.asarray(exact, np.float64).reshape(-1, np.shape(exact)[-1])
    width = flat.shape[1]
    return LayerProblem(flat[None], np.eye(width)[None], bits, np.zeros((1, len(flat))), kernel, limit)


def solved(problem: LayerProblem) -> np.ndarray:
    grid = symmetric(np.ones(problem.weight.shape[:2]), problem.rounded_bits)
    with patch.object(squant, "weight_grid", lambda *_: grid):
        return squant.solve(problem).rounding.codes.astype(np.float64)


@fuzz
@given(seeds, st.sampled_from([1, 2, 3, 4, 9, 25]), st.integers(1, 12))
def test_where_nothing_is_clipped_all_sums_obey_the_law(seed: int, kernel: int, channels: int) -> None:
    exact = np.random.default_rng(seed).uniform(-40, 40, size=(16, kernel * channels))
    error = (solved(in_codes(exact, kernel))[0] - exact).reshape(16, kernel, channels)
    assert np.abs(error.sum((1, 2))).max() <= HALF
    assert np.abs(error).max() < 1  # every code is a neighbour of its weight
    if kernel > 1:
        assert np.abs(error.sum(1)).max() <= 1 + 1e-9  # the channel stage may give up half a code of each kernel


@fuzz
@given(seeds, st.integers(2, 4), st.sampled_from([1, 4]), st.booleans())
def test_where_codes_are_clipped_no_channel_sum_grows(seed: int, bits: int, kernel: int, limited: bool) -> None:
    low, high = signed_range(bits)
    limit = high + 1 if limited else None
    exact = np.random.default_rng(seed).uniform(low, high, size=(16, kernel * 5))
    problem = in_codes(exact, kernel, bits, limit)
    codes = solved(problem)
    assert low <= codes.min() <= codes.max() <= high
    assert limit is None or pair_sums(codes).max() <= limit
    before, after = (
        np.abs((c - problem.weight).sum(-1))
        for c in (nearest(problem.weight, symmetric(np.ones((1, 16)), bits), limit), codes)
    )
    if kernel == 1:
        assert np.all(after <= np.maximum(before, HALF))


@fuzz
@given(seeds, st.integers(2, 4))
def test_a_sum_over_the_law_has_no_flip_left(seed: int, bits: int) -> None:
    low, high = signed_range(bits)
    exact = np.random.default_rng(seed).normal(size=(16, 8)) * high / 1.5
    problem = in_codes(exact, 1, bits)
    error = solved(problem)[0] - problem.weight[0]
    total = error.sum(-1, keepdims=True)
    moved = problem.weight[0] + error - np.sign(total)
    neighbour = np.abs(moved - problem.weight[0]) < 1
    helps = (moved >= low) & (moved <= high) & neighbour
    assert not helps[np.abs(total[:, 0]) > HALF].any()


def test_the_largest_errors_are_flipped() -> None:
    exact = np.array([[1.1, 2.4, 3.3, 4.45]])  # rounded down: errors -0.1 -0.4 -0.3 -0.45, sum -1.25
    assert solved(in_codes(exact, 1)).tolist() == [[[1, 2, 3, 5]]]


def test_kernels_are_read_as_position_by_channel() -> None:
    """Channel 0 is inputs 0, 2, 4. Its errors -0.4 -0.3 -0.1 are flipped once; channel 1 has none."""
    exact = np.array([[3.4, 7.0, 3.3, 7.0, 3.1, 7.0]])
    assert solved(in_codes(exact, 3)).tolist() == [[[4, 7, 3, 7, 3, 7]]]


def test_what_a_kernel_flipped_the_channel_may_flip_back() -> None:
    """Four channels of errors -0.4 -0.3 become +0.6 -0.3 each, 1.2 in all: one of the four goes back."""
    exact = np.repeat([[0.4, 0.3]], 4).reshape(1, 8) + 5  # [position, channel]
    error = solved(in_codes(exact, 2))[0, 0] - exact[0]
    assert abs(error.sum()) <= HALF
    assert error[:4].sum() == pytest.approx(3 * 0.6 - 0.4)


def test_a_flip_that_the_pair_limit_forbids_goes_to_the_next_best() -> None:
    exact = np.array([[64.49, 63.4, 10.3, 10.0]])  # the first pair stands at 127 of 128: too near to be flipped
    codes = solved(in_codes(exact, 1, limit=128))
    assert codes.tolist() == [[[64, 63, 11, 10]]]


def test_a_flip_out_of_range_goes_to_the_next_best() -> None:
    exact = np.array([[7.4, 3.3, 2.0]])
    assert solved(in_codes(exact, 1, bits=4)).tolist() == [[[7, 4, 2]]]
