"""How sparse each layer becomes, so that a global number of zeros costs least.

    minimize sum_l cost_l(zeros_l)    where sum_l zeros_l = round(sparsity * sum_l size_l)

A layer's cost is a curve through measured points, its lower convex hull; then taking the cheapest piece of any hull
first is the optimum, and the last piece is cut where the budget ends. Between the points the cube root of the cost is
linear: a mask that takes the smallest of many weights costs about the third power of how many it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

SPARSITIES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)  # where the cost is measured
PIECES = 50
MOST = 0.95  # of one layer, where the budget can be met without more


@dataclass(frozen=True, slots=True)
class Curve:
    """What pruning a layer costs; 0 at no zeros, `full` with nothing left."""

    size: int  # weights
    costs: tuple[float, ...]  # at SPARSITIES
    full: float


def summed(curves: Sequence[Curve]) -> Curve:
    """Of layers that have their zeros at the same places; shares of the sum need not give each a whole number."""
    costs = tuple(sum(each) for each in zip(*(curve.costs for curve in curves), strict=True))
    return Curve(sum(curve.size for curve in curves), costs, sum(curve.full for curve in curves))


@dataclass(frozen=True, slots=True)
class _Piece:
    slope: float  # cost of one more zero
    layer: int
    zeros: int


def allocate(curves: Sequence[Curve], sparsity: float) -> list[float]:
    """The sparsity of every layer; together exactly round(sparsity * all weights) zeros, each layer's a whole number."""
    wanted = round(sparsity * sum(curve.size for curve in curves))
    pieces = [piece for layer, curve in enumerate(curves) for piece in _hull(layer, curve, max(MOST, sparsity))]
    zeros = [0] * len(curves)
    for piece in sorted(pieces, key=lambda piece: piece.slope):  # stable: within a layer the slopes rise
        taken = min(piece.zeros, wanted)
        zeros[piece.layer] += taken
        wanted -= taken
    return [count / curve.size for count, curve in zip(zeros, curves, strict=True)]


def _hull(layer: int, curve: Curve, most: float) -> list[_Piece]:
    """The lower convex hull of the curve as pieces of rising slope, up to the largest sparsity allowed."""
    points = [0.0, *SPARSITIES, 1.0]
    roots = np.cbrt(np.maximum.accumulate([0.0, *curve.costs, max(curve.full, *curve.costs)]))
    counts = sorted({math.ceil(most * curve.size * i / PIECES) for i in range(PIECES + 1)})
    hull: list[tuple[int, float]] = []
    for count in counts:
        point = (count, float(np.interp(count / curve.size, points, roots)) ** 3)
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return [_Piece(_slope(a, b), layer, b[0] - a[0]) for a, b in pairwise(hull)]


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
