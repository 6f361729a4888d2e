from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lwdf.grid import WeightGrid
from onnx_lwdf.solvers import descent, gptq, rtn

from . import loss_by_definition, random_problem, signed_range

fuzz = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


@fuzz
@given(seeds, st.integers(2, 8), st.booleans())
def test_the_loss_never_rises(seed: int, bits: int, limited: bool) -> None:
    limit = signed_range(bits)[1] + 1 if limited else None
    problem = random_problem(seed, groups=2, channels=9, bits=bits, pair_limit=limit)
    for start in (gptq.solve(problem), rtn.solve(problem)):
        codes = start.rounding.codes.astype(np.float64)
        grid = WeightGrid(start.rounding.scale, codes.min(-1, initial=0), bits)
        codes, _ = descent.descend(problem, codes, grid)
        before, after = (
            loss_by_definition(problem.weight, start.rounding.scale[..., None] * c, problem.hessian)
            for c in (start.rounding.codes, codes)
        )
        assert np.all(after <= before * (1 + 1e-9))
    assert descent.solve(problem).loss <= gptq.solve(problem).loss * (1 + 1e-9)


@fuzz
@given(seeds, st.sampled_from([None, 4]))
def test_no_change_of_one_code_lowers_the_loss(seed: int, limit: int | None) -> None:
    problem = random_problem(seed, out=3, channels=5, bits=3, pair_limit=limit)
    answer = descent.solve(problem)
    reached = loss_by_definition(problem.weight, answer.weight, problem.hessian)
    for column in range(5):
        for code in range(-7, 8):
            codes = answer.rounding.codes.astype(np.float64)
            inside = (codes.min(-1, initial=0) <= code) & (code <= codes.max(-1, initial=0))  # on the grid for sure
            codes[..., column] = code
            partner = column ^ 1
            allowed = limit is None or partner > 4 or np.abs(codes[..., column] + codes[..., partner]) <= limit
            changed = loss_by_definition(problem.weight, answer.rounding.scale[..., None] * codes, problem.hessian)
            assert np.all((changed >= reached * (1 - 1e-6)) | ~(inside & allowed))


@fuzz
@given(seeds)
def test_the_scale_is_a_minimum_for_its_codes(seed: int) -> None:
    problem = random_problem(seed, bits=3)
    codes = gptq.solve(problem).rounding.codes.astype(np.float64)
    start = np.full((1, 4), 0.3)
    fitted = descent._fitted(problem, codes, start)
    losses = [
        loss_by_definition(problem.weight, (fitted * share)[..., None] * codes, problem.hessian)
        for share in (1, 0.999, 1.001)
    ]
    assert np.all(losses[0] <= np.minimum(losses[1], losses[2]))


def test_a_fitted_scale_keeps_its_floor() -> None:
    problem = random_problem(0, bits=3)
    floor = gptq.solve(problem).rounding.scale * 1.3
    problem = replace(problem, scale_floor=floor)
    answer = descent.solve(problem)
    assert np.all(answer.rounding.scale >= floor)
    assert answer.loss <= gptq.solve(problem).loss


def test_blocks_do_not_show() -> None:
    """More columns than a block: the gradient of each block counts the moves in the blocks before it."""
    problem = random_problem(8, out=2, channels=descent.BLOCK + 20, bits=3)
    answer = descent.solve(problem)
    rng = np.random.default_rng(0)
    for column in rng.choice(descent.BLOCK + 20, 20, replace=False):
        for step in (-1, 1):
            codes = answer.rounding.codes.astype(np.float64)
            low, high = codes.min(-1, initial=0), codes.max(-1, initial=0)
            codes[..., column] = np.clip(codes[..., column] + step, low, high)
            changed = loss_by_definition(problem.weight, answer.rounding.scale[..., None] * codes, problem.hessian)
            assert np.all(changed >= loss_by_definition(problem.weight, answer.weight, problem.hessian) * (1 - 1e-6))
