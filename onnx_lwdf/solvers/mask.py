"""Which weights are kept: exact counts by a score, over the whole layer or N in every M consecutive inputs.

The second-order mask solves

    min_V tr((W - V) H (W - V)^T)    over the V with the wanted number of weights

by the alternating direction method of multipliers, in units where H has a diagonal of one. X is the minimizer of the
loss plus rho/2 |X - Z + U|^2, in closed form in the eigenvectors of H; Z keeps the largest entries of X + U; U adds up
what they disagree in; rho grows until they agree (Meng et al., arXiv 2406.07831; Boza, arXiv 2401.02938). At the first
step X = W, and the score of a weight is w^2 H[j, j]; later ones know what the other weights can take over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lwdf.solvers.problem import F64, LayerProblem, Mask

F32 = npt.NDArray[np.float32]

ITERATIONS = 24
FIRST_PENALTY, PENALTY_GROWTH = 0.1, 1.2
DAMPING = 0.01  # of the mean of H's diagonal


def kept(size: int, sparsity: float) -> int:
    """How many of `size` weights stay: all but round(sparsity * size)."""
    return size - round(sparsity * size)


def largest(score: npt.NDArray[np.floating], sparsity: float, nm: tuple[int, int] | None) -> Mask:
    """The mask [groups, out, in] of the largest scores: N of every M along `in`, else all but a share of the layer.

    Among equal scores the first ones stay.
    """
    if nm is not None:
        keep, of = nm
        blocks = score.reshape(*score.shape[:-1], -1, of)
        order = np.argsort(-blocks, axis=-1, kind="stable")
        mask = np.zeros(blocks.shape, bool)
        np.put_along_axis(mask, order[..., :keep], True, axis=-1)
        return mask.reshape(score.shape)
    flat, count = score.ravel(), kept(score.size, sparsity)
    if count == 0:
        return np.zeros(score.shape, bool)
    least = np.partition(flat, flat.size - count)[flat.size - count]
    mask = flat > least
    mask[np.flatnonzero(flat == least)[: count - int(mask.sum())]] = True
    return mask.reshape(score.shape)


@dataclass(frozen=True, slots=True)
class _Scaled:
    """A problem in units where H has a diagonal of one."""

    weight: F32  # [groups, out, in]
    hessian: F32  # [groups, in, in]
    values: F32  # [groups, 1, in], eigenvalues
    vectors: F32  # [groups, in, in]


def second_order(problem: LayerProblem) -> Mask:
    """The mask of least loss after a refit, as far as the iteration finds it; [groups, out, in]."""
    return next(path(problem, [problem.sparsity], ITERATIONS))


def path(problem: LayerProblem, sparsities: Sequence[float], iterations: int) -> Iterator[Mask]:
    """The mask of every sparsity in turn, each one's iteration from where the one before it ended."""
    scaled = _scaled(problem)
    kept_part, price = scaled.weight, np.zeros_like(scaled.weight)
    product = scaled.weight @ scaled.hessian
    for sparsity in sparsities:
        penalty = FIRST_PENALTY
        for _ in range(iterations):
            right = (product + penalty * (kept_part - price)) @ scaled.vectors
            moved = (right / (scaled.values + np.float32(penalty))) @ scaled.vectors.swapaxes(1, 2) + price
            mask = largest(moved * moved, sparsity, problem.nm)
            kept_part = np.where(mask, moved, np.float32(0))
            price = moved - kept_part
            penalty *= PENALTY_GROWTH
        yield mask


def swapped(problem: LayerProblem, mask: Mask, weight: F64) -> Mask:
    """The mask that trades weights that matter least for pruned ones whose return gains most, all others held.

    `weight` is the refit within `mask`. Leaving costs v^2 H[j, j]; returning gains G^2 / H[j, j], G = (W - V) H.
    """
    hessian = damped(problem.hessian)
    diagonal = np.einsum("gii->gi", hessian)[:, None, :]
    gradient = (problem.weight - weight) @ hessian
    score = np.where(mask, weight**2 * diagonal, gradient**2 / diagonal)
    return largest(score, problem.sparsity, problem.nm)


def damped(hessian: F64) -> F64:
    """H with a share of its mean diagonal added, [groups, in, in]; where all inputs are dead, the identity."""
    diagonal = np.einsum("gii->gi", hessian).mean(1)
    floor = np.where(diagonal > 0, DAMPING * diagonal, 1.0)
    return np.asarray(hessian + floor[:, None, None] * np.eye(hessian.shape[-1]))


def normalized(hessian: F64) -> tuple[F64, F64]:
    """Damped H in units where its diagonal is one, [groups, in, in], and these units, [groups, in]."""
    stable = damped(hessian)
    unit = np.sqrt(np.einsum("gii->gi", stable))
    return stable / unit[:, :, None] / unit[:, None, :], unit


def _scaled(problem: LayerProblem) -> _Scaled:
    hessian, unit = normalized(problem.hessian)
    values, vectors = np.linalg.eigh(hessian.astype(np.float32))
    weight = (problem.weight * unit[:, None, :]).astype(np.float32)
    return _Scaled(weight, hessian.astype(np.float32), np.maximum(values, 0)[:, None, :], vectors)
