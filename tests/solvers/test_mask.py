"""Counts, N:M, and how close the second-order mask comes to the best of all masks."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lwdf.solvers.mask import kept, largest, second_order
from onnx_lwdf.solvers.obs import prune
from onnx_lwdf.solvers.problem import LayerProblem

from . import random_problem

fuzz = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


def best_loss(problem: LayerProblem, mask: np.ndarray) -> float:
    """The least loss within a mask, row by row, by the normal equations."""
    total = 0.0
    for g, o in np.ndindex(*mask.shape[:2]):
        h, w = problem.hessian[g], problem.weight[g, o]
        stay, gone = np.flatnonzero(mask[g, o]), np.flatnonzero(~mask[g, o])
        # The Schur complement: what H leaves of the pruned weights once the others are re-fitted.
        schur = (
            h[np.ix_(gone, gone)]
            - h[np.ix_(gone, stay)] @ np.linalg.pinv(h[np.ix_(stay, stay)]) @ h[np.ix_(stay, gone)]
        )
        total += float(w[gone] @ schur @ w[gone])
    return total


@fuzz
@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=60), st.floats(0, 0.999))
def test_the_count_is_exact_and_nothing_that_stays_is_below_what_goes(values: list[float], sparsity: float) -> None:
    score = np.array(values)[None, None]
    mask = largest(score, sparsity, None)
    assert (~mask).sum() == round(sparsity * score.size)
    assert mask.sum() == kept(score.size, sparsity)
    assert score[mask].min(initial=np.inf) >= score[~mask].max(initial=-np.inf)


@fuzz
@given(seeds, st.integers(2, 8), st.integers(1, 5), st.integers(1, 3), st.data())
def test_n_of_every_m_stay(seed: int, of: int, blocks: int, groups: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, of - 1))
    score = np.random.default_rng(seed).integers(0, 4, (groups, 3, blocks * of)).astype(float)  # with ties
    counts = largest(score, 0.0, (keep, of)).reshape(groups, 3, blocks, of).sum(-1)
    assert np.all(counts == keep)


@fuzz
@given(seeds, st.sampled_from([0.25, 0.5, 0.75]))
def test_uncorrelated_inputs_of_equal_size_give_the_mask_of_magnitude(seed: int, sparsity: float) -> None:
    problem = replace(random_problem(seed, groups=2), sparsity=sparsity)
    problem = replace(problem, hessian=np.tile(np.eye(problem.weight.shape[2]), (2, 1, 1)))
    np.testing.assert_array_equal(prune(problem)[0], largest(np.abs(problem.weight), sparsity, None))


@fuzz
@given(seeds)
def test_permuted_output_channels_permute_the_mask(seed: int) -> None:
    problem = replace(random_problem(seed, out=5), sparsity=0.5)
    order = np.random.default_rng(seed).permutation(5)
    moved = second_order(replace(problem, weight=problem.weight[:, order]))
    assert (moved != second_order(problem)[:, order]).mean() <= 0.05  # float32 sums in another order


def test_the_mask_is_close_to_the_best_of_all_masks() -> None:
    reached, least, naive = 0.0, 0.0, 0.0
    for seed in range(30):
        problem = replace(random_problem(seed, out=2, channels=5), sparsity=0.5)
        reached += best_loss(problem, prune(problem)[0])
        naive += best_loss(problem, largest(np.abs(problem.weight), 0.5, None))
        every = []
        for places in combinations(range(10), 5):
            mask = np.zeros(10, bool)
            mask[list(places)] = True
            every.append(best_loss(problem, mask.reshape(1, 2, 5)))
        least += min(every)
    assert least <= reached < 1.25 * least
    assert reached < 0.5 * naive


@pytest.mark.parametrize("nm", [None, (2, 4)])
def test_dead_inputs_go_first(nm: tuple[int, int] | None) -> None:
    problem = replace(random_problem(1), sparsity=0.5, nm=nm)
    dead = [0, 1, 4, 5]
    hessian = np.eye(8)[None].copy()
    hessian[:, dead] = 0
    mask = second_order(replace(problem, hessian=hessian))
    assert not mask[..., dead].any()
