"""How many channels of each group go, under one budget for the whole network.

Every group has a curve: the least error after k of its units are gone. Units go in steps, as many as a vector register
of the float kernels takes where the group is wide, so that what remains is a multiple of it. Step by step the group
whose step costs least, per channel and square root of the weights that go with it, goes on, until the budget is spent:
by channels alone the narrow layers would lose them, by weights alone the wide ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lwdf.solvers.problem import F64

MOST_SHARE = 0.9  # of one group
STEPS = ((64, 8), (16, 4), (0, 1))  # groups of at least so many units lose so many at a time


@dataclass(frozen=True, slots=True)
class Curve:
    """One group's errors."""

    errors: F64  # [steps + 1], after so many units
    units: int
    worth: float  # of one unit: what an error is divided by


def step_of(units: int) -> int:
    """How many of this many units go at a time."""
    return next(step for least, step in STEPS if units >= least)


def most_removed(units: int) -> int:
    """How many of this many units may go."""
    return min(int(MOST_SHARE * units), units - 1)


def allocate(curves: Sequence[Curve], budget: int) -> list[int]:
    """How many units of each group go, `budget` at most in all."""
    removed, left = [0] * len(curves), budget
    while True:
        best, rate = -1, np.inf
        for i, curve in enumerate(curves):
            stop = _next(curve, removed[i])
            if stop is None or stop - removed[i] > left:
                continue
            cost = (curve.errors[stop] - curve.errors[removed[i]]) / ((stop - removed[i]) * curve.worth)
            if cost < rate:
                best, rate = i, cost
        if best < 0:
            return removed
        stop = _next(curves[best], removed[best])
        assert stop is not None
        left -= stop - removed[best]
        removed[best] = stop


def _next(curve: Curve, removed: int) -> int | None:
    """The next count: what remains is a multiple of the step."""
    step = step_of(curve.units)
    remaining = curve.units - removed
    stop = curve.units - (remaining - 1) // step * step
    return stop if stop < len(curve.errors) and stop <= most_removed(curve.units) else None
