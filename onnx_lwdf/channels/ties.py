"""Which channels of which tensors can only go together, and which must stay.

Every channel (index along axis 1) of every tensor is a vertex. An operator that works channel by channel ties channel c
of its input to channel c of its output; a join ties its operands, a Concat ties at an offset, a depthwise convolution
ties what it reads to what it writes. A full convolution or Gemm ties nothing: it ends one set of channels and begins
another. A connected component is a unit: it goes as a whole or not at all. What an operator outside the table touches
stays, and so does what the model puts out.
Layers that share a weight (sharing.py) are tied where they read and where they write, so that they share it still.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lwdf.activations.taps import Feed, tensor_shapes
from onnx_lwdf.graph import Graph, attribute, axes_of, names_sizes, node_name, operator
from onnx_lwdf.layers import Layer
from onnx_lwdf.sharing import linked

Ints = npt.NDArray[np.int64]
Shapes = Mapping[str, tuple[int, ...]]

CHANNEL_AXIS = 1


@dataclass(frozen=True, slots=True)
class Cut:
    """A constant that has one value per channel of a tensor along an axis and is cut with it."""

    node: onnx.NodeProto
    index: int  # of the node's input
    axis: int
    tensor: str


@dataclass(frozen=True, slots=True)
class Ties:
    """The units of a graph."""

    units: Mapping[str, Ints]  # tensor -> [channels], the unit of each
    reasons: Mapping[int, str]  # unit -> why it stays
    cuts: Sequence[Cut]
    targets: Sequence[tuple[onnx.NodeProto, str]]  # Reshapes that name the number of channels of this output


def ties_of(graph: Graph, layers: Sequence[Layer], feed: Feed, most: float = math.inf) -> Ties:
    """The ties of all tensors of at most so many channels, whose shapes one run tells; the feed is one that the model runs on.

    What wider tensors are tied to stays, for they are not followed.
    """
    made = [name for node in graph.nodes for name in node.output if name and graph.constant(name) is None]
    return tie_channels(graph, layers, tensor_shapes(graph.snapshot(), [*graph.inputs, *made], feed), most)


def tie_channels(graph: Graph, layers: Sequence[Layer], shapes: Shapes, most: float = math.inf) -> Ties:
    """Follow every operator of the graph. `shapes` holds the tensors with channels: [N, C, ...] as they run."""
    walk = _Walk(graph, {id(layer.node): layer for layer in layers}, shapes, most)
    for name in graph.inputs:
        walk.keep(name, "an input of the model")
    for name in graph.outputs:
        walk.keep(name, "an output of the model")
    for name in sorted(graph.captured):
        walk.keep(name, "read inside another node's graph")
    for node in graph.nodes:
        if any(name in walk.first for name in (*node.input, *node.output)):
            rule = RULES.get(operator(node), _refuse)
            if not rule(walk, node):
                _refuse(walk, node)
    for first, layer in linked(graph, layers):
        if _has_channels(walk, first.node) and _has_channels(walk, layer.node):
            walk.tie_tensors(first.input, layer.input)
            walk.tie_tensors(first.node.output[0], layer.node.output[0])
    return walk.ties()


@dataclass(slots=True)
class _Walk:
    """What the rules read and write."""

    graph: Graph
    layers: Mapping[int, Layer]  # by the id of their node
    shapes: Shapes
    most: float  # channels of a tensor that is followed
    first: dict[str, int] = field(default_factory=dict)  # tensor -> vertex of its channel 0
    count: int = 0
    edges: list[tuple[Ints, Ints]] = field(default_factory=list)
    kept: list[tuple[Ints, str]] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    targets: list[tuple[onnx.NodeProto, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, shape in self.shapes.items():
            if len(shape) > CHANNEL_AXIS and shape[CHANNEL_AXIS] <= self.most:
                self.first[name] = self.count
                self.count += shape[CHANNEL_AXIS]

    def channels(self, tensor: str) -> int:
        return self.shapes[tensor][CHANNEL_AXIS]

    def vertices(self, tensor: str) -> Ints:
        return self.first[tensor] + np.arange(self.channels(tensor))

    def tie(self, a: Ints, b: Ints) -> bool:
        self.edges.append((a, b))
        return True

    def tie_tensors(self, first: str, other: str) -> None:
        """Channel by channel, where both are followed."""
        if first in self.first and other in self.first:
            self.tie(self.vertices(first), self.vertices(other))

    def keep(self, tensor: str, reason: str) -> None:
        if tensor in self.first:
            self.kept.append((self.vertices(tensor), reason))

    def fixed(self, node: onnx.NodeProto, start: int = 1) -> bool:
        """Whether the inputs from `start` on are constant or absent."""
        return all(not name or self.graph.constant(name) is not None for name in node.input[start:])

    def ties(self) -> Ties:
        root = _components(self.count, self.edges)
        reasons: dict[int, str] = {}
        for vertices, reason in self.kept:
            for unit in np.unique(root[vertices]):
                reasons.setdefault(int(unit), reason)
        units = {name: root[self.vertices(name)] for name in self.first}
        return Ties(units, reasons, self.cuts, self.targets)


def _components(count: int, edges: Sequence[tuple[Ints, Ints]]) -> Ints:
    """[count]: the smallest vertex of each vertex's component, by propagating minima and following them."""
    root = np.arange(count)
    if not edges:
        return root
    a, b = (np.concatenate(side) for side in zip(*edges, strict=True))
    while True:
        low = np.minimum(root[a], root[b])
        smaller = root.copy()
        for side in (a, b):
            np.minimum.at(smaller, side, low)
            np.minimum.at(smaller, root[side], low)
        smaller = smaller[smaller]
        if np.array_equal(smaller, root):
            return root
        root = smaller


