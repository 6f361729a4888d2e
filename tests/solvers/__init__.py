"""Problems for the tests of the solvers, and oracles that share no code with them."""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt

from onnx_lwdf.solvers.problem import F64, LayerProblem
from onnx_lwdf.vectors import Vectors


def random_problem(
    seed: int,
    groups: int = 1,
    out: int = 4,
    kernel: int = 1,
    channels: int = 8,
    bits: int = 4,
    pair_limit: int | None = None,
    vectors: Vectors | None = None,
) -> LayerProblem:
    """Gaussian weights, and the second moments of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    width = kernel * channels
    mixing = np.eye(width) + rng.normal(size=(width, width)) / np.sqrt(width)
    inputs = rng.normal(size=(groups, 4 * width + 8, width)) @ mixing * np.exp(rng.normal(size=(groups, 1, width)))
    hessian = inputs.swapaxes(1, 2) @ inputs / inputs.shape[1]
    weight = rng.normal(size=(groups, out, width))
    return LayerProblem(weight, hessian, bits, np.zeros((groups, out)), kernel, pair_limit, vectors=vectors)


def loss_by_definition(weight: F64, stored: F64, hessian: F64) -> F64:
    """(w - v) H (w - v)^T for every output channel, [groups, out], one sum."""
    return np.asarray(np.einsum("goi,gij,goj->go", weight - stored, hessian, weight - stored))


def signed_range(bits: int) -> tuple[int, int]:
    """The codes of a symmetric grid."""
    high = 2 ** (bits - 1) - 1
    return (-127 if bits == 8 else -high - 1), high


def spread(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    """From the smallest to the largest code of each channel, 0 among them, [groups, out]."""
    wide = codes.astype(np.int64)
    return np.asarray(wide.max(-1, initial=0) - wide.min(-1, initial=0))


def least_loss(problem: LayerProblem, scale: F64, bits: int) -> F64:
    """The least loss that any codes reach on this scale, [groups, out], by trying all of them.

    Where pairs are limited the grid is symmetric, elsewhere any 2^bits codes in a row with 0 among them will do.
    """
    low = signed_range(bits)[0]
    if problem.pair_limit is not None:
        return _least_loss(problem, scale, range(low, low + 2**bits))
    windows = [range(start, start + 2**bits) for start in range(1 - 2**bits, 1)]
    return np.asarray(np.min([_least_loss(problem, scale, window) for window in windows], axis=0))


def _least_loss(problem: LayerProblem, scale: F64, codes: range) -> F64:
    every = np.array(list(product(codes, repeat=problem.weight.shape[2])), np.float64)
    limit = np.inf if problem.pair_limit is None else problem.pair_limit
    even = every.shape[1] // 2 * 2
    every = every[(np.abs(every[:, :even:2] + every[:, 1:even:2]) <= limit).all(1)]
    losses = [loss_by_definition(problem.weight, scale[..., None] * code, problem.hessian) for code in every]
    return np.asarray(np.min(losses, axis=0))


def pair_sums(codes: npt.NDArray[np.int8] | F64) -> npt.NDArray[np.int64]:
    """|codes[2k] + codes[2k + 1]| along the last axis."""
    even = codes.shape[-1] // 2 * 2
    wide = codes.astype(np.int64)
    return np.asarray(np.abs(wide[..., :even:2] + wide[..., 1:even:2]))
