"""Gated activations: y = f(x), channel by channel, where f is not homogeneous (h-swish, SiLU, GELU, Sigmoid, Mish ...).

A factor per channel does not pass through f, but it may stand before it and behind it:

    y' = b f(x' / a),    x' = a x from the weights of what makes x, y = y' / b in the weights of what reads y.

So the tensors on both sides can be equalized, at the price of one multiplication each; the one behind costs nothing where
f ends in a constant factor, as the h-swish that older exporters write out: Add 3, Clip 0..6, Mul, Div 6.

No list of activations is kept: a gate is any region of elementwise operators with one way in and one way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_lwdf.graph import Graph, operator
from onnx_lwdf.layers import Layer
from onnx_lwdf.ranges import F64
from onnx_lwdf.runtime import Array, open_session, run
from onnx_lwdf.statistics import ChannelStatistics

LINEAR = ("Add", "Sub", "Mul", "Div", "Neg", "Identity")  # with constants
BENT = ("Relu", "LeakyRelu", "PRelu", "Clip", "Min", "Max")  # straight but for a corner: others take care of them
CURVED = (
    *("Sigmoid", "HardSigmoid", "Tanh", "Erf", "Exp", "Softplus", "Softsign", "Pow", "Sqrt", "Abs"),
    *("HardSwish", "Swish", "Gelu", "Mish", "Elu", "Selu", "Celu", "ThresholdedRelu"),
)
PASSING = ("MaxPool", "AveragePool", "GlobalAveragePool", "BatchNormalization", "Pad", "Resize", "Upsample")
HALF_A_CODE = 1 / 512  # of a channel's range in 8 bits: what differs by less is the same
BEYOND = 2.0  # times what the samples reach, where no BatchNormalization tells
POINTS = 129  # of f, over what a channel may reach


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """y = f(x): the operators between, in order."""

    input: str
    output: str
    nodes: tuple[onnx.NodeProto, ...]
    axes: int  # that follow the channels: 2 of an image

    def shaped(self, factor: F64) -> Array:
        """A factor per channel, [channels], as a constant of the graph."""
        return factor.astype(np.float32).reshape(-1, *(1,) * self.axes)


@dataclass(frozen=True, slots=True)
class Span:
    """Between what the values of each channel lie; [channels] each."""

    low: F64
    high: F64

    def clip(self, values: Array) -> F64:
        """Values [channels, values], none outside."""
        return np.clip(values.astype(np.float64), self.low[:, None], self.high[:, None])

    def joined(self, other: Span) -> Span:
        """Both."""
        return Span(np.minimum(self.low, other.low), np.maximum(self.high, other.high))


@dataclass(frozen=True, slots=True)
class Response:
    """How f answers to its input."""

    input: Span  # within it f changes, or within what the channel may reach
    output: Span
    slope: F64  # [channels], mean square of f'
    power: float  # of f, summed over the channels


def find_gates(graph: Graph, layers: Sequence[Layer]) -> list[Gate]:
    """All gates behind layers, in graph order, none within another."""
    gates: list[Gate] = []
    inside: set[str] = set()
    for tensor, axes in _axes(graph, layers).items():
        gate = None if tensor in inside else _gate(graph, tensor, axes)
        if gate is not None:
            gates.append(gate)
            inside.update(node.output[0] for node in gate.nodes[:-1])
    return gates


def reach(values: Array, known: ChannelStatistics | None) -> Span:
    """What a tensor's channels may reach: samples [channels, values] know nothing of the tails."""
    low, high = values.min(1).astype(np.float64), values.max(1).astype(np.float64)
    if known is None or known.far is None:
        return Span(BEYOND * low, BEYOND * high)
    return Span(np.minimum(low, known.mean - known.far), np.maximum(high, known.mean + known.far))


def response(graph: Graph, gate: Gate, values: Array, known: ChannelStatistics | None) -> Response:
    """How f answers to samples of its input [channels, values], and over all that it may reach."""
    span = reach(values, known)
    points = np.linspace(span.low, span.high, POINTS, axis=1)  # [channels, points]
    step = HALF_A_CODE * np.maximum(span.high - span.low, np.finfo(np.float32).tiny)[:, None]
    seen = values.astype(np.float64)
    below, exact, above, whole = _answers(graph, gate, [seen - step, seen, seen + step, points])
    least, most = whole.min(1), whole.max(1)
    flat = HALF_A_CODE * (most - least)[:, None]
    first = np.logical_and.accumulate(np.abs(whole - whole[:, :1]) <= flat, axis=1).sum(1) - 1
    last = POINTS - np.logical_and.accumulate(np.abs(whole - whole[:, -1:])[:, ::-1] <= flat, axis=1).sum(1)
    rows = np.arange(len(points))
    slope = np.mean(((above - below) / (2 * step)) ** 2, axis=1)
    inner = Span(points[rows, first], np.maximum(points[rows, first], points[rows, last]))
    return Response(inner, Span(least, most), slope, float((exact**2).mean(1).sum()))


