"""Which channels of a group cost least, and what their readers' weights become without them.

A reader computes y = W x + b. With S the covariance of x (centered where its bias can take up a mean), P = S^-1, it
answers the removal of columns R best, in the least squares sense, with

    W'_K = W_K + W_R S_RK S_KK^-1,    error = tr(W_R (P_RR)^-1 W_R^T),    b' = b + W E[x] - W' E[x]

(neuron merging in closed form). Backward elimination takes away the unit of least error, one at a time; with the Gram
matrix G = W^T W of the re-fitted weight and B the columns of the unit that goes,

    K = P_BB^-1 P_B,    G <- (I - E_B K)^T G (I - E_B K),    P <- P - P_B^T K

keeps both exact (optimal brain surgeon, on blocks: Hassibi and Stork 1993; Frantar and Alistarh, arXiv 2208.11580).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lwdf.channels.ties import Ints
from onnx_lwdf.solvers.problem import F64

RIDGE = 1e-6  # of the mean variance: what is constant or doubled is no error to leave out


@dataclass(frozen=True, slots=True)
class Reader:
    """One layer that reads the units of a group."""

    gram: F64  # [in, in], W^T W, scaled so that errors of several readers can be added
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
    grams = [reader.gram.copy() for reader in readers]
    inverses = [np.linalg.inv(ridged(reader.covariance)) for reader in readers]
    gone, order, errors = np.zeros(units, bool), [], [0.0]
    for _ in range(min(steps, units)):
        cost = np.zeros(units)
        for reader, gram, inverse in zip(readers, grams, inverses, strict=True):
            cost += _costs(gram, inverse, reader.columns)
        cost[gone] = np.inf
        unit = int(np.argmin(cost))
        gone[unit] = True
        order.append(unit)
        errors.append(errors[-1] + max(float(cost[unit]), 0.0))
        for reader, gram, inverse in zip(readers, grams, inverses, strict=True):
            _remove(gram, inverse, reader.columns[unit])
    return Elimination(np.array(order, np.int64), np.array(errors))


def ridged(covariance: F64) -> F64:
    """A covariance that can be inverted; inputs that never vary stay apart from all others."""
    mean = float(np.trace(covariance)) / len(covariance)
    return covariance + RIDGE * (mean or 1.0) * np.eye(len(covariance))


def _costs(gram: F64, inverse: F64, columns: Ints) -> F64:
    """[units]: tr(P_BB^-1 G_BB) of every unit that is still there; anything for the others."""
    if columns.shape[1] == 1:
        return np.diagonal(gram)[columns[:, 0]] / np.diagonal(inverse)[columns[:, 0]]
    block = columns[:, :, None], columns[:, None, :]
    return np.asarray(np.trace(np.linalg.solve(inverse[block], gram[block]), axis1=1, axis2=2))


def _remove(gram: F64, inverse: F64, columns: Ints) -> None:
    """Both matrices, in place, without these columns, which become those of an input that is independent of all."""
    carried = np.linalg.solve(inverse[np.ix_(columns, columns)], inverse[columns])  # K [columns, in]
    crossed = gram[:, columns] @ carried
    inner = carried.T @ gram[np.ix_(columns, columns)] @ carried
    gram += inner - crossed - crossed.T
    inverse -= inverse[:, columns] @ carried
    gram[columns], gram[:, columns], inverse[columns], inverse[:, columns] = 0, 0, 0, 0
    inverse[columns, columns] = 1


def refit(weight: F64, covariance: F64, kept: npt.NDArray[np.bool_]) -> F64:
    """The weight [rows, kept] that answers best without the other columns. weight [rows, in], covariance [in, in]."""
    if kept.all():
        return weight
    inner = ridged(covariance[np.ix_(kept, kept)])
    merged = np.linalg.solve(inner, covariance[np.ix_(kept, ~kept)])  # [kept, removed]: each as a sum of those kept
    return weight[:, kept] + weight[:, ~kept] @ merged.T


def left_over(weight: F64, refitted: F64, covariance: F64, kept: npt.NDArray[np.bool_]) -> float:
    """The error of the re-fitted weight, E |W x - W' x_kept|^2 around its mean."""
    difference = weight.copy()
    difference[:, kept] -= refitted
    return max(float(np.einsum("oi,oi->", difference @ covariance, difference)), 0.0)
