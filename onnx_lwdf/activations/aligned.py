"""BN-aligned propagation: synthetic images through the network with every BatchNormalization in batch-statistics mode.

    y = deviation (x - mean_batch(x)) / deviation_batch(x) + mean

Whatever the input was, every tensor that a BatchNormalization put out has exactly the mean and the deviation that it had
in training, and the correlations between channels and neighbouring pixels, which independent draws destroy, come from
the network's own weights. The normalizer stands behind the layer into which the BatchNormalization was folded.

Nothing is further than 12 |gamma| from its mean. A channel that answers to nothing in synthetic images but a few positions has
its whole deviation made of these, hundreds of deviations from the mean; no real image goes there, and a range that did would
leave no codes for what real images hold.
"""

from __future__ import annotations

import numpy as np

from onnx_lwdf.graph import Graph
from onnx_lwdf.statistics import ChannelStatistics

# Var = E[x^2] - E[x]^2 cancels in float32: below this share of E[x^2] it is noise, and noise is not amplified.
SMALLEST_SHARE = 1e-6
NO_POWER = 1e-30  # where E[x^2] is below, nothing is left of it in float32; behind a layer of 1e-6 another may multiply
DEAD_POWER = 1e-12  # variance that is no more than rounding beside channels that vary by 1


def align(graph: Graph, tensor: str, known: ChannelStatistics, shape: tuple[int, ...]) -> str:
    """Behind the tensor [N, C, ...]: its channels normalized by the batch, then given the known statistics."""
    mean, variance = batch_statistics(graph, tensor, len(shape))
    scale = graph.add_constant("align.deviation", known.deviation.astype(np.float32))
    shift = graph.add_constant("align.mean", known.mean.astype(np.float32))
    aligned = normalize(graph, tensor, mean, variance, shift, scale, dead_power(known))
    return _bounded(graph, aligned, known, len(shape))


def _bounded(graph: Graph, tensor: str, known: ChannelStatistics, rank: int) -> str:
    """No channel further from its mean than it may reach; as it is where no BatchNormalization tells, or before opset 8."""
    if known.far is None or graph.opset < 8:  # Min and Max do not broadcast there
        return tensor
    for op, bound in (("Max", known.mean - known.far), ("Min", known.mean + known.far)):
        limit = graph.add_constant("align.bound", bound.astype(np.float32).reshape(-1, *(1,) * (rank - 2)))
        tensor = graph.add(op, [tensor, limit], "align")
    return tensor


def batch_statistics(graph: Graph, tensor: str, rank: int) -> tuple[str, str]:
    """Tensors [C] that hold the mean and the variance of each channel of [N, C, ...] over the batch."""
    axes = [0, *range(2, rank)]
    mean = _reduce(graph, "ReduceMean", tensor, axes)  # [C]
    square = graph.add("Mul", [tensor, tensor], "align")
    power = _reduce(graph, "ReduceMean", square, axes)
    spread = graph.add("Sub", [power, graph.add("Mul", [mean, mean], "align")], "align")
    floor = graph.add("Mul", [power, graph.add_constant("align.share", np.float32(SMALLEST_SHARE))], "align")
    return mean, graph.add("Max", [spread, floor], "align")


def dead_power(known: ChannelStatistics) -> float:
    """The variance that says nothing beside that of the tensor's other channels."""
    return max(DEAD_POWER * min(float(known.deviation.max(initial=0)) ** 2, 1.0), NO_POWER)


def normalize(
    graph: Graph, tensor: str, mean: str, variance: str, shift: str, scale: str, dead: float = NO_POWER
) -> str:
    """The tensor's channels, which have this mean and variance, with the mean `shift` and the deviation `scale`.

    Channels of a variance below `dead` get less deviation than that.
    """
    return graph.add("BatchNormalization", [tensor, scale, shift, mean, variance], "align", epsilon=dead)


def _reduce(graph: Graph, op: str, tensor: str, axes: list[int]) -> str:
    if graph.opset < 18:
        return graph.add(op, [tensor], "align", axes=axes, keepdims=0)
    return graph.add(op, [tensor, graph.add_constant("align.axes", np.array(axes, np.int64))], "align", keepdims=0)
