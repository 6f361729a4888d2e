"""Statistics that a folded BatchNormalization left in the biases: of linear bottlenecks, such as MobileNetV2's projections.

Where only linear operators stand between layers, the next layer's BatchNormalization takes the mean away again. No
gradient reached beta, and weight decay drew it to 0: in training such a tensor had

    mean = 0

The folded bias b' = beta - W E[x] tells whether that holds: on synthetic inputs it cancels most of W E[x] then. Deviations
cannot be read from the file. Synthetic images show the objects to which deep layers answer too seldom, and the deviations
d on them starve with depth; those of training do not, for the gammas began at 1 and decayed together. So

    deviation = d max(1, typical / rms d),    typical the median of the bottlenecks' rms d

channel by channel: never narrower than seen, for a range that is too wide costs far less than one that is too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_lwdf.activations.aligned import align, batch_statistics, normalize
from onnx_lwdf.activations.taps import Feed, tensor_shapes
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Layer, bias_of
from onnx_lwdf.precondition.channels import ChannelGroup, find_groups
from onnx_lwdf.runtime import open_session, run
from onnx_lwdf.statistics import F64, ChannelStatistics, Statistics

TINY = 1e-30  # of a variance
MOST_LEFT = 0.5  # of the biases' energy, in the means: unrelated biases would leave more than all of it
FEWEST_BIASES = 16  # unrelated ones would cancel as much of the means by chance once in a thousand times


def bottlenecks(graph: Graph, layers: Sequence[Layer], statistics: Statistics) -> list[ChannelGroup]:
    """The linear groups that convolutions write and of which no BatchNormalization tells anything."""
    return [
        group
        for group in find_groups(graph, layers)
        if group.linear
        and group.channels * len(group.producers) >= FEWEST_BIASES
        and statistics.keys().isdisjoint(group.tensors)
        and all(layer.window is not None and bias_of(graph, layer).any() for layer in group.producers)
    ]


def left_over(graph: Graph, layers: Sequence[Layer], means: Mapping[str, F64]) -> float:
    """The energy of the means that layers put out on synthetic inputs over that of their biases."""
    energy = sum(float(np.sum(bias_of(graph, layer) ** 2)) for layer in layers)
    return sum(float(np.sum(means[layer.output] ** 2)) for layer in layers) / energy


def recover(graph: Graph, layers: Sequence[Layer], statistics: Statistics, chunks: Sequence[Feed]) -> Statistics:
    """What the layers of bottlenecks put out, where their biases show zero means."""
    groups = bottlenecks(graph, layers, statistics)
    if not groups:
        return {}
    seen = _measure(graph, _written(groups), statistics, chunks, 0.0)
    means = {name: known.mean for name, known in seen.items()}
    names = _written([group for group in groups if left_over(graph, group.producers, means) < MOST_LEFT])
    if not names:
        return {}
    typical = float(np.median([np.sqrt(np.mean(seen[name].deviation ** 2)) for name in names]))
    lifted = _measure(graph, names, statistics, chunks, typical)
    return {name: ChannelStatistics(np.zeros_like(known.mean), known.deviation) for name, known in lifted.items()}


def _written(groups: Sequence[ChannelGroup]) -> list[str]:
    return [layer.output for group in groups for layer in group.producers]


def _measure(
    graph: Graph, names: Sequence[str], statistics: Statistics, chunks: Sequence[Feed], least: float
) -> dict[str, ChannelStatistics]:
    """The tensors' means, and the deviations with which they go on around 0: those seen, lifted to an rms of `least`."""
    probe = graph.twin()
    shapes = tensor_shapes(probe.model, [*names, *statistics], chunks[0])
    pairs: dict[str, tuple[str, str]] = {}
    for name in [*names, *statistics]:
        readers = list(probe.consumers[name])
        if name in statistics:
            centered = align(probe, name, statistics[name], shapes[name])
        else:
            mean, variance = batch_statistics(probe, name, len(shapes[name]))
            deviation = _lifted(probe, variance, least)
            pairs[name] = mean, deviation
            zero = probe.add_constant("lift.mean", np.zeros(shapes[name][1], np.float32))
            centered = normalize(probe, name, mean, variance, zero, deviation)
        probe.reroute(readers, name, centered)
    outputs = [name for pair in pairs.values() for name in pair]
    probe.set_outputs(outputs)
    probe.commit()
    session = open_session(probe.model, arena=False)
    answers = zip(*(run(session, chunk, outputs) for chunk in chunks), strict=True)
    values = {
        name: np.asarray(np.mean(found, axis=0), np.float64) for name, found in zip(outputs, answers, strict=True)
    }
    return {name: ChannelStatistics(values[mean], values[deviation]) for name, (mean, deviation) in pairs.items()}


def _lifted(graph: Graph, variance: str, least: float) -> str:
    """The deviations [C], with the common factor that brings their rms to `least` where it is lower."""
    power = graph.add("ReduceMean", [variance], "lift")  # [1]
    bounds = [graph.add_constant("lift.least", np.array([bound], np.float32)) for bound in (least**2, TINY)]
    wanted, safe = (graph.add("Max", [power, bound], "lift") for bound in bounds)
    return graph.add("Sqrt", [graph.add("Mul", [variance, graph.add("Div", [wanted, safe], "lift")], "lift")], "lift")
