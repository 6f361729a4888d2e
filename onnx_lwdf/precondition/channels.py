"""Groups of tensors whose channels can be transformed together without changing the network's function.

A layer's output channels may be multiplied by s > 0 and the next layer's input channels by 1/s wherever everything in
between is positively homogeneous and acts channel by channel (Relu, pools, Add). Where it is linear (nothing but Add,
average pools and interpolation), any invertible matrix may stand in the place of s. Residual chains share one transform.
Behind a Clip(0, c) a channel may be multiplied too, by as much as leaves it below c: then the Clip does not touch it.

A gate (h-swish, SiLU) ends a group, and another begins behind it: there, s is multiplied in front of the gate and behind it.
Where a Mul joins a tensor with what was computed from it (squeeze and excitation), its channels may still be multiplied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from onnx_lwdf.gates import Gate, find_gates
from onnx_lwdf.graph import Graph, attribute
from onnx_lwdf.layers import Layer, input_channels, output_channels
from onnx_lwdf.sites import ahead, clip_bounds

LINEAR = ("Add", "AveragePool", "GlobalAveragePool", "Flatten", "Resize", "Upsample")
HOMOGENEOUS = (*LINEAR, "Relu", "LeakyRelu", "MaxPool")


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Tensors with one set of channels, the layers that write and those that read them."""

    tensors: tuple[str, ...]
    producers: tuple[Layer, ...]
    consumers: tuple[Layer, ...]
    channels: int
    linear: bool  # nothing but linear operators between producers and consumers
    ceiling: float | None = None  # c of the Clip(0, c) behind the one producer
    written: tuple[Gate, ...] = ()  # gates that put out one of the tensors
    read: tuple[Gate, ...] = ()  # gates that read one


def find_groups(graph: Graph, layers: Sequence[Layer]) -> list[ChannelGroup]:
    """All groups, in graph order, that are written and read by these layers and touched by nothing else."""
    gates = find_gates(graph, layers)
    members = _connected(graph, layers, gates)
    found = (_group(graph, layers, gates, tensors) for tensors in members)
    return [group for group in found if group is not None]


def _connected(graph: Graph, layers: Sequence[Layer], gates: Sequence[Gate]) -> list[list[str]]:
    """Tensors joined by the operators above, starting from the outputs of layers."""
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    within = {id(node) for gate in gates for node in gate.nodes}
    for node in graph.nodes:
        if id(node) in within:
            continue
        if node.op_type in HOMOGENEOUS or _ceiling(graph, node) is not None:
            for name in node.input[:2] if node.op_type == "Add" else node.input[:1]:
                root[find(name)] = find(node.output[0])
        elif (signal := excited(graph, node)) is not None:
            root[find(signal)] = find(node.output[0])
    for name in (*(layer.output for layer in layers), *(gate.output for gate in gates)):
        find(name)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in root:
        groups[find(name)].append(name)
    place = {name: i for i, node in enumerate(graph.nodes) for name in node.output}
    return [sorted(group, key=lambda name: place.get(name, -1)) for group in groups.values()]


def _group(graph: Graph, layers: Sequence[Layer], gates: Sequence[Gate], tensors: list[str]) -> ChannelGroup | None:
    """The group of these tensors, None where something else writes or reads one of them."""
    inside = set(tensors)
    writers = {id(graph.producer[layer.output]): layer for layer in layers if layer.output in inside}
    readers = {id(layer.node): layer for layer in layers if layer.input in inside}
    written = tuple(gate for gate in gates if gate.output in inside)
    read = tuple(gate for gate in gates if gate.input in inside)
    ends, starts = {gate.output for gate in written}, {gate.input for gate in read}
    operators: set[str] = set()
    ceilings: list[float] = []
    for name in tensors:
        node = graph.producer.get(name)
        if node is None or name in graph.outputs or name in graph.captured or not graph.consumers[name]:
            return None
        if id(node) not in writers and name not in ends:
            ceiling = _ceiling(graph, node)
            if ceiling is not None:
                ceilings.append(ceiling)
            elif not _scales(graph, node, inside):
                return None
            operators.add(node.op_type)
        outside = (reader for reader in graph.consumers[name] if reader.output[0] not in inside)
        if name not in starts and any(id(reader) not in readers for reader in outside):
            return None
    producers, consumers = tuple(writers.values()), tuple(readers.values())
    sizes = {output_channels(graph, layer) for layer in producers} | {_input_channels(graph, c) for c in consumers}
    if not (producers or written) or not (consumers or read) or len(sizes) != 1:
        return None
    if any(layer.op == "MatMul" for layer in producers):
        return None
    gated = bool(written or read)
    if gated and len({gate.axes for gate in (*written, *read)} | _axes(consumers, operators)) > 1:
        return None
    if ceilings and (gated or not (len(ceilings) == len(producers) == 1 and _clipped(graph, producers[0]))):
        return None
    ceiling = ceilings[0] if ceilings else None
    linear = operators <= set(LINEAR) and not gated
    return ChannelGroup(tuple(tensors), producers, consumers, sizes.pop(), linear, ceiling, written, read)


def _scales(graph: Graph, node: onnx.NodeProto, inside: set[str]) -> bool:
    """Whether the node puts out s times as much where those of its inputs that are inside are multiplied by s."""
    if (signal := excited(graph, node)) is not None:
        return [name for name in node.input if name in inside] == [signal]
    return node.op_type in HOMOGENEOUS and _channelwise(graph, node)


def excited(graph: Graph, node: onnx.NodeProto) -> str | None:
    """The tensor that a Mul multiplies by what was computed from it, None of any other node."""
    if node.op_type != "Mul" or any(graph.constant(name) is not None for name in node.input):
        return None
    for signal, factor in (node.input, reversed(node.input)):
        if signal != factor and signal in ahead(graph, [factor]):
            return str(signal)
    return None


def _axes(consumers: Sequence[Layer], operators: set[str]) -> set[int]:
    """How many axes follow the channels of what these layers read; those behind a Flatten have lost theirs."""
    flat = [layer for layer in consumers if layer.window is None and "Flatten" not in operators]
    return {len(layer.window.kernel) for layer in consumers if layer.window} | ({0} if flat else set())


def _clipped(graph: Graph, layer: Layer) -> bool:
    reader = graph.sole_consumer(layer.output)
    return reader is not None and reader.op_type == "Clip"


def _ceiling(graph: Graph, node: onnx.NodeProto) -> float | None:
    """The c of a Clip(0, c), None of any other node."""
    low, high = clip_bounds(graph, node) or (None, None)
    return high if node.op_type == "Clip" and low == 0 and high is not None and high > 0 else None


def _channelwise(graph: Graph, node: onnx.NodeProto) -> bool:
    """Add: both sides vary with the data. Flatten: only of a pooled tensor, whose channels are its columns. Resize: what it
    puts in from outside of a cropped image is no multiple of anything.
    """
    if node.op_type == "Add":
        return all(graph.constant(name) is None for name in node.input)
    if node.op_type == "Flatten":
        source = graph.producer.get(node.input[0])
        return source is not None and source.op_type == "GlobalAveragePool"
    if node.op_type == "Resize":
        return bool(attribute(node, "coordinate_transformation_mode") != "tf_crop_and_resize")
    return True


def _input_channels(graph: Graph, layer: Layer) -> int:
    if layer.op == "ConvTranspose":
        return -1  # its input channels run along another axis; left out
    return input_channels(graph, layer)
