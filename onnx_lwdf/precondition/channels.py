"""Groups of tensors whose channels can be transformed together without changing the network's function.

A layer's output channels may be multiplied by s > 0 and the next layer's input channels by 1/s wherever everything in
between is positively homogeneous and acts channel by channel (Relu, pools, Add). Where it is linear (nothing but Add,
average pools and interpolation), any invertible matrix may stand in the place of s. Residual chains share one transform.
Behind a Clip(0, c) a channel may be multiplied too, by as much as leaves it below c: then the Clip does not touch it.

A gate (h-swish, SiLU) ends a group, and another begins behind it: there, s is multiplied in front of the gate and behind it.
So does a BatchNormalization that no layer could take up: its parameters take the factors.
Where a Mul joins a tensor with what was computed from it (squeeze and excitation), its channels may still be multiplied.

A Concat lines up channels of its inputs: behind it, and in front of it, tensors hold some of a group's channels each.
Layers that share a weight (sharing.py) read one set of channels and write one, so that they share it still.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lwdf.gates import Gate, find_gates
from onnx_lwdf.graph import Graph, attribute, operator
from onnx_lwdf.layers import Layer, input_channels, output_channels
from onnx_lwdf.precondition.norms import Norm, find_norms
from onnx_lwdf.sharing import linked
from onnx_lwdf.sites import ahead, clip_bounds

LINEAR = ("Add", "AveragePool", "GlobalAveragePool", "Flatten", "Resize", "Upsample")
HOMOGENEOUS = (*LINEAR, "Relu", "LeakyRelu", "MaxPool")
JOINS = ("Add", "Concat", "Mul")
MOST_CHANNELS = 1024  # of a matrix transform: it costs channels^3

Indices = npt.NDArray[np.int64]
Place = Indices | slice
EVERY = slice(None)


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Tensors with channels of one set, the layers that write and those that read them."""

    tensors: tuple[str, ...]
    producers: tuple[Layer, ...]
    consumers: tuple[Layer, ...]
    channels: int
    centred: bool  # nothing but linear operators between those that write and those that read: means may be moved
    ceiling: float | None = None  # c of the Clip(0, c) behind each producer
    written: tuple[Gate, ...] = ()  # gates that put out one of the tensors
    read: tuple[Gate, ...] = ()  # gates that read one
    norms_written: tuple[Norm, ...] = ()  # normalizations that put out one
    norms_read: tuple[Norm, ...] = ()  # normalizations that read one
    places: Mapping[str, Indices] = field(default_factory=dict)  # tensor -> its channels' places, beside a Concat
    joined: bool = False  # some tensors are made of what several producers put out

    @property
    def plain(self) -> bool:
        """Whether layers alone write and read it, all its channels at once."""
        return not (self.written or self.read or self.norms_written or self.norms_read or self.places)

    @property
    def linear(self) -> bool:
        """Whether nothing stands between layers alone but what is linear."""
        return self.centred and self.plain

    @property
    def mixed(self) -> bool:
        """Whether its channels may be mixed, and are not too many."""
        layers = (*self.producers, *self.consumers)
        return self.linear and self.channels <= MOST_CHANNELS and all(layer.groups == 1 for layer in layers)

    def place(self, tensor: str) -> Place:
        """Which of the group's channels the tensor holds, in its order."""
        return self.places.get(tensor, EVERY)

    def numbers(self, tensor: str) -> Indices:
        """The same, counted out, [channels of the tensor]."""
        return np.arange(self.channels)[self.place(tensor)]

    def spread(self, tensor: str, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Values of the tensor's channels, each added to its place among the group's, [channels]."""
        total = np.zeros(self.channels)
        np.add.at(total, self.numbers(tensor), values)
        return total


def find_groups(graph: Graph, layers: Sequence[Layer]) -> list[ChannelGroup]:
    """All groups, in graph order, that are written and read by these layers and touched by nothing else."""
    gates, norms = find_gates(graph, layers), find_norms(graph)
    widths = _widths(graph, layers, gates, norms)
    members = _connected(graph, layers, gates, norms)
    found = (_group(graph, layers, gates, norms, widths, tensors) for tensors in members)
    return [group for group in found if group is not None]


def _connected(graph: Graph, layers: Sequence[Layer], gates: Sequence[Gate], norms: Sequence[Norm]) -> list[list[str]]:
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
        if operator(node) in HOMOGENEOUS or _ceiling(graph, node) is not None:
            for name in node.input[:2] if operator(node) == "Add" else node.input[:1]:
                root[find(name)] = find(node.output[0])
        elif _joins_channels(graph, node):
            for name in node.input:
                root[find(name)] = find(node.output[0])
        elif (signal := excited(graph, node)) is not None:
            root[find(signal)] = find(node.output[0])
    for first, layer in linked(graph, layers):
        root[find(layer.input)] = find(first.input)
        root[find(layer.output)] = find(first.output)
    for name in (made.output for kind in (layers, gates, norms) for made in kind):
        find(name)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in root:
        groups[find(name)].append(name)
    place = {name: i for i, node in enumerate(graph.nodes) for name in node.output}
    return [sorted(group, key=lambda name: place.get(name, -1)) for group in groups.values()]


def _group(
    graph: Graph,
    layers: Sequence[Layer],
    gates: Sequence[Gate],
    norms: Sequence[Norm],
    widths: Mapping[str, int],
    tensors: list[str],
) -> ChannelGroup | None:
    """The group of these tensors, None where something else writes or reads one of them."""
    inside = set(tensors)
    writers = {id(graph.producer[layer.output]): layer for layer in layers if layer.output in inside}
    readers = {id(layer.node): layer for layer in layers if layer.input in inside}
    written = tuple(gate for gate in gates if gate.output in inside)
    read = tuple(gate for gate in gates if gate.input in inside)
    norms_written = tuple(norm for norm in norms if norm.output in inside)
    norms_read = tuple(norm for norm in norms if norm.input in inside)
    ends = {maker.output for kind in (tuple(writers.values()), written, norms_written) for maker in kind}
    starts = {gate.input for gate in read}
    taken = {*readers, *(id(norm.node) for norm in norms_read)}
    operators: set[str] = set()
    ceilings: list[float] = []
    for name in tensors:
        node = graph.producer.get(name)
        if node is None or name in graph.outputs or name in graph.captured or not graph.consumers[name]:
            return None
        if name not in ends:
            ceiling = _ceiling(graph, node)
            if ceiling is not None:
                ceilings.append(ceiling)
            elif not _scales(graph, node, inside):
                return None
            operators.add(operator(node))
        outside = (reader for reader in graph.consumers[name] if reader.output[0] not in inside)
        if name not in starts and any(id(reader) not in taken for reader in outside):
            return None
    producers, consumers = tuple(writers.values()), tuple(readers.values())
    if any(layer.op == "MatMul" and not _is_flat(graph, layer.input, producers) for layer in consumers):
        return None  # it reads along the last axis, whatever that is
    if not (producers or written or norms_written) or not (consumers or read or norms_read):
        return None
    sizes = {
        **{layer.output: output_channels(graph, layer) for layer in producers},
        **{layer.input: _input_channels(graph, layer) for layer in consumers},
        **{norm.output: norm.channels for norm in norms_written},
        **{norm.input: norm.channels for norm in norms_read},
    }
    places: dict[str, Indices] = {}
    if "Concat" in operators:
        places = _places(graph, tensors, {**widths, **sizes}, ends)
        channels = 1 + max((int(place.max()) for place in places.values()), default=-1)
    elif len(set(sizes.values())) == 1:
        channels = next(iter(sizes.values()))
    else:
        channels = 0
    if channels < 1:
        return None
    if any(layer.op == "MatMul" for layer in producers):
        return None
    gated = bool(written or read)
    if gated and len({gate.axes for gate in (*written, *read)} | _axes(consumers, operators)) > 1:
        return None
    if (norms_written or norms_read) and (gated or ceilings):
        return None
    joined = len(producers) > 1 and not operators.isdisjoint(JOINS)
    if ceilings and (gated or joined or len(set(ceilings)) > 1 or len(ceilings) != len(producers)):
        return None
    if ceilings and not all(_clipped(graph, layer) for layer in producers):
        return None
    ceiling = ceilings[0] if ceilings else None
    centred = operators <= {*LINEAR, "Concat"} and not gated
    beside = (written, read, norms_written, norms_read)
    return ChannelGroup(tuple(tensors), producers, consumers, channels, centred, ceiling, *beside, places, joined)


def _widths(graph: Graph, layers: Sequence[Layer], gates: Sequence[Gate], norms: Sequence[Norm]) -> dict[str, int]:
    """Tensor -> how many channels it has, as far as layers, normalizations and what stands between them tell."""
    found = {layer.output: output_channels(graph, layer) for layer in layers}
    found |= {norm.output: norm.channels for norm in norms}
    behind = {gate.output: gate.input for gate in gates}
    for node in graph.nodes:
        name = node.output[0] if node.output else ""
        sources = [behind[name]] if name in behind else node.input
        known = [found[source] for source in sources if source in found]
        if name in found or not known:
            continue
        if _joins_channels(graph, node):
            if len(known) == len(sources):
                found[name] = sum(known)
        elif name in behind or operator(node) in (*HOMOGENEOUS, "Clip", "Mul"):
            found[name] = max(known)  # what is narrower is broadcast
    return found


def _joins_channels(graph: Graph, node: onnx.NodeProto) -> bool:
    """A Concat along the channels, of tensors that vary with the data."""
    if operator(node) != "Concat" or attribute(node, "axis", None) != 1:
        return False
    return all(graph.constant(name) is None for name in node.input)


def _places(graph: Graph, tensors: Sequence[str], widths: Mapping[str, int], ends: Set[str]) -> dict[str, Indices]:
    """Tensor -> the places of its channels: those that an operator makes of each other share one. Empty where they do not
    fit. `ends`: tensors that are made of none of the others, channel by channel.
    """
    if any(widths.get(name, 0) < 1 for name in tensors):
        return {}
    starts = dict(zip(tensors, np.cumsum([0, *(widths[name] for name in tensors)]), strict=False))
    pairs: list[tuple[int, int, int]] = []  # starts of two runs of channels that are the same, and their length
    for name in tensors:
        node, start = graph.producer[name], int(starts[name])
        for source in (source for source in node.input if source in starts and name not in ends):
            if operator(node) != "Concat" and widths[source] != widths[name]:
                return {}
            pairs.append((int(starts[source]), start, widths[source]))
            start += widths[source] if operator(node) == "Concat" else 0
    labels = np.arange(sum(widths[name] for name in tensors))
    while True:  # each channel takes the least label of those that it is the same as
        before = labels.copy()
        for first, second, count in (*pairs, *reversed(pairs)):
            runs = slice(first, first + count), slice(second, second + count)
            labels[runs[0]] = labels[runs[1]] = np.minimum(labels[runs[0]], labels[runs[1]])
        if np.array_equal(before, labels):
            break
    numbers = np.unique(labels, return_inverse=True)[1]
    return {name: numbers[start : start + widths[name]] for name, start in starts.items()}


def _scales(graph: Graph, node: onnx.NodeProto, inside: set[str]) -> bool:
    """Whether the node puts out s times as much where those of its inputs that are inside are multiplied by s."""
    if (signal := excited(graph, node)) is not None:
        return [name for name in node.input if name in inside] == [signal]
    if _joins_channels(graph, node):
        return inside.issuperset(node.input)
    return operator(node) in HOMOGENEOUS and _channelwise(graph, node)


def excited(graph: Graph, node: onnx.NodeProto) -> str | None:
    """The tensor that a Mul multiplies by what was computed from it, None of any other node."""
    if operator(node) != "Mul" or any(graph.constant(name) is not None for name in node.input):
        return None
    for signal, factor in (node.input, reversed(node.input)):
        if signal != factor and signal in ahead(graph, [factor]):
            return str(signal)
    return None


def _axes(consumers: Sequence[Layer], operators: set[str]) -> set[int]:
    """How many axes follow the channels of what these layers read; those behind a Flatten have lost theirs."""
    flat = [layer for layer in consumers if layer.window is None and "Flatten" not in operators]
    return {len(layer.window.kernel) for layer in consumers if layer.window} | ({0} if flat else set())


def _is_flat(graph: Graph, tensor: str, producers: Sequence[Layer]) -> bool:
    """Whether the channels are the tensor's last axis: it comes through a Flatten, or from a layer that puts out rows."""
    made_by = {layer.output: layer for layer in producers}
    while tensor not in made_by:
        node = graph.producer.get(tensor)
        if node is None or operator(node) == "Flatten":
            return node is not None
        tensor = node.input[0]
    return made_by[tensor].window is None


def _clipped(graph: Graph, layer: Layer) -> bool:
    reader = graph.sole_consumer(layer.output)
    return reader is not None and operator(reader) == "Clip"


def _ceiling(graph: Graph, node: onnx.NodeProto) -> float | None:
    """The c of a Clip(0, c), None of any other node."""
    low, high = clip_bounds(graph, node) or (None, None)
    return high if operator(node) == "Clip" and low == 0 and high is not None and high > 0 else None


def _channelwise(graph: Graph, node: onnx.NodeProto) -> bool:
    """Add: both sides vary with the data. Flatten: only of a pooled tensor, whose channels are its columns. Resize: what it
    puts in from outside of a cropped image is no multiple of anything.
    """
    if operator(node) == "Add":
        return all(graph.constant(name) is None for name in node.input)
    if operator(node) == "Flatten":
        source = graph.producer.get(node.input[0])
        return source is not None and operator(source) == "GlobalAveragePool"
    if operator(node) == "Resize":
        return bool(attribute(node, "coordinate_transformation_mode") != "tf_crop_and_resize")
    return True


def _input_channels(graph: Graph, layer: Layer) -> int:
    if layer.op == "ConvTranspose":
        return -1  # its input channels run along another axis; left out
    return input_channels(graph, layer)
