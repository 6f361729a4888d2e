"""Coordinate descent on the quadratic loss, from the second-order rounding on.

With G = (W - V) H, the best value of one column with all others fixed is, in closed form,

    V[:, j] + G[:, j] / H[j, j]

rounded to the grid (the loss is a parabola in that column). Sweeps over the columns go on until no code changes; then
the scale is fitted, s = (w H v) / (v H v) in units of codes, where that lowers the loss, and the sweeps start again.
The loss never rises. (COMQ, arXiv 2403.07134, descends in the same way from nearest rounding.)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from onnx_lwdf.grid import WeightGrid, storable
from onnx_lwdf.solvers import gptq
from onnx_lwdf.solvers.problem import F64, LayerProblem, LayerSolution, Mask, channel_loss, solution

SWEEPS = 4  # between two fits of the scale
FITS = 3
BLOCK = 64


def solve(problem: LayerProblem) -> LayerSolution:
    """Second-order rounding, then coordinate descent and fits of the scale in turn."""
    codes, grid, notes = refine(problem, None)
    return solution(problem, grid.rounding(codes, problem.vectors), notes)


def refine(problem: LayerProblem, mask: Mask | None) -> tuple[F64, WeightGrid, tuple[str, ...]]:
    """Codes [groups, out, in], their grid and notes of `solve`; codes outside the mask are 0."""
    codes, grid, notes = gptq.start(problem, mask)
    for _ in range(FITS):
        codes = descend(problem, codes, grid, mask)
        grid = replace(grid, scale=_fitted(problem, grid.multiplied(codes), grid.scale))
    return descend(problem, codes, grid, mask), grid, notes


def descend(problem: LayerProblem, codes: F64, grid: WeightGrid, mask: Mask | None = None) -> F64:
    """Sweeps over all columns, within the mask, until nothing changes, [groups, out, in]."""
    codes = codes.copy()
    for _ in range(SWEEPS):
        changed = [
            _block(problem, codes, grid, mask, slice(start, start + BLOCK)) for start in range(0, codes.shape[2], BLOCK)
        ]
        if not any(changed):
            break
    return codes


def _block(problem: LayerProblem, codes: F64, grid: WeightGrid, mask: Mask | None, block: slice) -> bool:
    """One pass over a block of columns, in place; whether a code changed."""
    low, high, steps = grid.low, grid.high, np.broadcast_to(grid.step, codes.shape)
    gradient = (problem.weight - steps * codes) @ problem.hessian[:, :, block]  # [groups, out, block]
    inner = problem.hessian[:, block, block]
    curvature = np.einsum("gii->gi", inner)
    changed = False
    for j in range(gradient.shape[2]):
        column = block.start + j
        old, scale = codes[:, :, column], steps[:, :, column]
        step = gradient[:, :, j] / (np.maximum(curvature[:, j], np.finfo(np.float64).tiny)[:, None] * scale)
        new = np.clip(np.rint(old + step), low, high)
        new = _within_pair(problem, codes, column, new)
        new = np.where((curvature[:, j] > 0)[:, None] & (_gain(new - old, step) > 0), new, old)
        if mask is not None:
            new = np.where(mask[:, :, column], new, old)
        move = new - old
        if move.any():
            changed = True
            codes[:, :, column] = new
            group, row = np.nonzero(move)  # few, after the first sweep; columns before this one have been visited
            gradient[group, row, j + 1 :] -= (move * scale)[group, row, None] * inner[group, j, j + 1 :]
    return changed


def _gain(move: F64, step: F64) -> F64:
    """How much a move lowers the parabola whose minimum is `step` away, in units of its curvature."""
    return np.asarray(move * (2 * step - move)) - 1e-9  # a tie is no reason to move


def _within_pair(problem: LayerProblem, codes: F64, column: int, new: F64) -> F64:
    partner = column ^ 1
    if problem.pair_limit is None or partner >= codes.shape[2]:
        return new
    other = codes[:, :, partner]
    return np.clip(new, -problem.pair_limit - other, problem.pair_limit - other)


def _fitted(problem: LayerProblem, codes: F64, scale: F64) -> F64:
    """The scale of least loss for these codes, per output channel, where it is better."""
    product = codes @ problem.hessian  # [groups, out, in]
    numerator = problem.over_blocks(np.einsum("goi,goi->go", product, problem.weight))
    denominator = problem.over_blocks(np.einsum("goi,goi->go", product, codes))
    usable: npt.NDArray[np.bool_] = (denominator > 0) & (numerator > 0)
    fitted = storable(np.where(usable, numerator / np.where(usable, denominator, 1), scale), problem.scale_floor)
    losses = [
        problem.over_blocks(channel_loss(problem.weight, s[..., None] * codes, problem.hessian))
        for s in (fitted, scale)
    ]
    return np.where(losses[0] < losses[1], fitted, scale)
