"""How strongly the model's outputs answer to a small error of any inner tensor.

For a tensor t, with v drawn from N(0, I) at the outputs, each output in units of its own power,

    S = E[sum over positions of g g^T],    g = J^T v,    J the derivative of the outputs by t,

[channels, channels] is the mean over images; of tensors whose channels are not mixed its diagonal is enough. An error of t
that is white over positions, with covariance D over channels, shows at the outputs as tr(S D), in units of their power (the
output side of K-FAC: Martens and Grosse, arXiv 1503.05671).

The backward pass is an ONNX graph of its own, appended to the forward one operator by operator from the table below. In front
of an operator outside of the table (LSTM), its input counts as an output. Where a form of an operator is not known, what stands
in front of it has no S, and callers fall back on what they know of the next layer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lwdf.activations.taps import Align, Feed, pads_for, replace_aligned, samples_in
from onnx_lwdf.errors import ModelError
from onnx_lwdf.graph import Graph, attribute
from onnx_lwdf.layers import window_of
from onnx_lwdf.runtime import Array, copy_of, open_session, run, trim
from onnx_lwdf.statistics import F64, Statistics

IMAGES, CHUNK = 64, 8  # in all, and at a time: gradients of all layers are alive at once
MOST_CHANNELS = 4096  # of a tensor
HALF_STEP = 2.0**-7  # of the central difference that stands for an activation's slope

Shape = tuple[int, ...]
Sensitivities = Mapping[str, F64]  # tensor -> S, [channels, channels], or its diagonal, [channels]

log = logging.getLogger(__name__)


def sensitivities(
    model: onnx.ModelProto,
    tensors: Iterable[str],
    mixed: Set[str],
    rows: Set[str],
    chunks: Sequence[Feed],
    rng: np.random.Generator,
    statistics: Statistics,
    align: Align | None,
) -> dict[str, F64]:
    """Tensor -> S, of those of these tensors of which it is known.

    mixed: tensors of which all of S is wanted, not the diagonal. rows: those whose channels run along the last axis.
    `statistics`, `align`: as for the samples; the slopes are taken where the samples are.
    """
    feeds = _feeds(chunks)
    try:
        backward = _Backward(Graph(copy_of(model)), feeds[0], statistics, align)
        wanted = backward.finish(tensors, mixed, rows)
        session = open_session(backward.graph.model, arena=False)
        inputs = {value.name for value in session.get_inputs()}
        names = list(wanted.values())
        sums: dict[str, F64] = {}
        for feed in feeds if names else ():
            given = {**feed, **backward.draw(rng)}
            answers = run(session, {name: value for name, value in given.items() if name in inputs}, names)
            for tensor, answer in zip(wanted, answers, strict=True):
                sums[tensor] = sums.get(tensor, 0.0) + answer.astype(np.float64)
        sums = {tensor: total if tensor in mixed else total.ravel() for tensor, total in sums.items()}
    except ModelError as error:  # an unusual graph: what follows does without
        log.debug("no gradients: %s", error)
        return {}
    trim()
    count = sum(samples_in(feed) for feed in feeds)
    return {tensor: total / count for tensor, total in sums.items() if np.isfinite(total).all() and total.any()}


def strengths(sensitivity: F64) -> F64:
    """The diagonal of S, [channels]."""
    return sensitivity if sensitivity.ndim == 1 else np.diagonal(sensitivity)


def _feeds(chunks: Sequence[Feed]) -> list[Feed]:
    """The first images, in chunks of one small size."""
    size = min(CHUNK, samples_in(chunks[0]))
    parts: list[Feed] = [
        {name: value[start : start + size] if value.ndim else value for name, value in chunk.items()}
        for chunk in chunks
        for start in range(0, samples_in(chunk) - size + 1, size)
    ]
    return parts[: max(1, IMAGES // size)]


@dataclass
class _Backward:
    """The forward graph and the backward one behind it, as far as it is built."""

    graph: Graph
    feed: Feed
    statistics: Statistics
    align: Align | None
    shapes: dict[str, Shape] = field(init=False)  # of every tensor, for the feed
    seeds: dict[str, tuple[str, float]] = field(init=False, default_factory=dict)  # tensor -> its seed, its scale
    parts: dict[str, list[str]] = field(init=False, default_factory=dict)  # tensor -> what adds up to its gradient
    whole: dict[str, str] = field(init=False, default_factory=dict)  # tensor -> its gradient
    blocked: set[str] = field(init=False, default_factory=set)  # tensors whose gradient misses something
    original: dict[str, str] = field(init=False, default_factory=dict)  # aligned tensor -> the one it stands for

    def __post_init__(self) -> None:
        graph = self.graph
        nodes = list(graph.nodes)
        outer = [name for node in nodes if _rule(node) is None for name in node.input if name]
        ends = list(dict.fromkeys(self._before_softmax(name) for name in (*graph.outputs, *outer)))
        made = [name for node in nodes for name in node.output if name and graph.constant(name) is None]
        self.shapes = {name: value.shape for name, value in self.feed.items()} | self._made_shapes(made)
        outputs = open_session(copy_of(graph.model, made), arena=False).get_outputs()
        floats = {value.name for value in outputs if value.type == "tensor(float)"}
        model = copy_of(graph.model)
        self.original = self._aligned(graph)
        powers = self._powers(Graph(model), [name for name in ends if name in floats])
        for name in ends:
            if name in floats and (power := powers[name]) > 0:
                seed = graph.unique("gradient.seed")
                self.seeds[name] = seed, math.sqrt(samples_in(self.feed) / power)
                self.parts[name] = [seed]
        self.blocked.update(graph.captured)  # by a node's own graph: what it does there is not followed
        for node in reversed(nodes):
            self._through(node)

    def _aligned(self, graph: Graph) -> dict[str, str]:
        """Align what has statistics; aligned tensor -> the one it stands for."""
        if self.align is None:
            return {}
        known = {name: value for name, value in self.statistics.items() if name in graph.producer}
        return {
            replace_aligned(graph, name, self.align, value, self.shapes[name]): name for name, value in known.items()
        }

    def _made_shapes(self, names: Sequence[str]) -> dict[str, Shape]:
        """Seen in a run: the values themselves, of all tensors at once, never leave it."""
        graph = Graph(copy_of(self.graph.model))
        places = [graph.add("Shape", [name], "gradient.shape") for name in names]
        graph.set_outputs(places)
        graph.commit()
        answers = run(open_session(graph.model, arena=False), self.feed, places) if places else []
        return {name: tuple(map(int, value)) for name, value in zip(names, answers, strict=True)}

    def _powers(self, graph: Graph, ends: Sequence[str]) -> dict[str, float]:
        """Sums of squares of these tensors."""
        self._aligned(graph)
        graph.set_outputs(ends)
        graph.commit()
        answers = run(open_session(graph.model, arena=False), self.feed, ends) if ends else []
        return {name: float((value.astype(np.float64) ** 2).sum()) for name, value in zip(ends, answers, strict=True)}

    def _before_softmax(self, name: str) -> str:
        """What decides stands in front of it: behind it, a confident answer has no slope. A Sigmoid's values are answers."""
        node = self.graph.producer.get(name)
        plain = ("Softmax", "LogSoftmax", "Identity")
        return self._before_softmax(node.input[0]) if node is not None and node.op_type in plain else name

    def _through(self, node: onnx.NodeProto) -> None:
        outputs = [name for name in node.output if name in self.parts or name in self.blocked]
        if not outputs:
            return
        rule, name = _rule(node), node.output[0]
        if rule is not None and (outputs != [name] or name in self.blocked):
            self._block(node)
        if name in self.parts:
            first, *others = self.parts[name]
            for other in others:
                first = self.add("Add", [first, other])
            self.whole[name] = first
            if rule is not None and not rule(self, node, first):
                self._block(node)

    def _block(self, node: onnx.NodeProto) -> None:
        self.blocked.update(self.original.get(name, name) for name in node.input if name)

    def add(self, op: str, inputs: Iterable[str], **attributes: object) -> str:
        return self.graph.add(op, inputs, "gradient", **attributes)

    def constant(self, value: npt.ArrayLike) -> str:
        return self.graph.add_constant("gradient.constant", value)

    def give(self, tensor: str, gradient: str) -> None:
        """Add to the gradient of what a node reads."""
        self.parts.setdefault(self.original.get(tensor, tensor), []).append(gradient)

    def shape(self, tensor: str) -> Shape:
        found = self.shapes.get(self.original.get(tensor, tensor))
        if found is None:
            value = self.graph.constant(tensor)
            return () if value is None else value.shape
        return found

    def varies(self, tensor: str) -> bool:
        return bool(tensor) and self.graph.constant(tensor) is None

    def reshaped(self, gradient: str, shape: Sequence[int]) -> str:
        return self.add("Reshape", [gradient, self.constant(np.array(shape, np.int64))])

    def summed(self, gradient: str, shape: Shape, wanted: Shape) -> str:
        """The gradient of an operand of this shape that was repeated to another."""
        padded = (1,) * (len(shape) - len(wanted)) + wanted
        axes = [axis for axis, (here, there) in enumerate(zip(shape, padded, strict=True)) if there < here]
        if axes and self.graph.opset < 13:
            gradient = self.add("ReduceSum", [gradient], axes=axes, keepdims=1)
        elif axes:
            gradient = self.add("ReduceSum", [gradient, self.constant(np.array(axes, np.int64))], keepdims=1)
        return gradient if padded == wanted else self.reshaped(gradient, wanted)

    def finish(self, tensors: Iterable[str], mixed: Set[str], rows: Set[str]) -> dict[str, str]:
        """Tensor -> the one that holds the sum of g g^T; the graph is committed."""
        found: dict[str, str] = {}
        for tensor in dict.fromkeys(tensors):
            shape = self.shapes.get(tensor, ())
            axis = len(shape) - 1 if tensor in rows else 1
            if tensor in self.blocked or tensor not in self.whole or len(shape) < 2 or shape[axis] > MOST_CHANNELS:
                continue
            others = [other for other in range(len(shape)) if other != axis]
            moved = self.add("Transpose", [self.whole[tensor]], perm=[axis, *others])
            flat = self.reshaped(moved, [shape[axis], -1])
            if tensor in mixed:
                found[tensor] = self.add("MatMul", [flat, self.add("Transpose", [flat], perm=[1, 0])])
            else:
                squares = self.add("Mul", [flat, flat])
                size = math.prod(shape) // shape[axis]
                found[tensor] = self.summed(squares, (shape[axis], size), (shape[axis], 1))
        self.graph.set_outputs(found.values())
        for name, (seed, _) in self.seeds.items():
            kind = onnx.TensorProto.FLOAT
            info = onnx.helper.make_tensor_value_info(seed, kind, [None] * len(self.shapes[name]))
            self.graph.model.graph.input.append(info)
        self.graph.commit()
        return found

    def draw(self, rng: np.random.Generator) -> dict[str, Array]:
        return {
            seed: (scale * rng.standard_normal(self.shapes[name])).astype(np.float32)
            for name, (seed, scale) in self.seeds.items()
        }


