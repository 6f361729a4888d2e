"""Channels in an order in which few neighbours of a filter ask for codes that integer kernels could not add.

Neighbouring codes of a filter must satisfy |code[2k] + code[2k + 1]| <= limit (grid.py), and where two large weights of one
sign meet, they are clipped or the whole filter's scale grows. Which channels are neighbours is free: the function of a network
stays if whatever writes, passes on and reads a set of channels takes them in another order. With codes w / s, s the scale that
just holds the largest weight of a filter, two channels i and j cost

    sum over filters of  s^2 max(0, |w_i / s + w_j / s| - limit)^2  v_i v_j / (v_i + v_j)

as neighbours: the least error, by the variances v of the channels, of a pair of codes whose sum is at the limit. Pairs are
chosen greedily, the channel that may cost most first, then two pairs swap members for as long as that costs less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_lwdf.activations.moments import Indices, Moments
from onnx_lwdf.activations.taps import Feed, Samples
from onnx_lwdf.channels.groups import Group, find_groups
from onnx_lwdf.channels.surgery import take_constants
from onnx_lwdf.channels.ties import Ties, ties_of
from onnx_lwdf.graph import Graph
from onnx_lwdf.grid import LARGEST_CODE
from onnx_lwdf.layers import Layer, bias_of, blocks, change_weight, committed, set_bias, set_weight, shape_of, weight_of
from onnx_lwdf.ranges import F64
from onnx_lwdf.statistics import Statistics

MOST_CHANNELS = 2048  # of one set: costs are a matrix of them

Slots = Mapping[str, Indices]  # tensor -> [units, channels of each]


def order_channels(
    graph: Graph,
    layers: Sequence[Layer],
    limits: Mapping[str, int],
    samples: Samples,
    statistics: Statistics,
    feed: Feed,
) -> tuple[Sequence[Layer], Samples, Statistics]:
    """The layers with what those with a pair limit (`limits`, by name) read in another order; samples and statistics of it.

    The graph is edited in place. `feed`: one that the model runs on.
    """
    if not limits:
        return layers, samples, statistics
    ties = ties_of(graph, layers, feed, MOST_CHANNELS)
    orders: dict[str, Indices] = {}
    for group in find_groups(graph, layers, ties):
        readers = [layer for layer in group.readers if layer.name in limits and _in_pairs(graph, layer, group)]
        slots = slots_of(ties, group.units)
        if not readers or not is_free(group, slots, ties, samples):
            continue
        costs = np.sum([_costs_of(graph, layer, group, limits[layer.name], samples) for layer in readers], axis=0)
        orders = placed(orders, slots, ties, pair_up(costs))
    samples, statistics = rearranged(graph, layers, ties, orders, samples, statistics)
    return committed(graph, layers), samples, statistics


def is_free(group: Group, slots: Slots, ties: Ties, samples: Samples) -> bool:
    """Whether there is an order to choose, and nothing asks for the one that is there."""
    if len(group.units) <= 2 or any(int(unit) in ties.reasons for unit in group.units):
        return False
    side_by_side = (places == places[:, :1] + np.arange(places.shape[1]) for places in slots.values())
    return all(samples.moments[layer.name].blocks == 1 for layer in group.readers) and all(map(np.all, side_by_side))


def placed(orders: Mapping[str, Indices], slots: Slots, ties: Ties, order: Indices) -> dict[str, Indices]:
    """The orders (tensor -> [channels], which of the old ones stands there) with a group's units in this order, [units]."""
    changed = dict(orders)
    for name, places in slots.items():
        changed[name] = changed.get(name, np.arange(len(ties.units[name]))).copy()
        changed[name][places] = changed[name][places[order]]
    return changed


def slots_of(ties: Ties, units: Indices) -> Slots:
    """Where each unit's channels stand."""
    found = {}
    for name, members in ties.units.items():
        places = np.flatnonzero(np.isin(members, units))
        if places.size:
            found[name] = places[np.argsort(members[places], kind="stable")].reshape(len(units), -1)
    return found


def _in_pairs(graph: Graph, layer: Layer, group: Group) -> bool:
    """Whether the group's channels are a run of the layer's, one column each at a kernel position, paired among themselves."""
    columns = group.columns[layer.name]
    _, _, inputs = shape_of(graph, layer)
    first, channels = columns[:, 0], inputs // layer.kernel_size
    runs = bool((first == first[0] + np.arange(len(first))).all()) and first[0] % 2 == 0
    return runs and columns.shape[1] == layer.kernel_size and (channels % 2 == 0 or layer.kernel_size == 1)


def _costs_of(graph: Graph, layer: Layer, group: Group, limit: int, samples: Samples) -> F64:
    """[units, units]: what two of the group's channels cost the layer as neighbours."""
    columns, moments = group.columns[layer.name], samples.moments[layer.name]
    variance = np.maximum(np.einsum("gii->gi", moments.hessian).ravel() - moments.mean.ravel() ** 2, 0.0)
    total = np.zeros((len(columns), len(columns)))
    for rows in blocks(graph, layer):
        weight = weight_of(graph, layer, rows)[0]
        scale = np.abs(weight).max(1) / LARGEST_CODE
        for places in columns.T:  # at one kernel position
            total += pair_costs(weight[:, places], scale, variance[places], limit)
    return total


