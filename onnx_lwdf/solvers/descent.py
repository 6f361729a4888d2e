"""Coordinate descent on the quadratic loss, from the second-order rounding on.

With G = (W - V) H, the best value of one column with all others fixed is, in closed form,

    V[:, j] + G[:, j] / H[j, j]

rounded to the grid (the loss is a parabola in that column). Sweeps over the columns go on until no code changes; then
the scale is fitted, s = (w H v) / (v H v) in units of codes, where that lowers the loss, and the sweeps start again.
The loss never rises. (COMQ, arXiv 2403.07134, descends in the same way from nearest rounding.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnx_lwdf.grid import WeightGrid, storable
from onnx_lwdf.solvers import gptq
from onnx_lwdf.solvers.problem import F64, LayerProblem, LayerSolution, Mask, solution

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
    open_rows = np.ones(codes.shape[:2], bool)
    for _ in range(FITS):
        codes, open_rows = descend(problem, codes, grid, mask, open_rows)
        scale = _fitted(problem, grid.multiplied(codes), grid.scale)
        open_rows = open_rows | (scale != grid.scale)
        grid = replace(grid, scale=scale)
    return descend(problem, codes, grid, mask, open_rows)[0], grid, notes


def descend(
    problem: LayerProblem, codes: F64, grid: WeightGrid, mask: Mask | None = None, open_rows: Mask | None = None
) -> tuple[F64, Mask]:
    """Sweeps over all columns, within the mask, until nothing changes: codes [groups, out, in], and the rows that still did.

    open_rows [groups, out]: those that may change at all, None: each. Rows do not know of each other, and one that a whole
    sweep left as it was is done.
    """
    codes = codes.copy()
    moved = np.ones(codes.shape[:2], bool) if open_rows is None else open_rows
    axis = 0 if codes.shape[1] == 1 else 1  # a depthwise layer has one row a group, most others have one group
    for _ in range(SWEEPS):
        rows = np.flatnonzero(moved.any(1 - axis))
        if not rows.size:
            break
        place = np.s_[rows] if axis == 0 else np.s_[:, rows]
        some, moved = codes[place], np.zeros_like(moved)
        moved[place] = _sweep(problem.of(rows, axis), some, grid.of(rows, axis), None if mask is None else mask[place])
        codes[place] = some
    return codes, moved


def _sweep(problem: LayerProblem, codes: F64, grid: WeightGrid, mask: Mask | None) -> Mask:
    """One pass over all columns, in place; which rows changed, [groups, out]."""
    steps = np.broadcast_to(grid.step, codes.shape)
    residual = problem.weight - steps * codes
    moved = np.zeros(codes.shape[:2], bool)
    for start in range(0, codes.shape[2], BLOCK):
        columns = slice(start, start + BLOCK)
        inner = problem.hessian[:, columns, columns]
        curvature = np.einsum("gii->gi", inner)[:, None]
        free = curvature > 0 if mask is None else (curvature > 0) & mask[:, :, columns]
        # What may not move is infinitely stiff.
        stiffness = np.where(free, curvature * steps[:, :, columns], np.inf)
        gradient = residual @ problem.hessian[:, :, columns]  # [groups, out, block]
        low, high = (np.repeat(bound[..., None], gradient.shape[2], -1) for bound in (grid.low, grid.high))
        before = codes[:, :, columns]
        alone = _moved(before, gradient / stiffness, low, high, _partners(before), problem.pair_limit)
        # Only a move changes what the other columns of a row would do: without a first one there is none.
        group, row = np.nonzero((alone != before).any(-1))
        if group.size:
            block = _Block(
                gradient[group, row], stiffness[group, row].T, steps[group, row, columns].T, inner, group,
                grid.low[group, row], grid.high[group, row], problem.pair_limit,
            )  # fmt: skip
            codes[group, row, columns] = _pass(before[group, row].T, block).T
            residual[:, :, columns] = problem.weight[:, :, columns] - steps[:, :, columns] * before
            moved[group, row] = True
    return moved


@dataclass(frozen=True, slots=True)
class _Block:
    """Neighbouring columns of some rows."""

    gradient: F64  # [rows, block]
    stiffness: F64  # [block, rows], of a code: the gradient that one step of it makes
    steps: F64  # [block, rows], the weight that one step of a code is
    inner: F64  # [groups, block, block], of H
    group: npt.NDArray[np.int64]  # [rows]
    low: F64  # [rows], as is `high`
    high: F64
    limit: int | None


def _pass(codes: F64, block: _Block) -> F64:
    """The codes [block, rows] after one pass over the columns; the gradient is consumed."""
    codes, gradient = np.ascontiguousarray(codes), block.gradient
    none = np.zeros(codes.shape[1])
    for j in range(len(codes)):
        partner = codes[j ^ 1] if j ^ 1 < len(codes) else none
        step = gradient[:, j] / block.stiffness[j]
        new = _moved(codes[j], step, block.low, block.high, partner, block.limit)
        moves = np.flatnonzero(new != codes[j])  # few, after the first sweep; columns before this one have been visited
        if moves.size:
            change = (new - codes[j])[moves] * block.steps[j, moves]
            gradient[moves, j + 1 :] -= change[:, None] * block.inner[block.group[moves], j, j + 1 :]
            codes[j] = new
    return codes


def _moved(old: F64, step: F64, low: F64, high: F64, partner: F64, limit: int | None) -> F64:
    """The codes nearest to the minima of their parabolas, `step` away, where that is a gain; arrays of one shape."""
    # Of few values np.clip takes ten times as long as these two, and they so of values that are broadcast.
    new = np.minimum(np.maximum(np.rint(old + step), low), high)
    if limit is not None:
        new = np.minimum(np.maximum(new, -limit - partner), limit - partner)
    move = new - old
    return np.where(move * (2 * step - move) > 1e-9, new, old)  # a tie is no reason to move


def _partners(codes: F64) -> F64:
    """[..., in]: the other code of every pair, 0 where there is none."""
    swapped = np.zeros(codes.shape)
    even = codes.shape[-1] // 2 * 2
    swapped[..., 0:even:2], swapped[..., 1:even:2] = codes[..., 1:even:2], codes[..., 0:even:2]
    return swapped


def _fitted(problem: LayerProblem, codes: F64, scale: F64) -> F64:
    """The scale of least loss for these codes, per output channel, where it is better."""
    product = codes @ problem.hessian  # [groups, out, in]
    numerator = problem.over_blocks(np.einsum("goi,goi->go", product, problem.weight))
    denominator = problem.over_blocks(np.einsum("goi,goi->go", product, codes))
    usable: npt.NDArray[np.bool_] = (denominator > 0) & (numerator > 0)
    fitted = storable(np.where(usable, numerator / np.where(usable, denominator, 1), scale), problem.scale_floor)
    # By how much the loss s^2 v H v - 2 s w H v differs, without the difference of two large numbers.
    change = (fitted - scale) * ((fitted + scale) * denominator - 2 * numerator)
    return np.where(change < 0, fitted, scale)
