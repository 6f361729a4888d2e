"""First and second moments of what a layer's weight rows meet, and how much of their correlations is chance.

A fully connected layer behind a Flatten reads tens of thousands of inputs, of which a sample is a single draw: most of their
correlations are chance, and all of them would take gigabytes. Its inputs are split into blocks of neighbours, between which
nothing is said to be correlated. To whatever uses the moments, a block is a group; blocks share the output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lwdf.statistics import F64

Indices = npt.NDArray[np.int64]

UNKNOWN_DOUBT = 0.2  # from a single chunk
ROUNDING = 1e-5  # of float32 sums over a few thousand positions


@dataclass(frozen=True, slots=True)
class Moments:
    """First and second moments of a layer's input; `groups` are groups times blocks."""

    mean: F64  # [groups, in]
    hessian: F64  # [groups, in, in], E[x x^T]
    doubt: F64  # [groups], how much of the correlations is chance: their variance between chunks over their square
    blocks: int = 1  # so many groups in a row are blocks of the inputs of one

    def of(self, groups: npt.NDArray[np.bool_] | Indices) -> Moments:
        """Of these groups: a mask, or their places. (Layers of several groups have no blocks.)"""
        return Moments(self.mean[groups], self.hessian[groups], self.doubt[groups])

    def inputs(self, columns: npt.NDArray[np.bool_] | Indices) -> Moments:
        """Of these inputs of every group: a mask, or their places. (Not of layers that have blocks.)"""
        return Moments(self.mean[:, columns], self.hessian[:, columns][:, :, columns], self.doubt)

    @property
    def covariance(self) -> F64:
        """[groups, in, in] around the mean, what chance made of its off-diagonal taken away by shrinking it.

        (The intensity of Schaefer and Strimmer, 2005, with chunks of images as the independent draws.)
        """
        centered = self.mean[:, :, None] * self.mean[:, None, :]  # in place from here on: these are the largest arrays
        np.subtract(self.hessian, centered, out=centered)
        diagonal = np.maximum(np.einsum("gii->gi", centered), 0.0)
        centered *= (1 - self.doubt)[:, None, None]
        np.einsum("gii->gi", centered)[...] = diagonal
        return centered


class Sums:
    """Sums over chunks: of the second moments, and of the squared correlations within each chunk.

    Correlations are covariances in units of the first chunk's deviations: one unit for all chunks, and one matrix to keep.
    """

    def __init__(self, mean: F64, power: F64) -> None:
        """The first chunk. mean [groups, in], power [groups, in, in]."""
        spread = np.einsum("gii->gi", power) - mean**2
        level = np.einsum("gii->gi", power)
        live = spread > ROUNDING * np.maximum(level, level.max(1, keepdims=True))  # the others hold rounding errors
        self._weight = 1 / np.sqrt(np.where(live, spread, np.inf))  # [groups, in]
        self._means = [mean]
        self._power = power
        self._squares = self._squared(self._covariance(power, [mean]))

    def add(self, mean: F64, power: F64) -> None:
        self._squares += self._squared(self._covariance(power, [mean]))
        self._means.append(mean)
        self._power += power

    def moments(self) -> Moments:
        """The sums become the moments: nothing can be added any more."""
        self._power /= len(self._means)
        return Moments(np.mean(self._means, axis=0), self._power, self._doubt(self._power))

    def _doubt(self, hessian: F64) -> F64:
        """[groups]: summed variance of the mean correlations over their summed squares."""
        chunks = len(self._means)
        if chunks == 1:
            return np.full(len(hessian), UNKNOWN_DOUBT)
        found = self._squared(self._covariance(hessian, self._means))
        chance = np.maximum(self._squares / chunks - found, 0.0) / (chunks - 1)
        return np.clip(chance / np.where(found > 0, found, np.inf), 0.0, 1.0)

    @staticmethod
    def _covariance(power: F64, means: Sequence[F64]) -> F64:
        """Within chunks of these means, [groups, in, in]."""
        stacked = np.stack(means, axis=1)  # [groups, chunks, in]
        covariance = stacked.swapaxes(1, 2) @ stacked
        covariance /= len(means)
        return np.subtract(power, covariance, out=covariance)

    def _squared(self, covariance: F64) -> F64:
        """[groups]: the sum of the squared correlations off the diagonal; `covariance` is consumed."""
        np.einsum("gii->gi", covariance)[...] = 0
        covariance *= self._weight[:, :, None]
        covariance *= self._weight[:, None, :]
        return np.einsum("gij,gij->g", covariance, covariance)
