"""Nearest rounding, on the grid of least error. The baseline that knows nothing of correlations."""

from __future__ import annotations

import numpy as np

from onnx_lwdf.grid import nearest, weight_grid
from onnx_lwdf.solvers.problem import LayerProblem, LayerSolution, solution


def solve(problem: LayerProblem) -> LayerSolution:
    """Every weight to its nearest code."""
    importance = np.diagonal(problem.hessian, axis1=1, axis2=2)  # [groups, in]
    grid = weight_grid(problem, importance)
    codes = nearest(problem.weight, grid, problem.pair_limit)
    return solution(problem, grid.rounding(codes, problem.vectors))
