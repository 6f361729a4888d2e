"""The weighted layers of a graph: what is compressed, and what is left alone with its reason.

A layer computes y = W x + b. Its weight has one canonical form, `[groups, out, in]` with `in` ordered (kernel position,
channel), the order in which onnxruntime's integer kernels flatten a filter:

    Conv            [out, in/groups, *kernel]        -> [groups, out/groups, kernel * in/groups]
    ConvTranspose   [in, out/groups, *kernel]        -> [groups, out/groups, kernel * in/groups]
    Gemm, MatMul    [in, out] (or [out, in], transB) -> [1, out, in]
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_lwdf.graph import Graph, attribute, drop_attributes, node_name, operator, subgraphs
from onnx_lwdf.runtime import Array
from onnx_lwdf.vectors import Vectors, vectors

MOST_INPUTS = 8192  # of a layer whose inputs are one block: H takes half a gigabyte
LARGEST_BLOCK, MULTIPLE = 2048, 64  # inputs of a block; a multiple of the M of N:M, and of pairs
BLOCK_VALUES = 2**18  # of a weight at a time, where weights are too large for memory: 2 MiB stay in a processor's cache

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FUSED = "made by onnxruntime's optimizer; give the model as it was before"
LEFT_ALONE = {  # operators that hold weights too
    **dict.fromkeys(("LSTM", "GRU", "RNN"), "the weights of recurrent layers stay float"),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"), "already quantized"),
    **dict.fromkeys(("com.microsoft::QGemm", "com.microsoft::MatMulIntegerToFloat"), "already quantized"),
    **dict.fromkeys((f"com.microsoft::Fused{op}" for op in ("Conv", "Gemm", "MatMul")), FUSED),
    "com.microsoft.nchwc::Conv": FUSED,
}


@dataclass(frozen=True, slots=True)
class Window:
    """How a convolution's kernel walks over its input, one value per spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None  # begins, then ends; None where auto_pad decides from the input's size
    auto_pad: str


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One weighted node."""

    name: str
    op: str
    node: onnx.NodeProto
    groups: int
    transposed: bool  # Gemm: transB
    window: Window | None  # None for Gemm and MatMul
    bias: tuple[onnx.NodeProto, int] | None  # the node and input that hold the bias; None where a bias has no place

    @property
    def input(self) -> str:
        return self.node.input[0]

    @property
    def weight(self) -> str:
        """The name of the weight tensor."""
        return self.node.input[1]

    @property
    def kernel_size(self) -> int:
        """Kernel positions: 1 for Gemm and MatMul."""
        return math.prod(self.window.kernel) if self.window else 1

    @property
    def output(self) -> str:
        """The tensor that holds W x + b."""
        node = self.bias[0] if self.bias else self.node
        return node.output[0]


@dataclass(frozen=True, slots=True)
class Bits:
    """Bits of a layer's weight and of its input; None: it stays float."""

    weight: int | None
    activation: int | None
    free: bool = False  # the weight may have fewer: how many is to be chosen
    vector_size: int = 0  # inputs whose codes share a multiplier; 0: codes alone
    largest: int = 127  # product of a code and its multiplier


@dataclass(frozen=True, slots=True)
class Pruning:
    """How a layer is pruned."""

    sparsity: float = 0.0  # share of its weights that become 0
    nm: tuple[int, int] | None = None  # N of every M consecutive input channels stay, in place of `sparsity`
    shared: bool = False  # whether `sparsity` is this layer's share of a budget, to be chosen
    note: str = ""  # why it stays dense where others are pruned

    @property
    def share(self) -> float:
        """The share of the weights that become 0."""
        return self.sparsity if self.nm is None else 1 - self.nm[0] / self.nm[1]

    @property
    def asked(self) -> bool:
        return self.sparsity > 0 or self.nm is not None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A weighted node that stays as it is."""

    name: str
    op: str
    shape: tuple[int, ...]
    reason: str


def find_layers(graph: Graph, exclude: Iterable[str] = ()) -> tuple[list[Layer], list[Skipped]]:
    """Every Conv, ConvTranspose, Gemm and MatMul, and what else holds weights, once, in graph order, names made unique."""
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    given = {node_name(node) for node in graph.nodes}
    used: set[str] = set()
    for node in graph.nodes:
        skipped.extend(_inner(node))
        if operator(node) not in (*WEIGHTED, *LEFT_ALONE):
            continue
        name = node_name(node)
        if name in used:
            numbered = (f"{name}#{number}" for number in itertools.count(2))
            name = next(other for other in numbered if other not in used | given)
        used.add(name)
        reason = _refusal(graph, node)
        if reason is None and any(matches(pattern, name, operator(node)) for pattern in exclude):
            reason = "excluded"
        if reason is None:
            layers.append(replace(_layer(graph, node), name=name))
        else:
            skipped.append(Skipped(name, operator(node), _shape(graph, node), reason))
    skipped.extend(_in_functions(graph.model))
    return layers, skipped


def committed(graph: Graph, layers: Iterable[Layer]) -> list[Layer]:
    """The same layers after the graph's edits were written to its model."""
    graph.commit()
    found = {layer.name: layer for layer in find_layers(graph)[0]}
    return [found[layer.name] for layer in layers]


