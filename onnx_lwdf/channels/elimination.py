"""Which channels of a group cost least, and what their readers' weights become without them.

A reader computes y = W x + b. With S the covariance of x (centered where its bias can take up a mean), P = S^-1, it
answers the removal of columns R best, in the least squares sense, with

    W'_K = W_K + W_R S_RK S_KK^-1,    error = tr(W_R (P_RR)^-1 W_R^T),    b' = b + W E[x] - W' E[x]

(neuron merging in closed form). What is left unexplained makes the answer's variance smaller than that of y, layer after
layer; a factor for each row gives it back. Backward elimination takes away the unit of least error, one at a time; with B the
columns of the unit that goes,

    K = P_BB^-1 P_B,    W <- W - W_B K,    P <- P - P_B^T K

keeps both exact (optimal brain surgeon, on blocks: Hassibi and Stork 1993; Frantar and Alistarh, arXiv 2208.11580).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lwdf.channels.ties import Ints
from onnx_lwdf.solvers.problem import F64

MOST_RESTORED = 2.0  # of a row's variance: what is hardly explained any more is mostly noise
RIDGE = (
    1e-4  # of the mean variance: more than what float32 moments leave of a constant, less than any error that counts
)


@dataclass(frozen=True, slots=True)
class Reader:
    """One layer that reads the units of a group."""

    weight: F64  # [rows, in], scaled so that errors of several readers can be added
    covariance: F64  # [in, in]
    columns: Ints  # [units, columns of each]


@dataclass(frozen=True, slots=True)
class Elimination:
    """The order in which units go."""

    order: Ints  # [steps], indices of units
    errors: F64  # [steps + 1], of all readers together after so many units; errors[0] = 0


def eliminate(readers: Sequence[Reader], steps: int) -> Elimination:
    """The units of least error, `steps` of them, one after the other."""
    units = len(readers[0].columns)
    weights = [_fewest_rows(reader.weight) for reader in readers]
    inverses = [np.asarray(np.linalg.inv(ridged(reader.covariance)), np.float64) for reader in readers]
    gone, order, errors = np.zeros(units, bool), [], [0.0]
    for _ in range(min(steps, units)):
        cost = np.zeros(units)
        for reader, weight, inverse in zip(readers, weights, inverses, strict=True):
            cost += _costs(weight, inverse, reader.columns)
        cost[gone] = np.inf
        unit = int(np.argmin(cost))
        gone[unit] = True
        order.append(unit)
        errors.append(errors[-1] + max(float(cost[unit]), 0.0))
        for reader, weight, inverse in zip(readers, weights, inverses, strict=True):
            _remove(weight, inverse, reader.columns[unit])
    return Elimination(np.array(order, np.int64), np.array(errors))


def ridged(covariance: F64) -> F64:
    """A covariance that can be inverted; inputs that never vary stay apart from all others."""
    mean = float(np.trace(covariance)) / len(covariance)
    return covariance + RIDGE * (mean or 1.0) * np.eye(len(covariance))


def _fewest_rows(weight: F64) -> F64:
    """A copy with the same W^T W, which is all that counts, in at most as many rows as columns."""
    return weight.copy() if weight.shape[0] <= weight.shape[1] else np.asarray(np.linalg.qr(weight, mode="r"))


def _costs(weight: F64, inverse: F64, columns: Ints) -> F64:
    """[units]: tr(W_B P_BB^-1 W_B^T) of every unit that is still there; anything for the others."""
    if columns.shape[1] == 1:
        return np.asarray((weight**2).sum(0)[columns[:, 0]] / np.diagonal(inverse)[columns[:, 0]])
    own = weight.T[columns]  # [units, columns, rows]
    spread = inverse[columns[:, :, None], columns[:, None, :]]
    return np.asarray(np.trace(np.linalg.solve(spread, own @ own.transpose(0, 2, 1)), axis1=1, axis2=2))


def _remove(weight: F64, inverse: F64, columns: Ints) -> None:
    """Both, in place, without these columns, which become those of an input that is independent of all."""
    carried = np.linalg.solve(inverse[np.ix_(columns, columns)], inverse[columns])  # K [columns, in]
    weight -= weight[:, columns] @ carried
    inverse -= inverse[:, columns] @ carried
    weight[:, columns], inverse[columns], inverse[:, columns] = 0, 0, 0
    inverse[columns, columns] = 1


def refit(weight: F64, covariance: F64, kept: npt.NDArray[np.bool_]) -> F64:
    """The weight [rows, kept] that answers best without the other columns. weight [rows, in], covariance [in, in]."""
    if kept.all():
        return weight
    inner = ridged(covariance[np.ix_(kept, kept)])
    merged = np.linalg.solve(inner, covariance[np.ix_(kept, ~kept)])  # [kept, removed]: each as a sum of those kept
    return weight[:, kept] + weight[:, ~kept] @ merged.T


def restore(weight: F64, refitted: F64, covariance: F64, kept: npt.NDArray[np.bool_]) -> F64:
    """The re-fitted weight with every row's output as variable as it was."""
    before = np.einsum("oi,oi->o", weight @ covariance, weight)
    after = np.einsum("oi,oi->o", refitted @ covariance[np.ix_(kept, kept)], refitted)
    ratio = np.divide(before, after, out=np.ones_like(after), where=after > 0)
    return np.asarray(refitted * np.sqrt(np.clip(ratio, 0, MOST_RESTORED))[:, None])


def left_over(weight: F64, refitted: F64, covariance: F64, kept: npt.NDArray[np.bool_]) -> float:
    """The error of the re-fitted weight, E |W x - W' x_kept|^2 around its mean."""
    difference = weight.copy()
    difference[:, kept] -= refitted
    return max(float(np.einsum("oi,oi->", difference @ covariance, difference)), 0.0)
