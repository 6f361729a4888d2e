"""Per-channel statistics of a tensor: what BatchNormalization stored about training.

A BatchNormalization with stored variance v puts out, for every channel, in training

    mean = beta,    deviation = |gamma| sqrt(v / (v + epsilon))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Mean and standard deviation of each channel (axis 1) of a tensor."""

    mean: F64  # [channels]
    deviation: F64  # [channels]

    def scaled(self, factor: F64) -> ChannelStatistics:
        """The statistics after the channels were multiplied by positive factors."""
        return ChannelStatistics(self.mean * factor, self.deviation * factor)

    def shifted(self, offset: F64) -> ChannelStatistics:
        """The statistics after an offset was added to the channels."""
        return ChannelStatistics(self.mean + offset, self.deviation)


Statistics = Mapping[str, ChannelStatistics]  # tensor name -> its statistics