def matches(pattern: str, name: str, op: str) -> bool:
    """Whether a glob names this node, by its name or by its op type."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(op, pattern)


def sources(graph: Graph, layers: Iterable[Layer]) -> dict[str, frozenset[str]]:
    """Tensor -> the layers from which it is computed without another one between; an empty set is left out."""
    makers = {layer.output: frozenset([layer.name]) for layer in layers}
    reached: dict[str, frozenset[str]] = {}
    for node in graph.nodes:
        behind = frozenset().union(*(reached.get(name, frozenset()) for name in node.input))
        found = {name: makers.get(name, behind) for name in node.output}
        reached.update({name: names for name, names in found.items() if names})
    return reached


ALL = slice(None)


def weight_of(graph: Graph, layer: Layer, rows: slice | Array = ALL) -> Array:
    """The layer's weight in canonical form, float64 [groups, out, in], or these output channels of each group."""
    return _canonical(graph, layer)[:, rows].astype(np.float64)


def shape_of(graph: Graph, layer: Layer) -> tuple[int, int, int]:
    """Of the weight in canonical form: groups, out, in."""
    value = graph.constant(layer.weight)
    assert value is not None, layer.name
    out = output_axis_size(layer, value.shape) // layer.groups
    return layer.groups, out, value.size // (layer.groups * out)


