"""Runs of a weight's inputs whose codes are multiplied by an integer of their own, for each output channel.

    stored weight = scale * (multiplier * code)

The product still fits int8, so that kernels with one scale per output channel run it, and a file holds codes of few bits
and one multiplier for a run (VS-Quant: Dai et al., arXiv 2102.04503, whose hardware multiplies; here the product is stored).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MOST_MULTIPLIER = 8  # three bits for a run

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Vectors:
    """How the inputs of a layer are cut into runs."""

    size: int  # inputs in a run; the last one of a kernel position may be shorter
    kernel: int  # positions: a run stays within one
    most: int  # the largest multiplier

    def starts(self, inputs: int) -> npt.NDArray[np.int64]:
        """The first input of each run, [runs]."""
        channels = inputs // self.kernel
        return np.add.outer(np.arange(self.kernel) * channels, np.arange(0, channels, self.size)).ravel()

    def spread(self, values: F64, inputs: int) -> F64:
        """[..., runs] -> [..., in]: what each run has, for all of its inputs."""
        return np.repeat(values, np.diff(self.starts(inputs), append=inputs), axis=-1)


def vectors(size: int, channels: int, kernel: int, bits: int | None, largest: int) -> Vectors | None:
    """The runs of a layer with `channels` inputs at each kernel position; None where multipliers have nothing to choose.

    No product of a code of these bits and its multiplier exceeds `largest`.
    """
    if not size or bits is None or channels < size or channels * kernel == size:
        return None
    most = min(MOST_MULTIPLIER, largest // (2 ** (bits - 1) + slack(bits)))
    return Vectors(size, kernel, most) if most > 1 else None


def slack(bits: int) -> int:
    """How far a range of codes that have multipliers may move from the middle."""
    return max(1, 2 ** (bits - 4))
