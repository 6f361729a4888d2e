"""Channels that are computed more than once, so that their rounding errors average out.

A few channels often make most of a tensor's noise: a large offset that carries little, a long range that is seldom used. Of
such a channel k copies are made, whose rows (and depthwise filters) are the same and whose readers' columns are divided by
k. The biases of the copies differ by fractions of the grid's step,

    offset_i = (i - (k - 1) / 2) step / k,    i = 0 .. k - 1,    so that    (1/k) sum_i round(x + offset_i)

is x rounded to a grid of k times as many steps: a k^2-th of the noise. (Outlier channel splitting: Zhao et al., arXiv
1901.09504, halves a channel's range in the same way.) The float network's function stays but for values within an offset of
a Relu's corner, and for what an offset leaves behind a padded border: less than one step of the grid.

Which channels, and how often: copies that take most noise from the model's outputs for their price. A tensor's grid was seen
to leave so much noise there, and the gradients say what part of it each channel's rounding has. The price is the share that
copies add to the network's multiplications and to its weights, what is of b bits counts b / 8 of that; they are made as long
as they take a larger share of the noise. They come by as many as leave the channels a multiple of 16, or of the power of 2 that
they are one of: onnxruntime's integer kernels (1.32) take 16 channels at a time and the rest one by one, 33 channels of
a depthwise layer twice as long as 32 or 48.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from onnx_lwdf.activations.taps import Feed, Samples, tensor_shapes
from onnx_lwdf.channels.surgery import correct_shapes, set_groups
from onnx_lwdf.gradients import Sensitivities, strengths
from onnx_lwdf.graph import Graph, names_sizes, operator
from onnx_lwdf.layers import Layer, bias_of, committed, is_depthwise, output_axis, set_bias, shape_of
from onnx_lwdf.precondition.channels import ChannelGroup
from onnx_lwdf.ranges import F64, ActivationGrid
from onnx_lwdf.sites import behind_activation, clip_bounds
from onnx_lwdf.statistics import Statistics

MOST_COPIES = 4  # of one channel
AT_A_TIME = 16  # channels that an integer kernel works on
MOST_ADDED = 0.1  # to the network's multiplications and weights, both shares together, where all are of 8 bits

Indices = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Path:
    """A set of channels from the layer that makes them, through depthwise layers, to those that mix them.

    Several layers make them where they, or those that mix them, share a weight.
    """

    groups: tuple[ChannelGroup, ...]
    writers: tuple[Layer, ...]  # those that make the channels, and the depthwise ones
    readers: tuple[Layer, ...]  # all others

    @property
    def channels(self) -> int:
        return self.groups[0].channels


@dataclass(frozen=True, slots=True)
class Copied:
    """What the graph, edited in place, now has."""

    layers: Sequence[Layer]
    samples: Samples
    statistics: Statistics
    notes: Mapping[str, str]  # layer name -> how many channels were copied


def copy_channels(
    graph: Graph,
    layers: Sequence[Layer],
    groups: Sequence[ChannelGroup],
    grids: Mapping[str, ActivationGrid],
    samples: Samples,
    statistics: Statistics,
    gradients: Sensitivities,
    feed: Feed,
    noises: Mapping[str, float] = MappingProxyType({}),
) -> Copied:
    """Copy the channels for which that pays. `feed`: one that the model runs on; `noises`: of tensors, where they were seen."""
    paths = [
        path
        for path in find_paths(graph, groups, grids)
        if all(samples.moments[layer.name].blocks == 1 for layer in path.readers)
    ]
    noise = {
        name: _noise(samples.values[name], grids[name], gradients[name], noises.get(name))
        for name in grids
        if name in gradients
    }
    made = [_made(graph, path) for path in paths]
    paths = [path for path, names in zip(paths, made, strict=True) if all(name in noise for name in names)]
    if not paths:
        return Copied(layers, samples, statistics, {})
    found = [np.sum([noise[name] for name in _made(graph, path)], axis=0) for path in paths]
    by_layer = shares(graph, layers, feed)
    prices = [_price(graph, path, by_layer, grids) for path in paths]
    counts = choose(found, prices, sum(float(one.sum()) for one in noise.values()))
    notes: dict[str, str] = {}
    for path, count in zip(paths, counts, strict=True):
        if (count > 1).any():
            samples, statistics = _copy(graph, path, count, grids, samples, statistics)
            first = path.writers[0]
            notes[first.name] = (
                f"{int((count > 1).sum())} of {path.channels} channels copied, {int(count.sum())} in all"
            )
    return Copied(committed(graph, layers), samples, statistics, notes)


def find_paths(graph: Graph, groups: Sequence[ChannelGroup], grids: Mapping[str, ActivationGrid]) -> list[Path]:
    """Every path whose writers have a bias and put out, behind their activation, a tensor with a grid."""
    usable = [group for group in groups if group.producers and group.plain and not group.joined]
    covered: list[ChannelGroup] = []
    paths = []
    for group in usable:
        if any(layer.groups == 1 for layer in group.producers) and not any(group is one for one in covered):
            reached = _reached(graph, group, usable)
            covered += reached
            paths.append(_path(graph, reached, grids))
    return [path for path in paths if path is not None]


def _reached(graph: Graph, first: ChannelGroup, usable: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """The group, and all that depthwise layers make of its channels or make them of."""
    writes = {layer.name: group for group in usable for layer in group.producers}
    reads = {layer.name: group for group in usable for layer in group.consumers}
    found, waiting = [first], [first]
    while waiting:
        group = waiting.pop()
        ahead = [writes.get(layer.name) for layer in group.consumers if is_depthwise(graph, layer)]
        behind = [reads.get(layer.name) for layer in group.producers if is_depthwise(graph, layer)]
        for other in (*ahead, *behind):
            if other is not None and not any(other is one for one in found):
                found.append(other)
                waiting.append(other)
    return found


def _path(graph: Graph, groups: Sequence[ChannelGroup], grids: Mapping[str, ActivationGrid]) -> Path | None:
    """The path of these groups, None where something touches them that cannot follow."""
    if len({group.channels for group in groups}) > 1:
        return None
    writers = [layer for group in groups for layer in group.producers]
    readers = [layer for group in groups for layer in group.consumers if not is_depthwise(graph, layer)]
    read = {layer.name for group in groups for layer in group.consumers if is_depthwise(graph, layer)}
    written = {layer.name for layer in writers if layer.groups > 1}
    if read != written:  # a depthwise layer of which one side is elsewhere
        return None
    if any(layer.groups > 1 or layer.op == "ConvTranspose" for layer in readers):
        return None
    if any(layer.bias is None or behind_activation(graph, layer.output) not in grids for layer in writers):
        return None
    makers = [graph.producer[name] for group in groups for name in group.tensors]
    if any(operator(node) == "Mul" or names_sizes(node) for node in makers):
        return None  # excited by factors of as many channels as there were, or with a number of them
    return Path(tuple(groups), tuple(writers), tuple(readers))


def _made(graph: Graph, path: Path) -> list[str]:
    """The tensors of the path that have a grid of their own."""
    return [behind_activation(graph, layer.output) for layer in path.writers]


def _noise(values: F32, grid: ActivationGrid, gradient: F64, seen: float | None) -> F64:
    """[channels]: what each channel's rounding adds to the outputs, its mean left out: biases take that up.

    What is cut off is no part of it, for copies do not mend that. All channels together leave what was seen, where it was.
    """
    if len(values) != len(gradient):
        return np.zeros(0)
    exact = np.clip(
        values.astype(np.float64), -grid.zero_point * grid.scale, (grid.levels - grid.zero_point) * grid.scale
    )
    noise = np.asarray((grid.quantize(exact) - exact).var(1) * strengths(gradient))
    total = float(noise.sum())
    return noise if seen is None or total <= 0 else noise * (seen / total)


def _price(graph: Graph, path: Path, by_layer: Mapping[str, float], grids: Mapping[str, ActivationGrid]) -> float:
    """Of one more channel, as a share of a network of 8 bits; `by_layer` are the shares of whole layers."""
    share = sum(by_layer[layer.name] for layer in (*path.writers, *path.readers)) / path.channels
    return share * max(grids[name].bits for name in _made(graph, path)) / 8


def choose(noise: Sequence[F64], prices: Sequence[float], total: float) -> list[Indices]:
    """How often each channel is computed, [channels] of each path: greedy by noise per price.

    noise: [channels] of each path; prices: of one more channel, as a share of the network; total: noise of the network.
    """
    counts = [np.ones(len(one), np.int64) for one in noise]
    orders = [_order(one) for one in noise]
    left = MOST_ADDED
    waiting = [
        (-gains[0] / price, path, 0)
        for path, ((_, gains), price) in enumerate(zip(orders, prices, strict=True))
        if len(gains)
    ]
    heapq.heapify(waiting)
    while waiting:
        negative, path, place = heapq.heappop(waiting)
        channels, gains = orders[path]
        price = prices[path] * channels.shape[1]
        if -negative <= total:
            break
        if price <= left:
            left -= price
            np.add.at(counts[path], channels[place], 1)
            if place + 1 < len(gains):
                heapq.heappush(waiting, (-gains[place + 1] / prices[path], path, place + 1))
    return counts


def _order(noise: F64) -> tuple[Indices, F64]:
    """The copies of a path in turn, as many at a time as a kernel likes.

    Answers their channels, [times, channels at a time], and the noise that one of them takes in the mean, [times].
    """
    size = math.gcd(len(noise), AT_A_TIME)
    k = np.arange(1, MOST_COPIES)
    gains = (noise[:, None] * (1 / k**2 - 1 / (k + 1) ** 2)).ravel()  # of a second copy, a third, a fourth
    order = np.argsort(-gains, kind="stable").reshape(-1, size)
    return order // len(k), gains[order].mean(1)


def shares(graph: Graph, layers: Sequence[Layer], feed: Feed) -> dict[str, float]:
    """Of every layer: its share of the multiplications for one sample, and of the weights, together."""
    shapes = tensor_shapes(graph.snapshot(), [layer.output for layer in layers], feed)
    weights = {layer.name: math.prod(shape_of(graph, layer)) for layer in layers}
    work = {}
    for layer in layers:
        groups, out, _ = shape_of(graph, layer)
        work[layer.name] = weights[layer.name] * math.prod(shapes[layer.output][1:]) / (groups * out)
    every = sum(work.values()), sum(weights.values())
    return {name: work[name] / every[0] + weights[name] / every[1] for name in work}


def _copy(
    graph: Graph,
    path: Path,
    counts: Indices,
    grids: Mapping[str, ActivationGrid],
    samples: Samples,
    statistics: Statistics,
) -> tuple[Samples, Statistics]:
    """Write the copies, behind the channels that were there, into weights, biases, samples and statistics."""
    order = np.concatenate([np.arange(len(counts)), *(np.flatnonzero(counts > k) for k in range(1, counts.max()))])
    share = 1 / counts[order]
    place = np.concatenate([np.full(np.count_nonzero(counts > k), k) for k in range(counts.max())])
    fraction = (place - (counts[order] - 1) / 2) * share  # of a step
    tensors = {name for group in path.groups for name in group.tensors}
    values = {name: value[order] if name in tensors else value for name, value in samples.values.items()}
    moments = dict(samples.moments)
    for layer in path.writers:
        made = behind_activation(graph, layer.output)
        offset = fraction * grids[made].scale
        bias = bias_of(graph, layer)[order] + offset
        _take(graph, layer, order, output_axis(layer))
        set_bias(graph, layer, bias)
        if made in values:
            values[made] = _moved(values[made], offset, clip_bounds(graph, graph.producer[made]) or (None, None))
        if layer.groups > 1:
            set_groups(layer, len(order))
            moments[layer.name] = moments[layer.name].of(order)
    for layer in path.readers:
        _take(graph, layer, order, 1 - output_axis(layer), share)
        channels = len(counts)
        columns = (np.arange(layer.kernel_size)[:, None] * channels + order).ravel()
        moments[layer.name] = moments[layer.name].inputs(columns)
    correct_shapes(graph, dict.fromkeys(tensors, len(order)))
    known = {name: value.of(order) if name in tensors else value for name, value in statistics.items()}
    return replace(samples, moments=moments, values=values), known


def _moved(values: F32, offset: F64, bounds: tuple[float | None, float | None]) -> F32:
    """Values [channels, values] behind an activation of these bounds, with its input moved [channels].

    What stands at a bound is taken to come from far beyond it.
    """
    low, high = (-np.inf if bounds[0] is None else bounds[0]), (np.inf if bounds[1] is None else bounds[1])
    moved = np.clip(values + offset[:, None], low, high).astype(np.float32)
    return np.where((values > low) & (values < high), moved, values)


def _take(graph: Graph, layer: Layer, order: Indices, axis: int, factor: F64 | None = None) -> None:
    """These slices of the stored weight along an axis, each times its factor."""
    value = graph.constant(layer.weight)
    assert value is not None, layer.name
    taken = np.take(value, order, axis)
    if factor is not None:
        shape = [1] * value.ndim
        shape[axis] = len(order)
        taken = (taken * factor.reshape(shape)).astype(value.dtype)
    graph.set_input(layer.node, 1, taken, layer.weight)