Rule = Callable[[_Walk, onnx.NodeProto], bool]  # False: the rule does not apply, the operator is refused


def _refuse(walk: _Walk, node: onnx.NodeProto) -> bool:
    """An operator whose channels are not understood."""
    for word, names in (("read", node.input), ("written", node.output)):
        for name in names:
            walk.keep(name, f"{word} by {operator(node)} {node_name(node)}")
    return True


def _has_channels(walk: _Walk, node: onnx.NodeProto) -> bool:
    """Whether the channels that a layer reads and writes run along axis 1."""
    layer = walk.layers.get(id(node))
    if layer is None or any(len(walk.shapes.get(name, ())) <= CHANNEL_AXIS for name in (node.input[0], node.output[0])):
        return False
    return layer.window is not None or len(walk.shapes[node.input[0]]) == 2


def _weighted(walk: _Walk, node: onnx.NodeProto) -> bool:
    """Depthwise: each output channel belongs to one input channel. Full: two sets of channels meet."""
    if not _has_channels(walk, node):
        return False
    layer, source, target = walk.layers[id(node)], node.input[0], node.output[0]
    if layer.groups == 1:
        return True
    if source not in walk.first or target not in walk.first:
        return False
    inputs, outputs = walk.channels(source), walk.channels(target)
    if layer.groups == inputs:
        return walk.tie(np.repeat(walk.vertices(source), outputs // inputs), walk.vertices(target))
    for name in (source, target):
        walk.keep(name, f"{operator(node)} {node_name(node)} has {layer.groups} groups")
    return True


def _each(walk: _Walk, node: onnx.NodeProto) -> bool:
    """One tensor with channels in, one out, channel by channel."""
    source, target = node.input[0], node.output[0]
    if not walk.fixed(node) or len([name for name in node.output if name]) != 1:
        return False
    if source not in walk.first or target not in walk.first or walk.channels(source) != walk.channels(target):
        return False
    return walk.tie(walk.vertices(source), walk.vertices(target))


def _pad(walk: _Walk, node: onnx.NodeProto) -> bool:
    """On other axes than the channels': the widths of [N, C, ...] stand as begins, then ends."""
    widths = walk.graph.constant(node.input[1]) if len(node.input) > 1 else np.array(attribute(node, "pads", []))
    if widths is None or (len(node.input) > 3 and node.input[3]):
        return False
    return not any(widths[CHANNEL_AXIS :: len(widths) // 2]) and _each(walk, node)


def _resize(walk: _Walk, node: onnx.NodeProto) -> bool:
    """By factors; where it names sizes it would name the number of channels."""
    return not names_sizes(node) and _each(walk, node)


def _reduce(walk: _Walk, node: onnx.NodeProto) -> bool:
    axes, rank = axes_of(walk.graph, node), len(walk.shapes.get(node.input[0], ()))
    if not axes or any(axis % max(rank, 1) <= CHANNEL_AXIS for axis in axes):
        return False
    return _each(walk, node)


def _normalize(walk: _Walk, node: onnx.NodeProto) -> bool:
    """BatchNormalization and its kin hold one value per channel."""
    if not _each(walk, node):
        return False
    walk.cuts.extend(Cut(node, index, 0, node.output[0]) for index in range(1, len(node.input)))
    return True


def _join(walk: _Walk, node: onnx.NodeProto) -> bool:
    """Operands of the output's channels are tied to it; a constant is cut with it; one value serves all channels."""
    target = node.output[0]
    if target not in walk.first:
        return False
    channels, rank = walk.channels(target), len(walk.shapes[target])
    for index, name in enumerate(node.input):
        constant = walk.graph.constant(name)
        shape = walk.shapes.get(name) if constant is None else constant.shape
        if shape is None or (constant is None and len(shape) != rank):
            return False
        axis = len(shape) - rank + CHANNEL_AXIS
        width = shape[axis] if axis >= 0 else 1
        if width == 1 and channels > 1:
            walk.keep(name, "one channel that meets many")
        elif constant is None:
            walk.tie(walk.vertices(name), walk.vertices(target))
        elif channels > 1:
            walk.cuts.append(Cut(node, index, axis, target))
    return True


def _concat(walk: _Walk, node: onnx.NodeProto) -> bool:
    target = node.output[0]
    if target not in walk.first or any(name not in walk.first for name in node.input):
        return False
    along = int(attribute(node, "axis", 1)) % len(walk.shapes[target]) == CHANNEL_AXIS
    offset = 0
    for name in node.input:
        width = walk.channels(name)
        walk.tie(walk.vertices(name), walk.vertices(target)[offset : offset + width])
        offset += width if along else 0
    return True


def _reshape(walk: _Walk, node: onnx.NodeProto) -> bool:
    """[N, C, ...] -> [N, C, ...] or rows [N, C * positions]; a target that names the channels is rewritten later."""
    source, target = node.input[0], node.output[0]
    if source not in walk.first or target not in walk.first:
        return False
    before, after = walk.shapes[source], walk.shapes[target]
    positions = math.prod(before[2:]) if len(after) == 2 else 1
    kept = after[0] == before[0] and after[1] == before[1] * positions
    if not kept or math.prod(after) != math.prod(before):
        return False
    if operator(node) == "Reshape":
        wildcard = _names_wildcard(walk.graph, node.input[1])
        if wildcard is None:
            return False
        if not wildcard:
            walk.targets.append((node, target))
    return walk.tie(np.repeat(walk.vertices(source), positions), walk.vertices(target))


def _names_wildcard(graph: Graph, target: str) -> bool | None:
    """Whether a Reshape's target leaves the channels open; None where that is not known."""
    known = graph.constant(target)
    if known is not None:
        return int(known.ravel()[CHANNEL_AXIS]) in (-1, 0)  # what is left; what the source has
    node = graph.producer.get(target)
    if node is None or operator(node) != "Concat":
        return None
    parts = [graph.constant(name) for name in node.input]
    heads = [name for name, part in zip(node.input, parts, strict=True) if part is None]
    # The usual export of x.flatten(1): the batch size that was read from a shape, then -1.
    if len(node.input) != 2 or heads != [node.input[0]] or parts[1] is None:
        return None
    return True if list(parts[1].ravel()) == [-1] else None


def _shape(walk: _Walk, node: onnx.NodeProto) -> bool:
    """Reading the batch size does not depend on the channels."""
    graph = walk.graph
    readers = [*graph.consumers[node.output[0]]]
    for reader in readers:
        if operator(reader) == "Cast":
            readers.extend(graph.consumers[reader.output[0]])
            continue
        bounds = [graph.constant(name) for name in reader.input[1:3]]
        wanted = {"Gather": [0], "Slice": [0, 1]}.get(operator(reader))
        if wanted is None or any(bound is None or bound.size != 1 for bound in bounds):
            return False
        if [int(bound.ravel()[0]) for bound in bounds if bound is not None] != wanted:
            return False
    return node.output[0] not in graph.outputs


EACH = (
    *("Abs", "AveragePool", "Cast", "Celu", "Clip", "Dropout", "Elu", "Erf", "Exp", "Gelu", "GlobalAveragePool"),
    *("GlobalLpPool", "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "LpPool", "MaxPool"),
    *("Mish", "Neg", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh"),
)

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(EACH, _each),
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), _weighted),
    **dict.fromkeys(("Add", "Div", "Max", "Mean", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum"), _join),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _reduce),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), _normalize),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshape),
    "Concat": _concat,
    "Pad": _pad,
    "Resize": _resize,
    "Upsample": _resize,
    "Shape": _shape,
}