def scale_input(graph: Graph, gate: Gate, factor: F64) -> None:
    """Let f see its input divided by the factor [channels]: what makes it will put out as many times more."""
    readers = list(graph.consumers[gate.input])
    divisor = graph.add_constant(f"{gate.input}.factor", gate.shaped(1 / factor))
    graph.reroute(readers, gate.input, graph.add("Mul", [gate.input, divisor], f"{gate.input}.unscaled"))


def scale_output(graph: Graph, gate: Gate, factor: F64) -> None:
    """Let f put out as many times more, [channels]: in the constant at its end, else by one multiplication."""
    node = gate.nodes[-1]
    known = [(index, graph.constant(name)) for index, name in enumerate(node.input)]
    constants = [(index, value) for index, value in known if value is not None]
    if constants and (operator(node) == "Mul" or (operator(node) == "Div" and constants[0][0] == 1)):
        index, old = constants[0]
        power = 1 if operator(node) == "Mul" else -1
        value = old.astype(np.float64).reshape(-1, *(1,) * gate.axes) * gate.shaped(factor).astype(np.float64) ** power
        graph.set_input(node, index, value.astype(np.float32), f"{gate.output}.factor")
        return
    inner = graph.unique(f"{gate.output}.unscaled")
    node.output[0] = inner
    graph.producer[inner] = graph.producer.pop(gate.output)
    scale = graph.add_constant(f"{gate.output}.factor", gate.shaped(factor))
    graph.rename(graph.add("Mul", [inner, scale], gate.output), gate.output)


def _axes(graph: Graph, layers: Sequence[Layer]) -> dict[str, int]:
    """Tensor -> how many axes follow its channels, for all that layers put out and elementwise operators make of it."""
    known = {layer.node.output[0]: len(layer.window.kernel) if layer.window else 0 for layer in layers}
    found: dict[str, int] = {}
    for node in graph.nodes:
        name = node.output[0] if node.output else ""
        if name in known:
            found[name] = known[name]
        elif operator(node) in (*LINEAR, *BENT, *CURVED, *PASSING):
            axes = {found[source] for source in node.input if source in found}
            if len(axes) == 1:
                found[name] = axes.pop()
        elif operator(node) == "Flatten" and node.input[0] in found:
            found[name] = 0
    return found


def _gate(graph: Graph, source: str, axes: int) -> Gate | None:
    """The longest gate that this tensor enters, None where there is none."""
    tensors, nodes, found = [source], list[onnx.NodeProto](), None
    curved = False
    while (node := next(_next(graph, tensors, nodes, axes), None)) is not None:
        nodes.append(node)
        tensors.append(node.output[0])
        product = operator(node) in ("Mul", "Div") and all(name in tensors for name in node.input)
        curved = curved or product or operator(node) in CURVED
        if curved and all(_hidden(graph, name, nodes) for name in tensors[:-1]):
            found = Gate(source, node.output[0], tuple(nodes), axes)
    return found


def _next(graph: Graph, tensors: list[str], nodes: list[onnx.NodeProto], axes: int) -> Iterator[onnx.NodeProto]:
    """Elementwise nodes that read these tensors and constants alone."""
    for tensor in tensors:
        for node in graph.consumers[tensor]:
            fits = operator(node) in (*LINEAR, *BENT, *CURVED)
            if not fits or len(node.output) != 1 or any(node is other for other in nodes):
                continue
            if all(not name or name in tensors or _fits(graph, name, axes) for name in node.input):
                yield node


def _hidden(graph: Graph, tensor: str, nodes: list[onnx.NodeProto]) -> bool:
    """Whether these nodes alone read the tensor."""
    if tensor in graph.outputs or tensor in graph.captured:
        return False
    return all(any(node is other for other in nodes) for node in graph.consumers[tensor])


def _fits(graph: Graph, name: str, axes: int) -> bool:
    """Whether the name is a constant that is one number, or one per channel."""
    value = graph.constant(name)
    if value is None or value.ndim > axes + 2:
        return False
    place = value.ndim - axes - 1
    return all(size == 1 or i == place for i, size in enumerate(value.shape))


def _answers(graph: Graph, gate: Gate, inputs: Sequence[F64]) -> list[F64]:
    """What f makes of these, [channels, values] each, by onnxruntime."""
    names = {name for node in gate.nodes for name in node.input if name}
    values = {name: graph.constant(name) for name in sorted(names)}
    body = onnx.helper.make_graph(
        list(gate.nodes),
        "gate",
        [onnx.helper.make_tensor_value_info(gate.input, onnx.TensorProto.FLOAT, None)],
        [onnx.helper.make_tensor_value_info(gate.output, onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in values.items() if value is not None],
    )
    model = onnx.helper.make_model(
        body, opset_imports=[onnx.helper.make_opsetid("", graph.opset)], ir_version=max(graph.model.ir_version, 4)
    )
    session = open_session(model, arena=False)
    found = []
    for value in inputs:
        channels, count = value.shape
        shape = (1, channels, count, *(1,) * (gate.axes - 1))
        placed = value.reshape(shape) if gate.axes else value.T
        answer = run(session, {gate.input: placed.astype(np.float32)})[0].astype(np.float64)
        found.append(answer.reshape(channels, count) if gate.axes else answer.T)
    return found
