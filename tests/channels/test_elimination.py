"""Backward elimination and re-fitting against least squares on samples."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lwdf.channels import elimination
from onnx_lwdf.channels.elimination import Reader, eliminate, left_over, refit, restore


@pytest.fixture(autouse=True, scope="module")
def _no_ridge():
    """Least squares has none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elimination, "RIDGE", 1e-9)
        yield


def problem(seed, rows=4, units=6, width=1, samples=400):
    """Correlated samples, a weight, and the columns of each unit."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, units * width)) @ rng.normal(size=(units * width, units * width))
    x += rng.normal(size=units * width)
    columns = rng.permutation(units * width).reshape(units, width)
    return x, rng.normal(size=(rows, units * width)), columns


def least_squares(x, weight, kept):
    """numpy's own answer with a bias: the weight [rows, kept] and the mean squared error."""
    inside = np.column_stack([x[:, kept], np.ones(len(x))])
    target = x @ weight.T
    found = np.linalg.lstsq(inside, target, rcond=None)[0]
    return found[:-1].T, ((inside @ found - target) ** 2).sum() / len(x)


def mask(columns, gone):
    kept = np.ones(columns.size, bool)
    kept[columns[list(gone)].ravel()] = False
    return kept


@pytest.mark.parametrize("width", [1, 3])
def test_refit_is_least_squares(width):
    x, weight, columns = problem(0, width=width)
    kept = mask(columns, [1, 4])
    covariance = np.cov(x.T, bias=True)
    expected, error = least_squares(x, weight, kept)
    answer = refit(weight, covariance, kept)
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-4)
    assert left_over(weight, answer, covariance, kept) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(("rows", "width"), [(4, 1), (2, 3), (40, 1)])
def test_every_step_is_the_best_one_and_its_error_is_that_of_least_squares(rows, width):
    x, weight, columns = problem(1, rows=rows, width=width)
    path = eliminate([Reader(weight, np.cov(x.T, bias=True), columns)], 4)
    gone: list[int] = []
    for step, unit in enumerate(path.order):
        errors = {
            u: least_squares(x, weight, mask(columns, [*gone, u]))[1] for u in range(len(columns)) if u not in gone
        }
        assert unit == min(errors, key=errors.get)
        gone.append(int(unit))
        assert path.errors[step + 1] == pytest.approx(errors[int(unit)], rel=1e-3)


def test_two_readers_count_together():
    x, weight, columns = problem(2)
    z, other, places = problem(3)
    path = eliminate(
        [Reader(weight, np.cov(x.T, bias=True), columns), Reader(other, np.cov(z.T, bias=True), places)], 1
    )
    errors = [
        least_squares(x, weight, mask(columns, [u]))[1] + least_squares(z, other, mask(places, [u]))[1]
        for u in range(6)
    ]
    assert path.order[0] == int(np.argmin(errors))
    assert path.errors[1] == pytest.approx(min(errors), rel=1e-3)


def test_greedy_finds_the_best_pair_here():
    x, weight, columns = problem(3)
    path = eliminate([Reader(weight, np.cov(x.T, bias=True), columns)], 2)
    best = min(combinations(range(6), 2), key=lambda gone: least_squares(x, weight, mask(columns, gone))[1])
    assert set(path.order) == set(best)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_errors_grow_and_copies_are_free(seed, width):
    x, weight, columns = problem(seed, width=width)
    x[:, columns[3]] = x[:, columns[0]]
    x[:, columns[5]] = 2.5
    path = eliminate([Reader(weight, np.cov(x.T, bias=True), columns)], 5)
    scale = np.trace(weight @ np.cov(x.T, bias=True) @ weight.T)
    assert (np.diff(path.errors) >= 0).all()
    assert set(path.order[:2]) in ({0, 5}, {3, 5})
    assert path.errors[2] < 1e-4 * scale


def test_restored_rows_vary_as_before():
    x, weight, columns = problem(7)
    covariance, kept = np.cov(x.T, bias=True), mask(columns, [0])
    answer = restore(weight, refit(weight, covariance, kept), covariance, kept)
    np.testing.assert_allclose((x[:, kept] @ answer.T).var(0), (x @ weight.T).var(0), rtol=1e-6)


def test_a_row_that_nothing_explains_stays_silent():
    covariance, kept = np.eye(3), np.array([False, True, True])
    weight = np.array([[1.0, 0.0, 0.0]])
    answer = restore(weight, refit(weight, covariance, kept), covariance, kept)
    np.testing.assert_array_equal(answer, 0)
