"""The backward pass as an ONNX graph of its own, appended to the forward one operator by operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lwdf.activations.taps import Align, Feed, replace_aligned, samples_in
from onnx_lwdf.graph import Graph, before_softmax, operator
from onnx_lwdf.runtime import Array, copy_of, open_session, run
from onnx_lwdf.statistics import Statistics

MOST_CHANNELS = 4096  # of a tensor

Shape = tuple[int, ...]
Rule = Callable[["Backward", onnx.NodeProto, str], bool]  # gives gradients to what the node reads; False: it cannot


@dataclass
class Backward:
    """The forward graph and the backward one behind it, as far as it is built."""

    graph: Graph
    feed: Feed
    statistics: Statistics
    align: Align | None
    rules: Mapping[str, Rule]
    shapes: dict[str, Shape] = field(init=False)  # of every tensor, for the feed
    seeds: dict[str, tuple[str, float]] = field(init=False, default_factory=dict)  # tensor -> its seed, its scale
    parts: dict[str, list[str]] = field(init=False, default_factory=dict)  # tensor -> what adds up to its gradient
    whole: dict[str, str] = field(init=False, default_factory=dict)  # tensor -> its gradient
    blocked: set[str] = field(init=False, default_factory=set)  # tensors whose gradient misses something
    original: dict[str, str] = field(init=False, default_factory=dict)  # aligned tensor -> the one it stands for

    def __post_init__(self) -> None:
        graph = self.graph
        nodes = list(graph.nodes)
        outer = [name for node in nodes if self._rule(node) is None for name in node.input if name]
        ends = list(dict.fromkeys(before_softmax(graph, name) for name in (*graph.outputs, *outer)))
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

    def _through(self, node: onnx.NodeProto) -> None:
        outputs = [name for name in node.output if name in self.parts or name in self.blocked]
        if not outputs:
            return
        rule, name = self._rule(node), node.output[0]
        if rule is not None and (outputs != [name] or name in self.blocked):
            self._block(node)
        if name in self.parts:
            first, *others = self.parts[name]
            for other in others:
                first = self.add("Add", [first, other])
            self.whole[name] = first
            if rule is not None and not rule(self, node, first):
                self._block(node)

    def _rule(self, node: onnx.NodeProto) -> Rule | None:
        return self.rules.get(operator(node))

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
