"""Nearest rounding, on the grid of least error. The baseline that knows nothing of correlations."""

from __future__ import annotations

import numpy as np

from onnx_lwdf.grid import nearest, search_weight_grid
from onnx_lwdf.solvers.problem import LayerProblem, LayerSolution, solution


def solve(problem: LayerProblem) -> LayerSolution:
    """Every weight to its nearest code."""
    importance = np.diagonal(problem.hessian, axis1=1, axis2=2)  # [groups, in]
    grid = search_weight_grid(problem.weight, importance, problem.rounded_bits, problem.pair_limit, problem.scale_floor)
    return solution(problem, nearest(problem.weight, grid, problem.pair_limit), grid.scale)
