"""The multiple-choice knapsack: one choice for every item, at the least cost that a limit allows.

    minimize sum_i costs[i][c_i]    where    sum_i sizes[i][c_i] <= limit

Exact, item by item over the partial choices that no other one dominates in both size and cost (Nemhauser and Ullmann, 1969). Of
these only those remain whose Lagrangian bound, cost + m (size - limit) + what the items to come add to it at least, is
below the cost of the relaxed solution. That leaves a few thousand, and milliseconds, for a network of a hundred layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

GAP = 1e-9  # relative: an answer that is better by less is not looked for
NUDGE = 1 + 1e-9  # beyond a multiplier at which two choices are equal


def knapsack(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], limit: float) -> list[int] | None:
    """The choice of every item; None where even the smallest ones do not fit.

    >>> knapsack([[9, 1], [5, 0]], [[1, 4], [1, 4]], 5)
    [1, 0]
    """
    cost, size = ([np.asarray(row, np.float64) for row in table] for table in (costs, sizes))
    if sum(float(row.min()) for row in size) > limit:
        return None
    multiplier, relaxed = _relaxed(cost, size, limit)
    best = (1 - GAP) * _total(cost, relaxed)
    to_come = _sums_behind([c + multiplier * s for c, s in zip(cost, size, strict=True)])
    smallest = _sums_behind(size)

    used, paid, steps = np.zeros(1), np.zeros(1), []  # of every partial choice that is left
    for i, (c, s) in enumerate(zip(cost, size, strict=True)):
        spent, total = (used[:, None] + s).ravel(), (paid[:, None] + c).ravel()
        bound = total + multiplier * (spent - limit) + to_come[i + 1]
        hopeful = np.flatnonzero((spent + smallest[i + 1] <= limit) & (bound < best))
        hopeful = hopeful[np.lexsort((total[hopeful], spent[hopeful]))]
        least = np.minimum.accumulate(total[hopeful])
        left = hopeful[np.diff(least, prepend=np.inf) < 0]
        steps.append(np.divmod(left, len(c)))
        used, paid = spent[left], total[left]
    if not paid.size:
        return relaxed
    chosen, place = [], int(np.argmin(paid))
    for parents, choices in reversed(steps):
        chosen.append(int(choices[place]))
        place = int(parents[place])
    return chosen[::-1]


def _relaxed(cost: Sequence[F64], size: Sequence[F64], limit: float) -> tuple[float, list[int]]:
    """The least multiplier m at which the choices of least cost + m size fit together, and these choices."""
    slopes = []
    for c, s in zip(cost, size, strict=True):
        smaller = s[:, None] < s  # [choice, a larger one]
        slopes.append(((c[:, None] - c)[smaller]) / (s - s[:, None])[smaller])
    equal = np.unique(np.concatenate(slopes))  # multipliers at which two choices of an item are equal
    multipliers = [0.0, *(equal[equal > 0] * NUDGE)]
    low, high = 0, len(multipliers) - 1
    while low < high:
        middle = (low + high) // 2
        if _total(size, _choices(cost, size, multipliers[middle])) <= limit:
            high = middle
        else:
            low = middle + 1
    found = _choices(cost, size, multipliers[low])
    if _total(size, found) > limit:  # two choices so near each other that rounding hides the nudge
        found = [int(np.lexsort((c, s))[0]) for c, s in zip(cost, size, strict=True)]
    return multipliers[low], found


def _choices(cost: Sequence[F64], size: Sequence[F64], multiplier: float) -> list[int]:
    return [int(np.lexsort((s, c + multiplier * s))[0]) for c, s in zip(cost, size, strict=True)]


def _total(table: Sequence[F64], chosen: Sequence[int]) -> float:
    return float(sum(row[choice] for row, choice in zip(table, chosen, strict=True)))


def _sums_behind(table: Sequence[F64]) -> F64:
    """[items + 1]: the sum of the least entries from each item on."""
    return np.append(np.cumsum([row.min() for row in reversed(table)])[::-1], 0.0)
