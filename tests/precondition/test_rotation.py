"""The rotation that spreads heavy tails: orthogonal, and even where it counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lwdf.precondition.rotation import hartley, spreading


@given(st.integers(1, 70))
def test_hartley_is_orthogonal_and_its_own_inverse(n):
    np.testing.assert_allclose(hartley(n) @ hartley(n), np.eye(n), atol=1e-10)


@given(st.integers(2, 40), st.integers(0, 5))
def test_the_result_is_a_rotation(n, seed):
    values = np.random.default_rng(seed).standard_t(3, (n, 50))
    found = spreading(values)
    np.testing.assert_allclose(found @ found.T, np.eye(n), atol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_rare_large_values_along_one_direction_reach_all_channels_alike(sign):
    rng = np.random.default_rng(2)
    direction = rng.standard_normal(24)
    direction /= np.linalg.norm(direction)
    values = rng.standard_normal((24, 4000))
    values[:, :20] += sign * 60 * direction[:, None]
    rotated = spreading(values) @ (sign * direction)
    # Twenty values of 60 deviations against 4,000 of one: the direction is known within a few percent.
    np.testing.assert_allclose(rotated, 1 / np.sqrt(24), atol=0.02)
    assert np.abs(spreading(values) @ values).max() < 0.5 * np.abs(values).max()


def test_nothing_but_zeros_is_rotated_somehow():
    found = spreading(np.zeros((4, 10)))
    np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-10)