def blocks(graph: Graph, layer: Layer) -> list[slice]:
    """The output channels of each group, all at once; few at a time where the model, or the layer, is too large for memory.

    As many as a block has inputs at least: what a solver does once for all of them then takes no more than its other work.
    """
    groups, out, inputs = shape_of(graph, layer)
    parts = input_blocks(graph, layer)
    if graph.scratch is None and parts == 1:
        return [ALL]
    rows = max(inputs // parts, BLOCK_VALUES // (groups * inputs))
    return [slice(start, start + rows) for start in range(0, out, rows)]


def input_blocks(graph: Graph, layer: Layer) -> int:
    """In how many blocks the inputs are split where their moments are taken: 1, but for pointwise layers with a great many."""
    groups, _, inputs = shape_of(graph, layer)
    if groups > 1 or layer.kernel_size > 1 or inputs <= MOST_INPUTS:
        return 1
    widths = [width for width in range(MULTIPLE, LARGEST_BLOCK + 1, MULTIPLE) if inputs % width == 0]
    return inputs // max(widths, default=inputs)


def _canonical(graph: Graph, layer: Layer) -> Array:
    value = graph.constant(layer.weight)
    assert value is not None, layer.name
    return to_canonical(layer, value)


def is_depthwise(graph: Graph, layer: Layer) -> bool:
    """Every output channel reads one input channel, of which there are several."""
    return layer.groups > 1 and shape_of(graph, layer)[2] == layer.kernel_size


def bias_of(graph: Graph, layer: Layer) -> Array:
    """The layer's bias, float64 [out of all groups]; zeros where it has none."""
    out = output_channels(graph, layer)
    if layer.bias is None:
        return np.zeros(out)
    node, index = layer.bias
    value = graph.constant(node.input[index]) if index < len(node.input) and node.input[index] else None
    return np.zeros(out) if value is None else np.broadcast_to(value.astype(np.float64).ravel(), (out,)).copy()


def set_weight(graph: Graph, layer: Layer, weight: Array) -> None:
    """Store a canonical weight in the layer's own place, in the dtype it had."""
    change_weight(graph, layer, lambda rows: weight[:, rows])


def change_weight(graph: Graph, layer: Layer, values: Callable[[slice], Array]) -> None:
    """As `set_weight`, of a weight that is known by blocks of output channels."""
    old = graph.constant(layer.weight)
    assert old is not None, layer.name
    new = np.empty(shape_of(graph, layer), old.dtype)
    for rows in blocks(graph, layer):
        new[:, rows] = values(rows)
    graph.set_input(layer.node, 1, from_canonical(layer, new, old.shape), layer.weight)


def set_bias(graph: Graph, layer: Layer, bias: Array) -> None:
    """Store the bias, float32, where the layer has a place for one."""
    if layer.bias is None:
        return
    node, index = layer.bias
    name = node.input[index] if index < len(node.input) else ""
    old = graph.constant(name) if name else None
    shaped = (
        bias.astype(np.float32) if old is None or old.size != bias.size else bias.reshape(old.shape).astype(old.dtype)
    )
    graph.set_input(node, index, shaped, name or f"{layer.name}.bias")


def output_channels(graph: Graph, layer: Layer) -> int:
    value = graph.constant(layer.weight)
    assert value is not None, layer.name
    return output_axis_size(layer, value.shape)


def input_channels(graph: Graph, layer: Layer) -> int:
    groups, _, inputs = shape_of(graph, layer)
    return groups * inputs // layer.kernel_size


def vectors_of(layer: Layer, channels: int, bits: Bits) -> Vectors | None:
    """The runs of inputs that have multipliers at these bits; `channels` of them for each group."""
    return vectors(bits.vector_size, channels, layer.kernel_size, bits.weight, bits.largest)


def run_shape(layer: Layer, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The stored weight's with runs of so many inputs in place of inputs."""
    axis = 1 - output_axis(layer)
    return (*shape[:axis], -(-shape[axis] // size), *shape[axis + 1 :])


def output_axis(layer: Layer) -> int:
    """The axis of the stored weight along which output channels run."""
    if layer.op == "Conv" or (layer.op == "Gemm" and layer.transposed):
        return 0
    return 1


def output_axis_size(layer: Layer, shape: tuple[int, ...]) -> int:
    return shape[output_axis(layer)] * (layer.groups if layer.op == "ConvTranspose" else 1)


def to_canonical(layer: Layer, stored: Array) -> Array:
    """The stored weight as [groups, out, in]; the table is in the module's docstring."""
    g = layer.groups
    if layer.op == "Conv":  # [out, in, *kernel]
        grouped = stored.reshape(g, stored.shape[0] // g, stored.shape[1], -1)  # [g, out, in, kernel]
        return np.ascontiguousarray(grouped.transpose(0, 1, 3, 2).reshape(g, grouped.shape[1], -1))
    if layer.op == "ConvTranspose":  # [in, out, *kernel]
        grouped = stored.reshape(g, stored.shape[0] // g, stored.shape[1], -1)  # [g, in, out, kernel]
        return np.ascontiguousarray(grouped.transpose(0, 2, 3, 1).reshape(g, grouped.shape[2], -1))
    return np.ascontiguousarray(stored if layer.transposed else stored.T)[None]


def from_canonical(layer: Layer, weight: Array, shape: tuple[int, ...]) -> Array:
    """Inverse of `to_canonical`; `shape` is that of the stored weight."""
    g, kernel = layer.groups, math.prod(shape[2:])
    if layer.op == "Conv":
        grouped = weight.reshape(g, shape[0] // g, kernel, shape[1])
        return np.ascontiguousarray(grouped.transpose(0, 1, 3, 2).reshape(shape))
    if layer.op == "ConvTranspose":
        grouped = weight.reshape(g, shape[1], kernel, shape[0] // g)
        return np.ascontiguousarray(grouped.transpose(0, 3, 1, 2).reshape(shape))
    return np.ascontiguousarray(weight[0] if layer.transposed else weight[0].T)


def _layer(graph: Graph, node: onnx.NodeProto) -> Layer:
    value = graph.constant(node.input[1])
    assert value is not None, node.name
    convolution = operator(node) in ("Conv", "ConvTranspose")
    return Layer(
        name=node_name(node),
        op=operator(node),
        node=node,
        groups=int(attribute(node, "group", 1)) if convolution else 1,
        transposed=operator(node) == "Gemm" and bool(attribute(node, "transB", 0)),
        window=window_of(node, value.shape[2:]) if convolution else None,
        bias=_bias_place(graph, node),
    )


def set_pads(node: onnx.NodeProto, pads: Sequence[int]) -> None:
    """Let a convolution pad by so much, begins, then ends; its `Layer` must be found anew."""
    drop_attributes(node, "pads", "auto_pad")
    node.attribute.append(onnx.helper.make_attribute("pads", list(pads)))


def window_of(node: onnx.NodeProto, kernel: tuple[int, ...]) -> Window:
    """How a node of this kernel moves over its input."""
    rank = len(kernel)
    auto_pad = str(attribute(node, "auto_pad", "NOTSET"))
    pads = {"NOTSET": attribute(node, "pads", [0] * 2 * rank), "VALID": [0] * 2 * rank}.get(auto_pad)
    return Window(
        kernel=kernel,
        strides=tuple(attribute(node, "strides", [1] * rank)),
        dilations=tuple(attribute(node, "dilations", [1] * rank)),
        pads=None if pads is None else tuple(pads),
        auto_pad=auto_pad,
    )


def _bias_place(graph: Graph, node: onnx.NodeProto) -> tuple[onnx.NodeProto, int] | None:
    """Conv and Gemm hold their bias themselves; a MatMul's bias is the constant of the Add behind it."""
    if operator(node) != "MatMul":
        return node, 2
    value, follower = graph.constant(node.input[1]), graph.sole_consumer(node.output[0])
    if follower is None or operator(follower) != "Add" or value is None:
        return None
    index = 1 - list(follower.input).index(node.output[0])
    bias = graph.constant(follower.input[index])
    if bias is None or bias.size != value.shape[1] or bias.shape[-1:] != (value.shape[1],):
        return None
    return follower, index


def _refusal(graph: Graph, node: onnx.NodeProto) -> str | None:
    """Why the node cannot be compressed, None where it can."""
    if operator(node) in LEFT_ALONE:
        return LEFT_ALONE[operator(node)]
    weight, maker = graph.constant(node.input[1]), graph.producer.get(node.input[1])
    if weight is None:
        if maker is not None and operator(maker) == "DequantizeLinear":
            return "the weight is already quantized"
        if operator(node) == "MatMul" and graph.constant(node.input[0]) is not None:
            return "the constant is on the left side"
        return "the weight is not constant"
    if node.input[1] in graph.outputs:
        return "the weight is an output of the model"
    if weight.dtype != np.float32:
        return f"the weight is {weight.dtype}; export the model in float32"
    if weight.size == 0:
        return "the weight is empty"
    if graph.constant(node.input[0]) is not None:
        return "the input is constant"
    if operator(node) == "MatMul" and weight.ndim != 2:
        return f"the weight has {weight.ndim} dimensions, not 2"
    if not _fits(graph, node, weight):
        return "its shapes do not fit together"
    if operator(node) == "Gemm":
        return _gemm_refusal(graph, node)
    if operator(node) == "ConvTranspose" and attribute(node, "group", 1) != 1:
        return "a grouped ConvTranspose has no axis along which its outputs run"
    bias = node.input[2] if len(node.input) > 2 else ""
    return "the bias is not constant" if bias and graph.constant(bias) is None else None


def _fits(graph: Graph, node: onnx.NodeProto, weight: Array) -> bool:
    """Whether weight, groups and constant bias can belong to one layer; nobody else has looked at the file so far."""
    if operator(node) == "MatMul":
        return True
    groups = int(attribute(node, "group", 1))
    rank = weight.ndim == 2 if operator(node) == "Gemm" else weight.ndim > 2
    if not rank or groups < 1 or weight.shape[0] % groups:
        return False
    layer = _layer(graph, node)
    bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    return bias is None or bias.size in (1, output_axis_size(layer, weight.shape)) or bias.ndim > 1


def _gemm_refusal(graph: Graph, node: onnx.NodeProto) -> str | None:
    if attribute(node, "transA", 0):
        return "the input is transposed (transA)"
    bias = node.input[2] if len(node.input) > 2 else ""
    value = graph.constant(bias) if bias else np.zeros(1)
    if value is None:
        return "the bias is not constant"
    if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
        return "alpha or beta is not 1"
    return "the bias differs by row" if value.ndim > 1 and value.shape[0] != 1 else None


def _shape(graph: Graph, node: onnx.NodeProto) -> tuple[int, ...]:
    value = graph.constant(node.input[1])
    return () if value is None else value.shape


def _inner(node: onnx.NodeProto) -> Iterable[Skipped]:
    for inner_graph in subgraphs(node):
        for inner in inner_graph.node:
            if operator(inner) in WEIGHTED:
                yield Skipped(
                    f"{node_name(node)}/{node_name(inner)}", operator(inner), (), f"inside a {operator(node)}"
                )
            yield from _inner(inner)


def _in_functions(model: onnx.ModelProto) -> Iterable[Skipped]:
    for function in model.functions:
        for inner in function.node:
            if operator(inner) in WEIGHTED:
                name = f"{function.name}/{node_name(inner)}"
                yield Skipped(name, operator(inner), (), f"inside the local function {function.name}")
