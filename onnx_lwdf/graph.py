"""An index over a ModelProto and in-place edits of it.

onnx-graphsurgeon folds constants (their values are only read here); the ModelProto itself is edited in place, because
a round trip through graphsurgeon drops metadata, doc strings and quantization annotations.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper
from onnx_graphsurgeon.logger import G_LOGGER

from onnx_lwdf.errors import ModelError
from onnx_lwdf.mapped import Scratch, is_mapped, values_of, without_mapped
from onnx_lwdf.runtime import Array, copy_of, first_line, quiet_sessions

AXES_ARE_INPUTS = 13  # of Squeeze and Unsqueeze, from this operator set on
LARGE_BYTES = 2**22  # of a value that is read anew from the model each time it is wanted

log = logging.getLogger(__name__)


class Graph:
    """The top graph of a model with who makes and who reads each tensor.

    Nodes are held in `nodes`; `commit()` writes them back to the model in topological order and drops what no longer
    leads to an output.
    """

    def __init__(self, model: onnx.ModelProto, scratch: Scratch | None = None) -> None:
        """`scratch`: where large values go that are written; None: into the model."""
        self.model = model
        self.scratch = scratch
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.initializers: dict[str, onnx.TensorProto] = {t.name: t for t in model.graph.initializer}
        self.inputs = [v.name for v in model.graph.input if v.name not in self.initializers]
        self.outputs = [v.name for v in model.graph.output]
        self._values: dict[str, Array] = {}
        self._folded: dict[str, Array] | None = None
        self.shared: dict[tuple[str, tuple[int, ...], bytes], str] = {}  # dtype, shape, value -> initializer
        self.reindex()

    @property
    def opset(self) -> int:
        """The version of the default operator set."""
        return next((o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")), 1)

    def reindex(self) -> None:
        """Rebuild the index after edits of `nodes` or their inputs and outputs."""
        self.producer: dict[str, onnx.NodeProto] = {}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self.captured: set[str] = set()  # names that a subgraph (If, Loop, Scan) reads from outside
        for node in self.nodes:
            for name in node.output:
                if name:
                    self.producer[name] = node
            for name in dict.fromkeys(node.input):
                if name:
                    self.consumers[name].append(node)
            self.captured.update(_captured(node))
        self._names = {
            *self.producer,
            *self.consumers,
            *self.initializers,
            *self.inputs,
            *self.captured,
            *(node.name for node in self.nodes),
        }

    def sole_consumer(self, tensor: str) -> onnx.NodeProto | None:
        """The only node that reads the tensor, None where it is an output, is captured, or has several readers."""
        readers = self.consumers.get(tensor, [])
        if len(readers) != 1 or tensor in self.outputs or tensor in self.captured:
            return None
        return readers[0]

    def constant(self, tensor: str) -> Array | None:
        """The tensor's value where it is known: an initializer, a Constant, or folded from such. Read only."""
        if tensor in self._values:
            return self._values[tensor]
        value = self._read_constant(tensor)
        if value is not None:
            value.flags.writeable = False
            if value.nbytes < LARGE_BYTES:
                self._values[tensor] = value
        return value

    def _read_constant(self, tensor: str) -> Array | None:
        if tensor in self.initializers:
            return _array(self.initializers[tensor])
        node = self.producer.get(tensor)
        if node is None:
            return None
        if operator(node) == "Constant":
            return _constant_value(node)
        if operator(node) == "Identity":
            value = self.constant(node.input[0])
            return None if value is None else np.array(value)
        if self._folded is None:
            self._folded = _fold(self.model)
        value = self._folded.get(tensor)
        return None if value is None else np.array(value)

    def unique(self, stem: str) -> str:
        """A tensor or node name that is not in use, and is from now on."""
        name, count = stem, 1
        while name in self._names:
            name, count = f"{stem}_{count}", count + 1
        self._names.add(name)
        return name

    def add_constant(self, stem: str, value: npt.ArrayLike) -> str:
        """A new initializer under a fresh name; its name."""
        name = self.unique(stem)
        self.overwrite(name, value)
        return name

    def shared_constant(self, value: npt.ArrayLike) -> str:
        """An initializer of this value for all who ask for it, such as a shape; its name."""
        array = np.asarray(value, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.shared:
            self.shared[key] = self.add_constant("constant", array)
        return self.shared[key]

    def set_input(self, node: onnx.NodeProto, index: int, value: Array, stem: str) -> None:
        """Make the node's input a constant of this value: its own initializer is overwritten, a shared one is not."""
        while len(node.input) <= index:
            node.input.append("")
        name = node.input[index]
        own = name in self.initializers and self.sole_consumer(name) is node and list(node.input).count(name) == 1
        if own:
            self.overwrite(name, value)
            return
        self.connect(node, index, self.add_constant(stem, value))

    def connect(self, node: onnx.NodeProto, index: int, tensor: str) -> None:
        """Let the node read this tensor at this input."""
        old = node.input[index]
        node.input[index] = tensor
        if old and old not in node.input:
            self.consumers[old] = [reader for reader in self.consumers[old] if reader is not node]
        if all(reader is not node for reader in self.consumers[tensor]):
            self.consumers[tensor].append(node)

    def reroute(self, readers: Iterable[onnx.NodeProto], tensor: str, other: str) -> None:
        """Let nodes that read the tensor read the other one."""
        for reader in readers:
            for index, name in enumerate(reader.input):
                if name == tensor:
                    self.connect(reader, index, other)

    def set_outputs(self, names: Iterable[str]) -> None:
        """Let these tensors be what the model puts out."""
        self.outputs = list(dict.fromkeys(names))
        del self.model.graph.output[:]
        self.model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in self.outputs)

    def restore(self, model: onnx.ModelProto) -> None:
        """Be this model, whatever was edited."""
        self.model.CopyFrom(model)
        self.__init__(self.model, self.scratch)  # type: ignore[misc]  # the same state, read anew

    def overwrite(self, name: str, value: npt.ArrayLike) -> None:
        """Let the initializer of this name have this value."""
        array = np.asarray(value, order="C")
        proto = numpy_helper.from_array(array, name) if self.scratch is None else self.scratch.tensor(array, name)
        if name in self.initializers:
            doc = self.initializers[name].doc_string
            self.initializers[name].CopyFrom(proto)
            if doc:
                self.initializers[name].doc_string = doc
        else:
            self.initializers[name] = proto
        self._values.pop(name, None)

    def add(self, op: str, inputs: Iterable[str], stem: str, **attributes: Any) -> str:
        """Append a node with one output of a fresh name; the output's name."""
        return self._append(op, inputs, self.unique(stem), name=self.unique(f"{stem}/{op}"), **attributes)

    def add_folded(self, op: str, inputs: Iterable[str], **attributes: Any) -> str:
        """As `add`, for a step in the middle of constants: a file holds hundreds of them, and names take bytes."""
        return self._append(op, inputs, self.unique(f"folded.{len(self.nodes)}"), **attributes)

    def add_split(self, tensor: str, sizes: Sequence[int]) -> list[str]:
        """Cut a tensor along its first axis into parts of these sizes; their names. As `add_folded`."""
        first = self.add_folded("Split", [tensor, self.shared_constant(np.array(sizes))])
        node = self.producer[first]
        node.output.extend(self.unique(f"{first}.{place}") for place in range(1, len(sizes)))
        self.producer.update(dict.fromkeys(node.output, node))
        return list(node.output)

    def _append(self, op: str, inputs: Iterable[str], output: str, **attributes: Any) -> str:
        node = onnx.helper.make_node(op, list(inputs), [output], **attributes)
        self.nodes.append(node)
        self.producer[output] = node
        for name in dict.fromkeys(node.input):
            if name:
                self.consumers[name].append(node)
        return output

    def remove(self, node: onnx.NodeProto) -> None:
        """Take a node out; who reads its outputs must have been rewired before."""
        self.nodes = [other for other in self.nodes if other is not node]
        for name in node.input:
            self.consumers[name] = [reader for reader in self.consumers[name] if reader is not node]
        for name in node.output:
            if self.producer.get(name) is node:
                del self.producer[name]

    def move_output(self, tensor: str) -> str:
        """Give an output of the model a fresh inner name at its producer, so that its name is free; the inner name."""
        inner = self.unique(f"{tensor}.float")
        node = self.producer.pop(tensor)
        node.output[list(node.output).index(tensor)] = inner
        self.producer[inner] = node
        return inner

    def rename(self, tensor: str, name: str) -> str:
        """Let a tensor that nothing reads yet bear this free name."""
        node = self.producer.pop(tensor)
        node.output[list(node.output).index(tensor)] = name
        self.producer[name] = node
        return name

    def merge_into(self, node: onnx.NodeProto, follower: onnx.NodeProto) -> None:
        """The node takes over the single output of its only reader, which goes away; the output's name survives."""
        self.remove(follower)
        self.producer.pop(node.output[0], None)
        node.output[0] = follower.output[0]
        self.producer[node.output[0]] = node

    def keep(self, value: Array) -> Array:
        """An array that is wanted for long: the same, or in a file where the graph's large values are in files."""
        return value if self.scratch is None else self.scratch.keep(value)

    def twin(self) -> Graph:
        """A graph of its own over a snapshot."""
        return Graph(self.snapshot(), self.scratch)

    def snapshot(self) -> onnx.ModelProto:
        """A copy of the model as it is now, edits of initializers included; nodes must not be edited since the last commit."""
        copy = copy_of(self.model)
        self._write_initializers(copy.graph, self.initializers)
        return copy

    def commit(self) -> None:
        """Write the edits to the model: nodes sorted, what became useless dropped."""
        live = self._live()
        nodes = _sorted([node for node in self.nodes if id(node) in live])
        protos = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        used = {name for node in nodes for name in (*node.input, *_captured(node))} | set(self.outputs)
        graph = self.model.graph
        del graph.node[:]
        graph.node.extend(protos)
        tensors = {name: tensor for name, tensor in self.initializers.items() if name in used}
        self._write_initializers(graph, tensors)
        made = {name for node in nodes for name in node.output} | set(tensors) | set(self.inputs)
        kept = [info for info in graph.value_info if info.name in made]
        if len(kept) != len(graph.value_info):
            copies = [onnx.ValueInfoProto.FromString(info.SerializeToString()) for info in kept]
            del graph.value_info[:]
            graph.value_info.extend(copies)
        self.__init__(self.model, self.scratch)  # type: ignore[misc]  # the same state, read anew from the written model

    def _write_initializers(self, graph: onnx.GraphProto, tensors: Mapping[str, onnx.TensorProto]) -> None:
        """Let the model's graph, or a copy of it, hold these. Those that it has stay where they are: protobuf gives memory
        back when the whole model goes.
        """
        held = list(self.model.graph.initializer)
        for place in reversed(range(len(held))):
            if tensors.get(held[place].name) is not held[place]:
                del graph.initializer[place]
        there = {tensor.name for tensor in graph.initializer}
        graph.initializer.extend(tensor for name, tensor in tensors.items() if name not in there)

    def _live(self) -> set[int]:
        """Ids of the nodes that an output depends on."""
        live: set[int] = set()
        wanted = [*self.outputs]
        while wanted:
            node = self.producer.get(wanted.pop())
            if node is None or id(node) in live:
                continue
            live.add(id(node))
            wanted.extend(name for name in (*node.input, *_captured(node)) if name)
        return live


