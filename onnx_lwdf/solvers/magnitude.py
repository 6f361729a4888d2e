"""The smallest weights of the layer go, the others stay as they are. The baseline that knows nothing of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnx_lwdf.grid import nearest, weight_grid
from onnx_lwdf.solvers.mask import largest
from onnx_lwdf.solvers.problem import F64, LayerProblem, LayerSolution, channel_loss, float_solution, solution


def solve(problem: LayerProblem) -> LayerSolution:
    """The largest weights, each to its nearest code where there are bits."""
    mask = largest(np.abs(problem.weight), problem.sparsity, problem.nm)
    weight = np.where(mask, problem.weight, 0.0)
    if problem.bits is None:
        return float_solution(problem, weight)
    importance = np.diagonal(problem.hessian, axis1=1, axis2=2)
    grid = weight_grid(replace(problem, weight=weight), importance)
    codes = nearest(weight, grid, problem.pair_limit)
    return solution(problem, grid.rounding(codes, problem.vectors))


def losses(problem: LayerProblem, sparsities: Sequence[float]) -> list[float]:
    """The loss in float at every sparsity."""
    weights: list[F64] = [
        np.where(largest(np.abs(problem.weight), sparsity, None), problem.weight, 0.0) for sparsity in sparsities
    ]
    return [float(channel_loss(problem.weight, weight, problem.hessian).sum()) for weight in weights]
