"""Per-channel statistics of a tensor: what BatchNormalization stored about training.

A BatchNormalization with stored variance v puts out, for every channel, in training

    mean = beta,    deviation = |gamma| sqrt(v / (v + epsilon))

Where a channel hardly ever fires, v is below epsilon, and the deviation says little about the values that it then takes;
|gamma| is what it would be otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lwdf.graph import Graph, operator
from onnx_lwdf.layers import WEIGHTED

F64 = npt.NDArray[np.float64]

# From its mean that a channel may reach: beyond lies exp(-sqrt(2) 12) of Laplace's distribution, one value in 20 million.
DEVIATIONS = 12.0


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Mean and standard deviation of each channel (axis 1) of a tensor."""

    mean: F64  # [channels]
    deviation: F64  # [channels]
    gamma: F64 | None = None  # [channels], |gamma| of the BatchNormalization; None where there is none

    @property
    def far(self) -> F64 | None:
        """[channels]: how far from its mean a channel may reach, 12 |gamma|; None without a BatchNormalization."""
        return None if self.gamma is None else DEVIATIONS * self.gamma

    def through(self, scale: F64, shift: F64) -> ChannelStatistics:
        """Of scale x + shift; both [channels]."""
        size = np.abs(scale)
        gamma = None if self.gamma is None else size * self.gamma
        return ChannelStatistics(scale * self.mean + shift, size * self.deviation, gamma)

    def of(self, kept: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> ChannelStatistics:
        """Of these channels: a mask, or their places."""
        return ChannelStatistics(
            self.mean[kept], self.deviation[kept], None if self.gamma is None else self.gamma[kept]
        )


Statistics = Mapping[str, ChannelStatistics]  # tensor name -> its statistics


def divergence(mean: F64, deviation: F64, other_mean: F64, other_deviation: F64) -> F64:
    """KL(N(mean, deviation) || N(other mean, other deviation)) of every channel in nats; all [channels], deviations > 0."""
    ratio, offset = deviation / other_deviation, (mean - other_mean) / other_deviation
    return np.asarray(0.5 * (ratio**2 + offset**2 - 1) - np.log(ratio))


def origin(
    graph: Graph, tensor: str, statistics: Statistics, recovered: Statistics, known_inputs: Iterable[str]
) -> str:
    """Where the distribution of a tensor comes from: "bn", "recovered" or "propagated".

    "bn": whatever way one goes back from it, stored statistics (or an input of known normalization) come before any layer
    without them. "recovered": on some ways they are not stored, but inferred from what a folded BatchNormalization left.
    "propagated": some layer's output is known only by running synthetic images through the float network.
    """
    known, seen, waiting = set(known_inputs) | set(statistics), set(), [tensor]
    while waiting:
        name = waiting.pop()
        if name in known or name in seen or graph.constant(name) is not None:
            continue
        seen.add(name)
        node = graph.producer.get(name)
        if name in recovered:
            continue
        if node is None or operator(node) in WEIGHTED:
            return "propagated"
        waiting.extend(source for source in node.input if source)
    return "bn" if seen.isdisjoint(recovered) else "recovered"