def node_name(node: onnx.NodeProto) -> str:
    """The node's name, or one made of its operator and output where it has none."""
    return node.name or f"{node.op_type}:{node.output[0]}"


def operator(node: onnx.NodeProto) -> str:
    """`Conv`, or `domain::Conv` where it is not ONNX's own: such a one may do anything under a known name."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def before_softmax(graph: Graph, name: str) -> str:
    """What decides stands in front of it: behind it, a confident answer has no slope. A Sigmoid's values are answers."""
    node = graph.producer.get(name)
    plain = ("Softmax", "LogSoftmax", "Identity")
    return before_softmax(graph, node.input[0]) if node is not None and operator(node) in plain else name


def axes_of(graph: Graph, node: onnx.NodeProto) -> list[int]:
    """The axes that a node names, by its attribute or, in later operator sets, its second input; none where that is open."""
    named = graph.constant(node.input[1]) if len(node.input) > 1 else attribute(node, "axes", None)
    return [] if named is None else [int(axis) for axis in named]


def names_sizes(node: onnx.NodeProto) -> bool:
    """Whether a Resize names the sizes of what it puts out, that of the channels among them, in place of factors."""
    return operator(node) == "Resize" and len(node.input) > 3 and bool(node.input[3])


def set_axes(graph: Graph, node: onnx.NodeProto, axes: Sequence[int]) -> None:
    """Let a Squeeze or an Unsqueeze name these axes."""
    drop_attributes(node, "axes")
    del node.input[1:]
    if graph.opset < AXES_ARE_INPUTS:
        node.attribute.append(onnx.helper.make_attribute("axes", axes))
    else:
        node.input.append(graph.shared_constant(np.array(axes, np.int64)))


