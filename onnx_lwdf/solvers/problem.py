"""One layer's compression problem and its answer, in arrays only.

A layer computes y = W x + b for every group. Its problem is to find the stored weight V that minimizes

    loss = sum_g tr((W_g - V_g) H_g (W_g - V_g)^T),    H = E[x x^T]

over the grid V = scale * codes, one scale per output channel (times small integers, see vectors.py), or over the V with
enough zeros, or both.
Shapes: `groups` is always the leading axis, `in` is ordered (kernel position, channel), the order in which
onnxruntime's integer kernels flatten a filter. Where a layer has so many inputs that H is kept by blocks of them, these are
groups, too, and their output channels have one scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_lwdf.vectors import Vectors

F64 = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]  # True: the weight stays


@dataclass(frozen=True, slots=True)
class LayerProblem:
    """What a solver is given. It pickles, so that any executor can carry it."""

    weight: F64  # [groups, out, in]
    hessian: F64  # [groups, in, in], E[x x^T], symmetric and positive semidefinite
    bits: int | None  # 2 to 8; None: the values stay float
    scale_floor: F64  # [groups, out], no scale may be smaller (an int32 bias must fit)
    kernel: int = 1  # kernel positions: `in` is kernel * channels
    pair_limit: int | None = None  # bound on |codes[2k] + codes[2k + 1]| along `in`, None where nothing saturates
    sparsity: float = 0.0  # share of the layer's weights that become 0
    nm: tuple[int, int] | None = None  # N of every M consecutive inputs stay, in place of `sparsity`
    vectors: Vectors | None = None  # the runs of inputs that have multipliers; None: codes alone
    blocks: int = 1  # so many groups in a row read parts of the same inputs, and share their output channels' scales

    @property
    def rounded_bits(self) -> int:
        """The bits, for a solver that rounds."""
        assert self.bits is not None
        return self.bits

    def shared(self, values: F64) -> F64:
        """[groups / blocks, out] -> [groups, out]: what blocks have in common, for each of them."""
        return np.repeat(values, self.blocks, axis=0)

    def over_blocks(self, values: F64) -> F64:
        """[groups, out]: the sum over the blocks that share the output channel, for each of them."""
        return self.shared(summed(values, self.blocks))

    @property
    def prunes(self) -> bool:
        return self.sparsity > 0 or self.nm is not None

    def of(self, rows: npt.NDArray[np.int64], axis: int) -> LayerProblem:
        """The same of these groups (axis 0), or of these output channels of every group (axis 1), for one block of inputs."""
        hessian = self.hessian[rows] if axis == 0 else self.hessian
        weight, floor = self.weight.take(rows, axis), self.scale_floor.take(rows, axis)
        return replace(self, weight=weight, hessian=hessian, scale_floor=floor)

    def thinned(self, rows: int) -> LayerProblem:
        """The same on so many output channels of each group at most, to learn what a choice costs."""
        few = slice(None, None, -(-self.weight.shape[1] // rows))
        return replace(self, weight=self.weight[:, few], scale_floor=self.scale_floor[:, few])


@dataclass(frozen=True, slots=True)
class Rounding:
    """A weight on its grid: scale[..., None] * codes."""

    codes: Codes  # [groups, out, in], of `bits` each, times the multipliers of their runs
    scale: F64  # [groups, out], positive and exactly representable in float32
    multiplier: Codes | None = None  # [groups, out, runs]; None: 1


@dataclass(frozen=True, slots=True)
class LayerSolution:
    """What a solver answers."""

    values: F64 | None  # [groups, out, in], where they stay float
    rounding: Rounding | None  # None: the values stay float
    loss: float  # the quadratic error above
    notes: tuple[str, ...] = ()

    @property
    def weight(self) -> F64:
        """[groups, out, in], as it is stored."""
        return self.of(slice(None))

    def of(self, rows: slice) -> F64:
        """These output channels of each group of the weight."""
        if self.rounding is not None:
            return self.rounding.scale[:, rows, None] * self.rounding.codes[:, rows]
        assert self.values is not None
        return self.values[:, rows]

    @property
    def sparsity(self) -> float:
        """The share of the weights that are 0."""
        stored = self.weight if self.rounding is None else self.rounding.codes
        return float(np.mean(stored == 0))


def apart(weight: F64, blocks: int) -> F64:
    """The weight [groups, out, in] with blocks of its inputs as groups, [groups * blocks, out, in / blocks]."""
    if blocks == 1:
        return weight
    groups, out, inputs = weight.shape
    return np.ascontiguousarray(weight.reshape(groups, out, blocks, -1).swapaxes(1, 2)).reshape(
        groups * blocks, out, inputs // blocks
    )


def together(weight: npt.NDArray[np.generic], blocks: int) -> npt.NDArray[Any]:
    """The inverse of `apart`."""
    if blocks == 1:
        return weight
    groups, out, width = weight.shape
    return weight.reshape(groups // blocks, blocks, out, width).swapaxes(1, 2).reshape(groups // blocks, out, -1)


def summed(values: F64, blocks: int) -> F64:
    """[groups * blocks, out] -> [groups, out]: sums over blocks."""
    return values if blocks == 1 else values.reshape(-1, blocks, values.shape[1]).sum(1)


def channel_loss(weight: F64, stored: F64, hessian: F64) -> F64:
    """(w - v) H (w - v)^T of every output channel, [groups, out]."""
    difference = weight - stored
    return np.einsum("goi,goi->go", difference @ hessian, difference)


def float_solution(problem: LayerProblem, weight: F64) -> LayerSolution:
    """The answer in float, with its loss."""
    return LayerSolution(weight, None, float(channel_loss(problem.weight, weight, problem.hessian).sum()))


def solution(problem: LayerProblem, rounding: Rounding, notes: tuple[str, ...] = ()) -> LayerSolution:
    """The answer on the grid, with its loss."""
    weight = rounding.scale[..., None] * rounding.codes
    return LayerSolution(None, rounding, float(channel_loss(problem.weight, weight, problem.hessian).sum()), notes)
