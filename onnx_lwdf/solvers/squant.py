"""Flips of roundings that cancel the error sums: data-free, without any Hessian.

SQuant (Guo et al., ICLR 2022) approximates E[x x^T] by a diagonal, a constant within each kernel and a constant within
each output channel. The constants punish the *sum* of the rounding errors, so starting from nearest rounding, the
elements with the largest errors are rounded the other way until, in units of codes,

    |sum of errors of a kernel| <= 1/2    and then    |sum of errors of an output channel| <= 1/2.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnx_lwdf.grid import WeightGrid, nearest, weight_grid
from onnx_lwdf.solvers.problem import F64, LayerProblem, LayerSolution, solution


def solve(problem: LayerProblem) -> LayerSolution:
    """Nearest rounding, then flips by kernel (where it has more than one position) and by output channel."""
    flat = np.ones((problem.weight.shape[0], problem.weight.shape[2]))  # no data: every input counts the same
    grid = weight_grid(problem, flat)
    exact = problem.weight / grid.scale[..., None]
    codes = nearest(problem.weight, grid, problem.pair_limit)
    by_kernel = (*exact.shape[:2], problem.kernel, -1)  # [groups, out, kernel, channels]
    if problem.kernel > 1:
        error = (codes - exact).reshape(by_kernel).swapaxes(2, 3)  # [groups, out, channels, kernel]
        open_ = _flippable(problem, grid, exact, codes).reshape(by_kernel).swapaxes(2, 3)
        flips = _flips(error, open_).swapaxes(2, 3).reshape(exact.shape)
        codes = codes - flips
    codes = codes - _channel_flips(problem, grid, exact, codes)
    return solution(problem, grid.rounding(codes, problem.vectors))


def _channel_flips(problem: LayerProblem, grid: WeightGrid, exact: F64, codes: F64) -> F64:
    """At most one flip per kernel, of its element with the largest error of the sum's sign.

    Kernels whose own sum has that sign come first: their sums stay within 1. An element that the kernel stage flipped
    may be flipped back; without that a channel can be stuck.
    """
    error = codes - exact
    sign = np.sign(error.sum(-1, keepdims=True))
    able = _flippable(problem, grid, exact, codes)
    if problem.kernel == 1:
        return _flips(error, able)
    gain = np.where(able & (error * sign > 0), error * sign, -1.0)
    gain = gain.reshape(*exact.shape[:2], problem.kernel, -1)  # [groups, out, kernel, channels]
    place = gain.argmax(2)[:, :, None, :]
    best = np.take_along_axis(gain, place, 2)[:, :, 0]  # [groups, out, channels]
    leans = error.reshape(gain.shape).sum(2) * sign > 0
    total = np.rint(np.abs(error.sum(-1)))
    chosen = (_rank(best + 2 * leans * (best > 0)) < total[..., None]) & (best > 0)
    flips = np.zeros(gain.shape)
    np.put_along_axis(flips, place, chosen[:, :, None, :] * sign[..., None], 2)
    return flips.reshape(exact.shape)


def _flips(error: F64, able: npt.NDArray[np.bool_]) -> F64:
    """What to subtract so that the sums over the last axis come below 1/2: the largest errors first."""
    total = error.sum(-1, keepdims=True)
    sign = np.sign(total)
    gain = np.where(able & (error * sign > 0), error * sign, -1.0)
    return np.where((_rank(gain) < np.rint(np.abs(total))) & (gain > 0), sign, 0.0)


def _rank(values: F64) -> npt.NDArray[np.int64]:
    """The place of each value along the last axis, the largest first, ties in order."""
    order = np.argsort(-values, axis=-1, kind="stable")
    rank = np.empty(values.shape, np.int64)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(values.shape[-1]), values.shape), -1)
    return rank


def _flippable(problem: LayerProblem, grid: WeightGrid, exact: F64, codes: F64) -> npt.NDArray[np.bool_]:
    """Whether an element may move one code towards the other neighbour of its exact value."""
    moved = codes - np.sign(codes - exact)
    able = (moved >= grid.low[..., None]) & (moved <= grid.high[..., None]) & (np.abs(codes - exact) < 1)
    if problem.pair_limit is None:
        return able
    even = codes.shape[-1] // 2 * 2
    total = np.abs(codes[..., 0:even:2] + codes[..., 1:even:2])
    able[..., :even] &= np.repeat(total <= problem.pair_limit - 2, 2, axis=-1)  # both may move
    return able
