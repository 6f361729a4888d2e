"""Second-order pruning: a mask chosen on H, and the remaining weights re-fitted on H.

With the mask given, the weights S of a row that stay have their best values in closed form,

    v_S = w_S + H_SS^-1 H_SP w_P    (P the pruned ones)

(optimal brain surgeon: Hassibi and Stork 1993; layer by layer: Frantar and Alistarh, arXiv 2208.11580). All rows are
solved at once by conjugate gradients that never leave the mask. Because v is the optimum within the mask, the loss of
any other u within it is that of v plus (v - u) H (v - u)^T: with bits, rounding the re-fitted weights on H, errors
carried by the weights that stay, minimizes the loss against the original ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnx_lwdf.solvers import descent
from onnx_lwdf.solvers.mask import damped, normalized, path, second_order, swapped
from onnx_lwdf.solvers.problem import F64, LayerProblem, LayerSolution, Mask, channel_loss, float_solution, solution

CONJUGATE_STEPS = 60
SWAPS = 2  # rounds
TOLERANCE = 1e-4  # of the residual's norm
CURVE_ITERATIONS, CURVE_STEPS = 10, 20  # of a mask and of its refit where only the loss is wanted


def solve(problem: LayerProblem) -> LayerSolution:
    """The second-order mask, the refit, and with bits the rounding within the mask."""
    if not problem.prunes:
        return float_solution(problem, problem.weight) if problem.bits is None else descent.solve(problem)
    mask, weight = prune(problem)
    if problem.bits is None:
        return float_solution(problem, weight)
    codes, grid, notes = descent.refine(replace(problem, weight=weight), mask)
    return solution(problem, grid.rounding(codes, problem.vectors), notes)


def prune(problem: LayerProblem) -> tuple[Mask, F64]:
    """The mask and the refit within it, after swaps that lower the loss."""
    mask = second_order(problem)
    weight = refit(problem, mask)
    hessian = damped(problem.hessian)
    loss = channel_loss(problem.weight, weight, hessian).sum()
    for _ in range(SWAPS):
        other = swapped(problem, mask, weight)
        if np.array_equal(other, mask):
            break
        fitted = refit(problem, other)
        reached = channel_loss(problem.weight, fitted, hessian).sum()
        if not reached < loss:
            break
        mask, weight, loss = other, fitted, reached
    return mask, weight


def refit(problem: LayerProblem, mask: Mask, steps: int = CONJUGATE_STEPS) -> F64:
    """The weights of least loss within the mask, [groups, out, in]; H is damped towards the weights as they were.

    Conjugate gradients, in units where H has a diagonal of one.
    """
    hessian, units = normalized(problem.hessian)
    unit = units[:, None, :]
    target = problem.weight * unit
    weight = np.where(mask, target, 0.0)
    residual = np.where(mask, (target - weight) @ hessian, 0.0)
    direction, power = residual, _power(residual)
    goal = TOLERANCE**2 * float(power.sum())
    for _ in range(steps):
        if float(power.sum()) <= goal:
            break
        image = np.where(mask, direction @ hessian, 0.0)
        curvature = (direction * image).sum(-1, keepdims=True)
        step = power / np.where(curvature > 0, curvature, np.inf)
        weight = weight + step * direction
        residual = residual - step * image
        before, power = power, _power(residual)
        direction = residual + power / np.where(before > 0, before, np.inf) * direction
    return np.asarray(weight / unit)


def losses(problem: LayerProblem, sparsities: Sequence[float]) -> list[float]:
    """The loss in float at every sparsity, rising, by fewer steps than `solve` takes."""
    weights = [refit(problem, mask, CURVE_STEPS) for mask in path(problem, sparsities, CURVE_ITERATIONS)]
    return [float(channel_loss(problem.weight, weight, problem.hessian).sum()) for weight in weights]


def _power(residual: F64) -> F64:
    return np.asarray((residual * residual).sum(-1, keepdims=True))
