"""Groups of units that live in the same tensors: they have the same writers and readers, so they can be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lwdf.channels.ties import Ints, Ties
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Layer, is_depthwise, output_channels, shape_of


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Units of which some may go."""

    units: Ints  # [units]
    writers: tuple[Layer, ...]  # full layers whose output channels they are
    passed: tuple[Layer, ...]  # depthwise layers that they run through
    readers: tuple[Layer, ...]  # full layers whose input channels they are
    columns: Mapping[str, Ints]  # reader's name -> [units, columns of each] of its moments
    weights: int  # that go with one unit, in all these layers
    reason: str  # why all stay; empty where they need not


def find_groups(graph: Graph, layers: Sequence[Layer], ties: Ties) -> list[Group]:
    """Every group that a layer writes, in the order of the graph."""
    written = np.zeros(1 + max((int(u.max()) for u in ties.units.values() if u.size), default=0), bool)
    for layer in layers:
        if layer.node.output[0] in ties.units:
            written[ties.units[layer.node.output[0]]] = True
    kinds = _kinds(ties, len(written))
    units = np.flatnonzero(written)
    first = {int(kind): i for i, kind in reversed(list(enumerate(kinds[units])))}
    members = [units[kinds[units] == kind] for kind in sorted(first, key=lambda kind: first[kind])]
    return [_group(graph, layers, ties, group) for group in members]


def _kinds(ties: Ties, count: int) -> Ints:
    """[units]: equal where two units have equally many channels in every tensor; a partition refined by each tensor."""
    kinds = np.zeros(count, np.int64)
    for members in ties.units.values():
        held = np.bincount(members, minlength=count)
        if held.any():
            kinds = np.unique(kinds * (held.max() + 1) + held, return_inverse=True)[1].ravel()
    return kinds


def _group(graph: Graph, layers: Sequence[Layer], ties: Ties, units: Ints) -> Group:
    inside = {id(layer): _held(ties, layer, units) for layer in layers}
    passed = [layer for layer in layers if is_depthwise(graph, layer) and any(inside[id(layer)])]
    full = [layer for layer in layers if layer.groups == 1]
    writers = [layer for layer in full if inside[id(layer)][1]]
    readers = [layer for layer in full if inside[id(layer)][0]]
    reason = next((ties.reasons[int(unit)] for unit in units if int(unit) in ties.reasons), "")
    if not reason and not readers:
        reason = "no layer reads them that could be re-fitted"
    if not reason and len(units) == 1:
        reason = "the only channel"
    columns = {layer.name: _columns(ties, layer, units) for layer in readers}
    weights = sum(inside[id(layer)][1] * _size(graph, layer) // output_channels(graph, layer) for layer in writers)
    weights += sum(inside[id(layer)][1] * _size(graph, layer) // output_channels(graph, layer) for layer in passed)
    weights += sum(inside[id(layer)][0] * _size(graph, layer) // len(ties.units[layer.input]) for layer in readers)
    return Group(units, tuple(writers), tuple(passed), tuple(readers), columns, weights, reason)


def _held(ties: Ties, layer: Layer, units: Ints) -> tuple[int, int]:
    """Channels of one unit in the layer's input and in its output."""
    names = layer.input, layer.node.output[0]
    read, written = (int((ties.units[name] == units[0]).sum()) if name in ties.units else 0 for name in names)
    return read, written


def _columns(ties: Ties, layer: Layer, units: Ints) -> Ints:
    """[units, columns]: where each unit's channels stand in the layer's moments, which are (kernel position, channel)."""
    members = ties.units[layer.input]
    places = np.flatnonzero(np.isin(members, units))
    sorted_places: Ints = places[np.argsort(members[places], kind="stable")]
    kernel = layer.kernel_size if layer.op == "Conv" else 1
    offsets = np.arange(kernel) * len(members)
    return (sorted_places.reshape(len(units), -1, 1) + offsets).reshape(len(units), -1)


def _size(graph: Graph, layer: Layer) -> int:
    return math.prod(shape_of(graph, layer))
