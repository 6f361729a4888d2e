"""The refit against the normal equations, and rounding within the mask."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lwdf.grid import WeightGrid, nearest
from onnx_lwdf.solvers import SOLVERS, Solver, descent, magnitude, obs
from onnx_lwdf.solvers.mask import largest, second_order

from . import loss_by_definition, pair_sums, random_problem

fuzz = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
pruning = pytest.mark.parametrize("solve", [m.solve for m in SOLVERS.values() if m.prunes])


@fuzz
@given(seeds, st.sampled_from([0.25, 0.5, 0.8]))
def test_the_refit_solves_the_normal_equations_on_the_support(seed: int, sparsity: float) -> None:
    problem = random_problem(seed, groups=2, out=3)
    mask = largest(np.abs(problem.weight), sparsity, None)
    answer = obs.refit(problem, mask)
    for g, o in np.ndindex(2, 3):
        stay = mask[g, o]
        h = problem.hessian[g] + 0.01 * np.diag(problem.hessian[g]).mean() * np.eye(stay.size)
        expected = np.zeros(stay.size)
        expected[stay] = np.linalg.solve(h[np.ix_(stay, stay)], h[stay] @ problem.weight[g, o])
        np.testing.assert_allclose(answer[g, o], expected, atol=2e-3 * np.abs(problem.weight[g, o]).max())


@pruning
@fuzz
@given(seeds, st.floats(0.05, 0.95), st.sampled_from([None, 4, 8]))
def test_exact_zeros_in_float_and_no_fewer_with_bits(solve: Solver, seed: int, sparsity: float, bits: int) -> None:
    problem = replace(random_problem(seed, groups=2), bits=bits, sparsity=sparsity)
    zeros = int((solve(problem).weight == 0).sum())
    wanted = round(sparsity * problem.weight.size)
    assert zeros == wanted if bits is None else zeros >= wanted


@pruning
@fuzz
@given(seeds, st.sampled_from([None, 3, 8]), st.sampled_from([(1, 2), (2, 4), (3, 4)]))
def test_no_more_than_n_of_every_m_stay(solve: Solver, seed: int, bits: int | None, nm: tuple[int, int]) -> None:
    problem = replace(random_problem(seed, groups=2, kernel=3), bits=bits, nm=nm)
    weight = solve(problem).weight
    counts = (weight.reshape(2, 4, -1, nm[1]) != 0).sum(-1)
    assert counts.max() <= nm[0]
    assert bits is not None or np.all(counts == nm[0])


@pruning
@fuzz
@given(seeds, st.sampled_from([None, 4]))
def test_the_reported_loss_is_its_definition(solve: Solver, seed: int, bits: int | None) -> None:
    problem = replace(random_problem(seed, groups=2), bits=bits, sparsity=0.5)
    answer = solve(problem)
    expected = loss_by_definition(problem.weight, answer.weight, problem.hessian).sum()
    np.testing.assert_allclose(answer.loss, expected, rtol=1e-9)


@fuzz
@given(seeds, st.sampled_from([3, 8]))
def test_without_sparsity_it_is_the_plain_solver(seed: int, bits: int) -> None:
    problem = random_problem(seed, bits=bits)
    np.testing.assert_array_equal(obs.solve(problem).weight, descent.solve(problem).weight)
    np.testing.assert_array_equal(obs.solve(replace(problem, bits=None)).weight, problem.weight)
    np.testing.assert_array_equal(magnitude.solve(problem).weight, SOLVERS["rtn"].solve(problem).weight)


def test_second_order_beats_magnitude_and_the_refit_beats_none() -> None:
    ours, bare, plain = 0.0, 0.0, 0.0
    for seed in range(20):
        problem = replace(random_problem(seed, out=8, channels=16), bits=None, sparsity=0.5)
        ours += obs.solve(problem).loss
        plain += magnitude.solve(problem).loss
        kept = np.where(second_order(problem), problem.weight, 0.0)
        bare += float(loss_by_definition(problem.weight, kept, problem.hessian).sum())
    assert ours < 0.2 * plain
    assert ours < 0.5 * bare


def test_rounding_within_the_mask_beats_rounding_the_refit() -> None:
    joint, separate = 0.0, 0.0
    for seed in range(20):
        problem = replace(random_problem(seed, out=8, channels=16), bits=4, sparsity=0.5)
        answer = obs.solve(problem)
        joint += answer.loss
        pruned = obs.solve(replace(problem, bits=None)).weight
        assert answer.rounding is not None
        codes = answer.rounding.codes.astype(np.float64)
        grid = WeightGrid(answer.rounding.scale, codes.min(-1, initial=0), 4)
        rounded = nearest(pruned, grid) * grid.scale[..., None]
        separate += float(loss_by_definition(problem.weight, rounded, problem.hessian).sum())
    assert joint < 0.96 * separate  # measured: 0.93


@fuzz
@given(seeds)
def test_pairs_keep_their_limit(seed: int) -> None:
    problem = replace(random_problem(seed, bits=4, pair_limit=8), sparsity=0.4)
    problem = replace(problem, weight=np.abs(problem.weight) + 1.0)
    answer = obs.solve(problem)
    assert answer.rounding is not None
    assert pair_sums(answer.rounding.codes).max() <= 8


@pytest.mark.parametrize("method", ["obs", "magnitude"])
def test_the_curve_rises_and_agrees_with_the_answer(method: str) -> None:
    problem = replace(random_problem(4, out=16, channels=16), bits=None)
    losses = SOLVERS[method].losses
    assert losses is not None
    shares = (0.2, 0.4, 0.6, 0.8)
    curve = losses(problem, shares)
    exact = [SOLVERS[method].solve(replace(problem, sparsity=share)).loss for share in shares]
    assert curve == sorted(curve)
    ratio = np.array(curve) / exact
    assert np.all((ratio > 0.8) & (ratio < 1.4))


@pytest.mark.parametrize("bits", [None, 4])
def test_all_inputs_dead_prunes_by_magnitude(bits: int | None) -> None:
    problem = replace(random_problem(0), bits=bits, sparsity=0.5)
    answer = obs.solve(replace(problem, hessian=np.zeros_like(problem.hessian)))
    assert answer.loss == 0
    np.testing.assert_array_equal(answer.weight != 0, largest(np.abs(problem.weight), 0.5, None) & (answer.weight != 0))
    assert np.isfinite(answer.weight).all()
