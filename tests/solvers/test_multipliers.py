"""Laws of the methods that take multipliers for runs of inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lwdf.solvers import SOLVERS, Solver
from onnx_lwdf.solvers.problem import LayerProblem, LayerSolution
from onnx_lwdf.vectors import Vectors

from . import loss_by_definition, random_problem

fuzz = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
every_solver = pytest.mark.parametrize(
    "solve",
    [SOLVERS[name].solve for name in ("rtn", "gptq", "descent", "magnitude")],
    ids=["rtn", "gptq", "descent", "magnitude"],
)


def problem_of(seed: int, bits: int = 4, kernel: int = 3, channels: int = 13) -> LayerProblem:
    """Runs of 5, 5 and 3 inputs at each kernel position."""
    runs = Vectors(5, kernel, {2: 8, 3: 8, 4: 7, 5: 3}[bits])
    return random_problem(seed, groups=2, kernel=kernel, channels=channels, bits=bits, vectors=runs)


def codes_of(problem: LayerProblem, answer: LayerSolution) -> np.ndarray:
    """The codes without multipliers, by plain loops."""
    assert answer.rounding is not None
    assert answer.rounding.multiplier is not None
    integers, result = answer.rounding.codes, np.zeros(answer.rounding.codes.shape, int)
    channels, runs = integers.shape[2] // problem.kernel, -(-integers.shape[2] // problem.kernel // 5)
    for position in range(problem.kernel):
        for channel in range(channels):
            multiplier = answer.rounding.multiplier[:, :, position * runs + channel // 5]
            column = integers[:, :, position * channels + channel]
            assert not (column % multiplier).any()
            result[:, :, position * channels + channel] = column // multiplier
    return result


@every_solver
@fuzz
@given(seeds, st.integers(2, 5))
def test_integers_are_codes_times_multipliers(solve: Solver, seed: int, bits: int) -> None:
    problem = problem_of(seed, bits)
    answer = solve(problem)
    codes, multiplier = codes_of(problem, answer), answer.rounding.multiplier
    assert np.all(codes.max(-1, initial=0) - codes.min(-1, initial=0) < 2**bits)
    assert multiplier.min() >= 1
    assert multiplier.max() <= problem.vectors.most
    most = max(problem.vectors.most * (2 ** (bits - 1) + max(1, 2 ** (bits - 4))), 2**bits)
    assert np.abs(answer.rounding.codes.astype(int)).max() <= most
    losses = loss_by_definition(problem.weight, answer.weight, problem.hessian)
    np.testing.assert_allclose(answer.loss, losses.sum(), rtol=1e-9)


@fuzz
@given(seeds, st.integers(2, 5))
def test_on_unit_moments_every_method_rounds_to_nearest(seed: int, bits: int) -> None:
    problem = problem_of(seed, bits)
    problem = replace(problem, hessian=np.broadcast_to(np.eye(39), problem.hessian.shape).copy())
    nearest, second = (SOLVERS[name].solve(problem).rounding for name in ("rtn", "gptq"))
    np.testing.assert_array_equal(nearest.codes, second.codes)
    assert SOLVERS["descent"].solve(problem).loss <= SOLVERS["rtn"].solve(problem).loss * (1 + 1e-9)


@every_solver
@fuzz
@given(seeds)
def test_order_of_output_channels_is_the_answers_order(solve: Solver, seed: int) -> None:
    problem = problem_of(seed)
    order = np.random.default_rng(seed).permutation(problem.weight.shape[1])
    one, other = solve(problem).rounding, solve(replace(problem, weight=problem.weight[:, order])).rounding
    np.testing.assert_array_equal(other.codes, one.codes[:, order])
    np.testing.assert_array_equal(other.multiplier, one.multiplier[:, order])


@every_solver
def test_multipliers_lower_the_loss(solve: Solver) -> None:
    """Nearest rounding never loses by them; the others decide by it, and gain in the mean."""
    problems = [replace(problem_of(seed), kernel=1, vectors=Vectors(5, 1, 7)) for seed in range(40)]
    pairs = [(solve(replace(problem, vectors=None)).loss, solve(problem).loss) for problem in problems]
    if solve is SOLVERS["rtn"].solve:
        assert all(with_them <= without * (1 + 1e-9) for without, with_them in pairs)
    gains = [10 * np.log10(without / with_them) for without, with_them in pairs]
    assert np.mean(gains) > 2  # measured: 2.7 and more


def test_a_run_far_larger_than_the_others_does_not_take_their_grid() -> None:
    """One run is 6 times as large: with multipliers 8 and 2 the other has a step that is 4 times as fine."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(-1, 1, (1, 50, 32))
    weight[..., :16] *= 6
    plain = LayerProblem(weight, np.eye(32)[None], 4, np.zeros((1, 50)))
    runs = replace(plain, vectors=Vectors(16, 1, 8))
    errors = [(SOLVERS["rtn"].solve(problem).weight - weight)[..., 16:] for problem in (plain, runs)]
    assert np.square(errors[1]).mean() < np.square(errors[0]).mean() / 12  # measured: 15.3