def drop_attributes(node: onnx.NodeProto, *names: str) -> None:
    """Take the attributes of these names from the node."""
    for place in reversed(range(len(node.attribute))):
        if node.attribute[place].name in names:
            del node.attribute[place]


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The attribute's value, or the default."""
    for item in node.attribute:
        if item.name == name:
            value = onnx.helper.get_attribute_value(item)
            return value.decode() if isinstance(value, bytes) else value
    return default


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes (If, Loop, Scan)."""
    for item in node.attribute:
        if item.type == onnx.AttributeProto.GRAPH:
            yield item.g
        yield from item.graphs


def _captured(node: onnx.NodeProto) -> set[str]:
    names: set[str] = set()
    for graph in subgraphs(node):
        for inner in graph.node:
            names.update(inner.input)
            names |= _captured(inner)
        names.update(value.name for value in graph.output)
    return names


def _array(tensor: onnx.TensorProto) -> Array:
    try:
        return values_of(tensor) if is_mapped(tensor) else np.asarray(numpy_helper.to_array(tensor))
    except Exception as error:  # onnx raises ValueError, TypeError and others on what does not fit together
        raise ModelError(
            f"tensor {tensor.name!r} cannot be read: {first_line(error)}; export the model again"
        ) from error


def _constant_value(node: onnx.NodeProto) -> Array | None:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        value = attribute(node, name)
        if isinstance(value, onnx.TensorProto):
            return _array(value)
        if value is not None:
            return np.array(value, np.float32 if "float" in name else np.int64)
    return None


def _sorted(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Stable topological order: a node is placed once its producers are."""
    producer = {name: node for node in nodes for name in node.output if name}
    placed: dict[int, onnx.NodeProto] = {}
    for root in nodes:
        stack = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if id(node) in placed:
                continue
            if ready:
                placed[id(node)] = node
                continue
            stack.append((node, True))
            sources = (producer.get(name) for name in (*node.input, *sorted(_captured(node))))
            stack.extend((source, False) for source in sources if source is not None and id(source) not in placed)
    return list(placed.values())


def _fold(model: onnx.ModelProto) -> dict[str, Array]:
    """Values of what nodes make of constants alone, by onnx-graphsurgeon; empty where it cannot read the model."""
    G_LOGGER.severity = G_LOGGER.CRITICAL
    try:
        with quiet_sessions():
            folded = gs.import_onnx(without_mapped(model)).fold_constants(size_threshold=2**28)
        made = {name for node in model.graph.node for name in node.output}
        return {name: t.values for name, t in folded.tensors().items() if isinstance(t, gs.Constant) and name in made}
    except Exception as error:  # graphsurgeon raises whatever its parts raise
        log.debug("constants behind operators stay unknown: %s", error)
        return {}
