from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnx_lwdf.grid import symmetric
from onnx_lwdf.solvers import gptq, rtn

from . import random_problem


def by_elimination(weight: np.ndarray, hessian: np.ndarray, scale: float, low: int, high: int) -> list[int]:
    """OBQ's update for one row in its plain form: after each code, the free weights take their best values.

    The columns must be in the order of falling diagonal.
    """
    width = len(weight)
    stored = np.zeros(width)
    free_weight = weight.copy()
    for j in range(width):
        code = np.clip(np.rint(free_weight[j] / scale), low, high)
        stored[j] = code * scale
        done, free = slice(0, j + 1), slice(j + 1, width)
        # argmin over the free part of (w - v) H (w - v)^T with the coded part fixed
        shift = np.linalg.solve(hessian[free, free], hessian[free, done] @ (weight[done] - stored[done]))
        free_weight[free] = weight[free] + shift
    return [int(v) for v in np.rint(stored / scale)]


@pytest.mark.parametrize("channels", [5, 70, 150])  # within a block, across two, across three
def test_codes_are_those_of_plain_elimination(channels: int) -> None:
    problem = random_problem(channels, out=3, channels=channels, bits=3)
    order = np.argsort(-np.diagonal(problem.hessian[0]))
    problem = replace(
        problem, weight=problem.weight[..., order], hessian=problem.hessian[:, order][:, :, order], pair_limit=None
    )
    scale = np.abs(problem.weight).max(-1) / 4
    codes, note = gptq.round_columns(problem, symmetric(scale, 3))
    assert codes is not None
    assert note == ""
    damped = problem.hessian[0] + gptq.DAMPING * np.mean(np.diagonal(problem.hessian[0])) * np.eye(channels)
    for o in range(3):
        assert codes[0, o].tolist() == by_elimination(problem.weight[0, o], damped, scale[0, o], -4, 3)


def test_correlated_inputs_share_their_errors() -> None:
    """Inputs that are always equal: only the sum of their weights counts, and it is met to half a code."""
    problem = random_problem(0, out=50, channels=10, bits=4)
    weight = problem.weight.copy()
    ends = weight.min(-1), weight.max(-1)
    weight[..., -1] = np.mean(ends, axis=0)  # the last column has room for what the others leave: it is not clipped
    problem = replace(problem, weight=weight, hessian=np.ones((1, 10, 10)))
    answer = gptq.solve(problem)
    assert np.abs((answer.weight - problem.weight).sum(-1) / answer.rounding.scale).max() <= 0.5 + 0.02  # damping
    assert answer.loss < 0.3 * rtn.solve(problem).loss


def test_a_pair_limit_is_paid_for_by_later_columns() -> None:
    """The clamped half of a pair is compensated: clamping the finished codes instead costs more."""
    problem = random_problem(4, out=40, channels=30, bits=8, pair_limit=128)
    problem = replace(problem, weight=np.abs(problem.weight) + 1)
    assert gptq.solve(problem).loss < 0.8 * rtn.solve(problem).loss


def test_a_rank_deficient_hessian_needs_no_note() -> None:
    problem = random_problem(0, channels=12)
    inputs = np.random.default_rng(0).normal(size=(3, 12))
    answer = gptq.solve(replace(problem, hessian=(inputs.T @ inputs)[None]))
    assert answer.notes == ()
    assert np.isfinite(answer.loss)


def test_an_indefinite_hessian_is_damped_more_and_says_so() -> None:
    problem = random_problem(0, channels=4)
    hessian = np.eye(4) - 0.35 * (1 - np.eye(4))  # least eigenvalue -0.05
    assert gptq.solve(replace(problem, hessian=hessian[None])).notes == ("damping 0.1",)


def test_a_hessian_that_no_damping_saves_falls_back_to_nearest_rounding() -> None:
    problem = random_problem(0, channels=4)
    hessian = np.eye(4) + 1e6 * (1 - np.eye(4))
    problem = replace(problem, hessian=hessian[None])
    answer = gptq.solve(problem)
    assert answer.notes == ("H could not be factored; nearest rounding",)
    np.testing.assert_array_equal(answer.rounding.codes, rtn.solve(problem).rounding.codes)


def test_conditional_variances_are_those_of_regression_on_the_later_columns() -> None:
    problem = random_problem(6, channels=6)
    hessian = problem.hessian[0]
    damped = hessian + gptq.DAMPING * np.mean(np.diagonal(hessian)) * np.eye(6)
    order = np.argsort(-np.diagonal(hessian))
    found = gptq.conditional_variances(problem.hessian)[0]
    for place, j in enumerate(order):
        later = order[place + 1 :]
        explained = damped[j, later] @ np.linalg.solve(damped[np.ix_(later, later)], damped[later, j])
        assert found[j] == pytest.approx(damped[j, j] - explained)