def pair_costs(weight: F64, scale: F64, variance: F64, limit: int) -> F64:
    """The formula above, [channels, channels]; weight [filters, channels], scale [filters], variance [channels]."""
    total = np.zeros((weight.shape[1], weight.shape[1]), np.float32)  # which halves the time, and orders need no more
    unit = np.exp2(np.floor(np.log2(scale.max(initial=0) or 1.0)))  # float32 does not hold the square of every scale
    for row, step in zip(weight, scale, strict=True):
        if step == 0:
            continue
        codes = (row / step).astype(np.float32)
        large = np.flatnonzero(np.abs(codes) > limit / 2)  # one of the two is
        over = codes[large, None] + codes
        np.abs(over, out=over)
        over -= np.float32(limit)
        np.maximum(over, 0, out=over)
        over *= over
        over *= np.float32((step / unit) ** 2)
        over[:, large] /= 2  # met from both sides
        total[large] += over
    sums = variance[:, None] + variance
    shared = variance[:, None] * variance / np.where(sums > 0, sums, 1.0)
    return np.asarray((total + total.T) * shared * unit**2)


def pair_up(costs: F64) -> Indices:
    """An order of channels, [channels], whose neighbours 2k and 2k + 1 cost little together; costs [channels, channels]."""
    costs = costs.copy()
    np.fill_diagonal(costs, np.inf)
    burden = np.where(np.isfinite(costs), costs, 0.0).sum(1)
    free = np.ones(len(costs), bool)
    pairs: list[tuple[int, int]] = []
    last: list[int] = []
    for channel in np.argsort(-burden, kind="stable"):
        if not free[channel]:
            continue
        free[channel] = False
        if not free.any():
            last = [int(channel)]
            break
        offers = np.where(free, costs[channel], np.inf)
        cheapest = np.flatnonzero(offers == offers.min())
        partner = cheapest[np.argmax(burden[cheapest])]  # the one that is hardest to place elsewhere
        free[partner] = False
        pairs.append((int(channel), int(partner)))
    swapped = np.sort(_swapped(costs, np.array(pairs)), axis=1)
    return np.append(swapped[np.argsort(swapped[:, 0])].ravel(), np.array(last, np.int64))


def _swapped(costs: F64, pairs: Indices) -> Indices:
    """Pairs [pairs, 2] after the best swap of members between two of them, again and again while that costs less."""
    pairs = pairs.copy()
    for _ in range(len(costs)):
        first, second = pairs.T
        now = costs[first, second]
        crossed = costs[np.ix_(first, second)]
        gains = (
            now[:, None]
            + now
            - np.stack([costs[np.ix_(first, first)] + costs[np.ix_(second, second)], crossed + crossed.T])
        )
        np.einsum("kpp->kp", gains)[...] = -np.inf  # a pair with itself
        way, one, other = np.unravel_index(int(np.argmax(gains)), gains.shape)
        if gains[way, one, other] <= 1e-9 * now.sum():
            break
        mine, theirs = pairs[one].copy(), pairs[other].copy()
        mine[1], theirs[way] = theirs[way], mine[1]
        pairs[one], pairs[other] = mine, theirs
    return pairs


def rearranged(
    graph: Graph,
    layers: Sequence[Layer],
    ties: Ties,
    orders: Mapping[str, Indices],
    samples: Samples,
    statistics: Statistics,
) -> tuple[Samples, Statistics]:
    """Write the orders into all that holds these tensors."""
    moments = dict(samples.moments)
    for layer in layers:
        read, written = (orders.get(name) for name in (layer.input, layer.node.output[0]))
        if read is None and written is None:
            continue
        moments[layer.name] = _reorder(graph, layer, moments[layer.name], read, written)
        if written is not None and layer.bias is not None:
            set_bias(graph, layer, bias_of(graph, layer)[written])
    take_constants(graph, layers, ties, orders)
    values = {name: value[orders[name]] if name in orders else value for name, value in samples.values.items()}
    known = {name: value.of(orders[name]) if name in orders else value for name, value in statistics.items()}
    return replace(samples, moments=moments, values=values), known


def _reorder(graph: Graph, layer: Layer, moments: Moments, read: Indices | None, written: Indices | None) -> Moments:
    """The layer's moments, its weight written with its channels in these orders."""
    if layer.groups > 1:  # depthwise: of others all channels stay
        assert read is not None, layer.name
        set_weight(graph, layer, weight_of(graph, layer)[read])
        return moments.of(read)
    _, outputs, inputs = shape_of(graph, layer)
    rows = np.arange(outputs) if written is None else written
    channels = np.arange(inputs // layer.kernel_size) if read is None else read
    columns = (np.arange(layer.kernel_size)[:, None] * len(channels) + channels).ravel()
    change_weight(graph, layer, lambda block: weight_of(graph, layer, rows[block])[:, :, columns])
    if read is None:
        return moments
    return moments.inputs(columns if layer.op == "Conv" else read)