def _rule(node: onnx.NodeProto) -> Rule | None:
    return RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None


Rule = Callable[[_Backward, onnx.NodeProto, str], bool]  # gives gradients to what the node reads; False: it cannot


def _convolution(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    weight = back.graph.constant(node.input[1])
    source, made = back.shape(node.input[0])[2:], back.shape(node.output[0])[2:]
    if weight is None:
        return False
    window = window_of(node, weight.shape[2:])
    begins, ends = pads_for(window, source)
    reach = [d * (k - 1) + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    rest = [
        n - ((m - 1) * s + r - b - e)
        for n, m, s, r, b, e in zip(source, made, window.strides, reach, begins, ends, strict=True)
    ]
    options = {
        "strides": window.strides,
        "dilations": window.dilations,
        "pads": (*begins, *ends),
        "group": attribute(node, "group", 1),
        "kernel_shape": window.kernel,
    }
    back.give(node.input[0], back.add("ConvTranspose", [gradient, node.input[1]], output_padding=rest, **options))
    return True


def _transposed(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    weight = back.graph.constant(node.input[1])
    window = None if weight is None else window_of(node, weight.shape[2:])
    if window is None or window.pads is None or any(attribute(node, "output_padding", ())):
        return False
    options = {
        "strides": window.strides,
        "dilations": window.dilations,
        "pads": window.pads,
        "group": attribute(node, "group", 1),
        "kernel_shape": window.kernel,
    }
    back.give(node.input[0], back.add("Conv", [gradient, node.input[1]], **options))
    return True


def _gemm(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    weight = back.graph.constant(node.input[1])
    if weight is None or attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1:
        return False
    transposed = 0 if attribute(node, "transB", 0) else 1
    back.give(node.input[0], back.add("Gemm", [gradient, node.input[1]], transB=transposed))
    return True


def _matmul(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    weight = back.graph.constant(node.input[1])
    if weight is None or weight.ndim != 2 or len(back.shape(node.input[0])) < 2:
        return False
    turned = back.add("Transpose", [node.input[1]], perm=[1, 0])
    back.give(node.input[0], back.add("MatMul", [gradient, turned]))
    return True


def _slope(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    """Any function of single values: a central difference of two more nodes of the kind."""
    ends = []
    for step in (HALF_STEP, -HALF_STEP):
        moved = back.add("Add", [node.input[0], back.constant(np.float32(step))])
        ends.append(back.add(node.op_type, [moved, *node.input[1:]], **_attributes(node)))
    rise = back.add("Sub", ends)
    slope = back.add("Mul", [rise, back.constant(np.float32(0.5 / HALF_STEP))])
    back.give(node.input[0], back.add("Mul", [gradient, slope]))
    return not any(back.varies(name) for name in node.input[1:])


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def _sum(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    shape = back.shape(node.output[0])
    for name in filter(back.varies, node.input):
        back.give(name, back.summed(gradient, shape, back.shape(name)))
    return True


def _difference(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    shape = back.shape(node.output[0])
    for index, name in enumerate(node.input):
        if back.varies(name):
            signed = back.add("Neg", [gradient]) if index else gradient
            back.give(name, back.summed(signed, shape, back.shape(name)))
    return True


def _product(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    shape = back.shape(node.output[0])
    for name, other in (node.input, reversed(node.input)):
        if back.varies(name):
            back.give(name, back.summed(back.add("Mul", [gradient, other]), shape, back.shape(name)))
    return True


def _quotient(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    if back.varies(node.input[1]):
        return False
    shape = back.shape(node.output[0])
    scaled = back.add("Div", [gradient, node.input[1]])
    back.give(node.input[0], back.summed(scaled, shape, back.shape(node.input[0])))
    return True


def _global_average(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    return _spread(back, node, gradient, tuple(range(2, len(back.shape(node.input[0])))))


def _mean(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    rank = len(back.shape(node.input[0]))
    listed = back.graph.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
    axes = attribute(node, "axes", None if listed is None else listed.tolist())
    return axes is not None and _spread(back, node, gradient, tuple(sorted(axis % rank for axis in axes)))


def _spread(back: _Backward, node: onnx.NodeProto, gradient: str, axes: tuple[int, ...]) -> bool:
    """Of a mean over axes: each value has its share."""
    shape = back.shape(node.input[0])
    kept = [1 if axis in axes else size for axis, size in enumerate(shape)]
    share = back.constant(np.float32(1 / math.prod(shape[axis] for axis in axes)))
    shared = back.add("Mul", [back.reshaped(gradient, kept), share])
    back.give(node.input[0], back.add("Expand", [shared, back.constant(np.array(shape, np.int64))]))
    return True


def _average(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    """Windows at the border count as the others do, padding as values."""
    kernel = tuple(attribute(node, "kernel_shape"))
    channels, source = back.shape(node.input[0])[1], back.shape(node.input[0])[2:]
    made = back.shape(node.output[0])[2:]
    window = window_of(node, kernel)
    begins, ends = pads_for(window, source)
    parts = zip(source, made, window.strides, kernel, begins, ends, strict=True)
    rest = [n - ((m - 1) * s + k - b - e) for n, m, s, k, b, e in parts]
    if (any(attribute(node, "dilations", ())) and any(d != 1 for d in window.dilations)) or min(rest, default=0) < 0:
        return False
    share = np.full((channels, 1, *kernel), 1 / math.prod(kernel), np.float32)
    options = {"strides": window.strides, "pads": (*begins, *ends), "group": channels, "kernel_shape": kernel}
    spread = back.add("ConvTranspose", [gradient, back.constant(share)], output_padding=rest, **options)
    back.give(node.input[0], spread)
    return True


def _maximum(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    """To the largest value of each window; where two windows share it, one of them counts."""
    if (
        (len(node.output) > 1 and node.output[1])
        or attribute(node, "ceil_mode", 0)
        or attribute(node, "storage_order", 0)
    ):
        return False
    again = back.graph.producer[back.add("MaxPool", node.input, **_attributes(node))]
    places = back.graph.unique("gradient")
    again.output.append(places)
    back.graph.producer[places] = again
    shape = back.constant(np.array(back.shape(node.input[0]), np.int64))
    kernel = attribute(node, "kernel_shape")
    strides = attribute(node, "strides", [1] * len(kernel))
    options = {"kernel_shape": kernel, "strides": strides}
    back.give(node.input[0], back.add("MaxUnpool", [gradient, places, shape], **options))
    return True


def _enlarged(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    """Nearest neighbours, whole times as large: each value collects from its copies."""
    source, made = back.shape(node.input[0]), back.shape(node.output[0])
    times = [big // small for small, big in zip(source, made, strict=True)]
    exact = all(big == k * small for k, small, big in zip(times, source, made, strict=True))
    if attribute(node, "mode", "nearest") != "nearest" or not exact or times[:2] != [1, 1]:
        return False
    pooled = back.add("AveragePool", [gradient], kernel_shape=times[2:], strides=times[2:])
    back.give(node.input[0], back.add("Mul", [pooled, back.constant(np.float32(math.prod(times)))]))
    return True


def _same_values(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    """Values keep their order."""
    back.give(node.input[0], back.reshaped(gradient, back.shape(node.input[0])))
    return True


def _permuted(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    perm = attribute(node, "perm", list(reversed(range(len(back.shape(node.input[0]))))))
    back.give(node.input[0], back.add("Transpose", [gradient], perm=np.argsort(perm).tolist()))
    return True


def _joined(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    shape = back.shape(node.output[0])
    axis = attribute(node, "axis") % len(shape)
    start = 0
    for name in node.input:
        size = back.shape(name)[axis]
        ends = [back.constant(np.array([value], np.int64)) for value in (start, start + size, axis)]
        if back.varies(name):
            back.give(name, back.add("Slice", [gradient, *ends]))
        start += size
    return True


def _normalized(back: _Backward, node: onnx.NodeProto, gradient: str) -> bool:
    """A BatchNormalization that stands alone: a factor of every channel."""
    values = [back.graph.constant(name) for name in (node.input[1], node.input[4])]
    if values[0] is None or values[1] is None:
        return False
    factor = values[0] / np.sqrt(values[1] + attribute(node, "epsilon", 1e-5))
    shaped = factor.reshape(-1, *(1,) * (len(back.shape(node.input[0])) - 2)).astype(np.float32)
    back.give(node.input[0], back.add("Mul", [gradient, back.constant(shaped)]))
    return True


SLOPES = (
    *(
        "Relu",
        "Clip",
        "LeakyRelu",
        "PRelu",
        "Elu",
        "Selu",
        "Celu",
        "ThresholdedRelu",
        "Abs",
        "Exp",
        "Sqrt",
        "Erf",
        "Tanh",
    ),
    *("Sigmoid", "HardSigmoid", "HardSwish", "Softplus", "Softsign", "Gelu", "Mish", "Swish", "Neg", "Sin", "Cos"),
)
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(SLOPES, _slope),
    **dict.fromkeys(("Identity", "Dropout", "Flatten", "Reshape", "Squeeze", "Unsqueeze"), _same_values),
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _sum,
    "Sum": _sum,
    "Sub": _difference,
    "Mul": _product,
    "Div": _quotient,
    "GlobalAveragePool": _global_average,
    "ReduceMean": _mean,
    "AveragePool": _average,
    "MaxPool": _maximum,
    "Resize": _enlarged,
    "Upsample": _enlarged,
    "Transpose": _permuted,
    "Concat": _joined,
    "BatchNormalization": _normalized,
}
