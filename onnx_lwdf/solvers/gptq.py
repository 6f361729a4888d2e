"""Second-order rounding: each column's rounding error is carried by the columns that are still free.

With U the upper Cholesky factor of H^-1 (H^-1 = U^T U), column j's error moves the later columns by

    W[:, k] -= (W[:, j] - V[:, j]) / U[j, j] * U[j, k],    k > j

which is the exact minimizer of the loss over the free columns (OBQ: Frantar and Alistarh, arXiv 2208.11580; GPTQ:
Frantar et al., arXiv 2210.17323). Columns go in the order of falling H[j, j]. The pair limit stands inside: the second
code of a pair is clamped to what the first one leaves, and later columns carry that error too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lwdf.grid import WeightGrid, nearest, weight_grid
from onnx_lwdf.solvers.problem import F64, LayerProblem, LayerSolution, Mask, channel_loss, solution

DAMPING = 0.01  # of the mean of H's diagonal, as in GPTQ
MOST_DAMPING = 100.0
BLOCK = 64  # columns between two updates of all the later ones: small products within, one large one behind


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Partner of each position in the order of columns; -1 where it has none, or where the partner comes later."""

    earlier: npt.NDArray[np.int64]  # [groups, in]
    limit: int


def solve(problem: LayerProblem) -> LayerSolution:
    """Second-order rounding on the grid of least weighted error; no channel is worse than by nearest rounding."""
    codes, grid, notes = start(problem)
    return solution(problem, grid.rounding(codes, problem.vectors), notes)


def start(problem: LayerProblem, mask: Mask | None = None) -> tuple[F64, WeightGrid, tuple[str, ...]]:
    """Codes [groups, out, in], their grid and notes of `solve`; codes outside the mask are 0."""
    importance = np.diagonal(problem.hessian, axis1=1, axis2=2)  # [groups, in]
    grid = weight_grid(problem, importance)
    plain = nearest(problem.weight, grid, problem.pair_limit)
    codes, note = round_columns(problem, grid, mask)
    if codes is None:
        return plain, grid, (note,)
    losses = [channel_loss(problem.weight, grid.step * c, problem.hessian) for c in (codes, plain)]
    chosen = np.where((losses[0] <= losses[1])[..., None], codes, plain)
    return chosen, grid, (note,) if note else ()


def round_columns(problem: LayerProblem, grid: WeightGrid, mask: Mask | None = None) -> tuple[F64 | None, str]:
    """The codes [groups, out, in] and a note on damping; None where H cannot be factored at any damping."""
    order = np.argsort(-np.diagonal(problem.hessian, axis1=1, axis2=2), axis=1, kind="stable")  # [groups, in]
    weight = np.take_along_axis(problem.weight, order[:, None, :], 2)
    hessian = _permuted(problem.hessian, order)
    damping = DAMPING
    while (factor := _inverse_factor(hessian, damping)) is None:
        damping *= 10
        if damping > MOST_DAMPING:
            return None, "H could not be factored; nearest rounding"
    allowed = None if mask is None else np.take_along_axis(mask, order[:, None, :], 2)
    step = np.broadcast_to(grid.step, weight.shape)
    if grid.multiplier is not None:
        step = np.take_along_axis(step, order[:, None, :], 2)
    codes = _sweep(weight, factor, grid, step, _pairs(problem, order), allowed)
    note = "" if damping == DAMPING else f"damping {damping:g}"
    return np.take_along_axis(codes, np.argsort(order, axis=1)[:, None, :], 2), note


def _permuted(hessian: F64, order: npt.NDArray[np.int64]) -> F64:
    return np.take_along_axis(np.take_along_axis(hessian, order[:, :, None], 1), order[:, None, :], 2)


def _inverse_factor(hessian: F64, damping: float) -> F64 | None:
    """U with (H + damping)^-1 = U^T U, [groups, in, in]; dead inputs get a diagonal of 1, which decouples them."""
    damped = hessian.copy()
    diagonal = np.einsum("gii->gi", damped)  # a view
    dead = diagonal <= 0
    diagonal += damping * np.mean(diagonal, axis=1, keepdims=True)
    diagonal[dead] = 1.0
    try:
        factor = np.linalg.cholesky(np.linalg.inv(damped)).swapaxes(1, 2)
    except np.linalg.LinAlgError:
        return None
    return factor if np.isfinite(factor).all() else None


def conditional_variances(hessian: F64) -> F64:
    """1 / U[j, j]^2 of every input, [groups, in]: what a rounding error costs once the later columns carried it.

    The diagonal of H is what it costs by nearest rounding; here in the order of columns, so only fit for sums.
    """
    order = np.argsort(-np.einsum("gii->gi", hessian), axis=1, kind="stable")
    factor = _inverse_factor(_permuted(hessian, order), DAMPING)
    if factor is None:
        return np.asarray(np.einsum("gii->gi", hessian))
    return np.asarray(np.take_along_axis(1 / np.einsum("gii->gi", factor) ** 2, np.argsort(order, axis=1), 1))


def _pairs(problem: LayerProblem, order: npt.NDArray[np.int64]) -> _Pairs | None:
    if problem.pair_limit is None:
        return None
    place = np.argsort(order, axis=1)
    partner = order ^ 1  # 2k <-> 2k + 1
    exists = partner < order.shape[1]
    earlier = np.take_along_axis(place, np.where(exists, partner, 0), 1)
    return _Pairs(np.where(exists & (earlier < np.arange(order.shape[1])), earlier, -1), problem.pair_limit)


def _sweep(weight: F64, factor: F64, grid: WeightGrid, step: F64, pairs: _Pairs | None, mask: Mask | None) -> F64:
    """Codes in the order of columns, as are the steps [groups, out, in] of the grid; `weight` is consumed."""
    low, high = grid.low, grid.high
    columns = weight.shape[2]
    codes = np.zeros(weight.shape)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = np.empty((*weight.shape[:2], stop - start))
        for j in range(start, stop):
            code = np.clip(np.rint(weight[:, :, j] / step[:, :, j]), low, high)
            if pairs is not None:
                code = _clamped(code, codes, pairs, j)
            if mask is not None:
                code = np.where(mask[:, :, j], code, 0.0)
            codes[:, :, j] = code
            error = (weight[:, :, j] - code * step[:, :, j]) / factor[:, j, j][:, None]  # [groups, out]
            weight[:, :, j + 1 : stop] -= error[:, :, None] * factor[:, None, j, j + 1 : stop]
            errors[:, :, j - start] = error
        weight[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    return codes


def _clamped(code: F64, codes: F64, pairs: _Pairs, column: int) -> F64:
    """The code within what its already coded partner leaves."""
    earlier = pairs.earlier[:, column]  # [groups]
    partner = np.take_along_axis(codes, np.maximum(earlier, 0)[:, None, None], 2)[:, :, 0]
    clamped = np.clip(code, -pairs.limit - partner, pairs.limit - partner)
    return np.where((earlier >= 0)[:, None], clamped, code)
