"""A model of other float types is read as its float32 twin, and written with the inputs and outputs that it had.

onnxruntime computes convolutions in float32 on a CPU: a float16 one between Casts, a bfloat16 or double one not at all.
So weights, constants and Casts become float32, and the Casts that did nothing but change the type go away. In the file
that is written, Casts stand at the inputs and outputs whose type was another one, and weights of a model that stored them
in two bytes are stored in two bytes again, behind a Cast that onnxruntime folds at load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference

from onnx_lwdf.errors import ModelError
from onnx_lwdf.graph import Graph, attribute, operator, subgraphs
from onnx_lwdf.runtime import first_line

_T = onnx.TensorProto
VALUE_BYTES: Mapping[int, int] = {_T.FLOAT: 4, _T.FLOAT16: 2, _T.BFLOAT16: 2, _T.DOUBLE: 8}
TYPE_ATTRIBUTES = (
    "to",
    "dtype",
    "output_dtype",
    "output_datatype",
    "stash_type",
)  # of standard operators that hold an ONNX type
CAST_BYTES = 128  # of a file, that a Cast and its names take
HALVING_ERROR = 1e-6  # of a tensor's energy: the rounding of float16 is below 1e-7 where nothing overflows or vanishes


@dataclass(frozen=True, slots=True)
class Precision:
    """The float types that a model had."""

    weights: int = _T.FLOAT  # ONNX type of most values
    interface: Mapping[str, int] = field(default_factory=dict)  # input or output -> ONNX type that was not float32

    @property
    def value_bytes(self) -> int:
        """Of most weights."""
        return VALUE_BYTES[self.weights]

    @property
    def note(self) -> str | None:
        """What is to be said of it, None of a float32 model."""
        if self == FLOAT32:
            return None
        types = dict.fromkeys([*self.interface.values(), self.weights])
        words = " and ".join(_T.DataType.Name(kind).lower() for kind in types if kind != _T.FLOAT)
        return f"the model is {words}: the file computes in float32 and keeps the types of its inputs and outputs"


FLOAT32 = Precision()


def widen(model: onnx.ModelProto) -> Precision:
    """Make the model its float32 twin, in place; the types that it had.

    A float32 model in which a Cast or a number is of another type stays as it is. Raises ModelError where an input or
    output of another type is no tensor.
    """
    weights, inputs = {tensor.name for tensor in model.graph.initializer}, model.graph.input
    ends = [*(info for info in inputs if info.name not in weights), *model.graph.output]
    values = Counter(_values(model))
    if set(values) | {kind for info in ends for kind in _kinds(info.type)} <= {_T.FLOAT}:
        return FLOAT32
    interface = {info.name: _kind(info) for info in ends if _other(info.type)}
    for graph in _graphs(model):
        for info in (*graph.input, *graph.output, *graph.value_info):
            _retype(info.type)
        for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
            _widen(tensor)
    for node in _nodes(model):
        for item in node.attribute:
            for tensor in (item.t, *item.tensors, item.sparse_tensor.values):
                _widen(tensor)
            if item.name in TYPE_ATTRIBUTES and item.i in VALUE_BYTES and node.domain in ("", "ai.onnx"):
                item.i = _T.FLOAT
    _drop_casts(model)
    return Precision(max(values, key=lambda kind: values[kind], default=_T.FLOAT), interface)


def halve(graph: Graph) -> None:
    """Store float32 tensors in two bytes a value, where that loses nothing to speak of and saves more than its Cast takes."""
    for name, proto in list(graph.initializers.items()):
        read = [operator(reader) for reader in graph.consumers[name]]
        apart = name.endswith(".scale") or name in graph.outputs or name in graph.captured
        if proto.data_type != _T.FLOAT or apart or "QuantizeLinear" in read or "DequantizeLinear" in read:
            continue
        value = graph.constant(name)
        assert value is not None, name
        if value.nbytes // 2 <= CAST_BYTES:
            continue
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        exact = value.astype(np.float64)
        if not ((exact - half) ** 2).sum() <= HALVING_ERROR * (exact**2).sum():
            continue
        readers = list(graph.consumers[name])
        graph.overwrite(name, half)
        graph.reroute(readers, name, graph.add("Cast", [name], f"{name}.float", to=_T.FLOAT))
    graph.commit()


def restore(graph: Graph, interface: Mapping[str, int]) -> None:
    """Give inputs and outputs the types that they had, with Casts to and from the float32 tensors inside."""
    for name in graph.inputs:
        if name in interface:
            _reread(graph, name, graph.add("Cast", [name], f"{name}.float", to=_T.FLOAT))
    for name in graph.outputs:
        if name not in interface or name in graph.inputs:
            continue
        if name in graph.initializers:
            inner = graph.add_constant(f"{name}.float", np.array(graph.constant(name)))
            del graph.initializers[name]
        else:
            inner = graph.move_output(name)
        _reread(graph, name, inner)
        graph.rename(graph.add("Cast", [inner], f"{name}.cast", to=interface[name]), name)
    graph.commit()
    for info in (*graph.model.graph.input, *graph.model.graph.output, *graph.model.graph.value_info):
        if info.name in interface:
            info.type.tensor_type.elem_type = interface[info.name]


def _reread(graph: Graph, tensor: str, other: str) -> None:
    """Let all that reads the tensor read the other one, but who makes that from this."""
    maker = graph.producer.get(other)
    graph.reroute([reader for reader in graph.consumers[tensor] if reader is not maker], tensor, other)
    for node in graph.nodes:
        for inner in _inner(node):
            for place, name in enumerate(inner.input):
                if name == tensor:
                    inner.input[place] = other
    graph.reindex()


def _drop_casts(model: onnx.ModelProto) -> None:
    """Take out Casts from float32 to float32; those behind which an output stands or from which others read remain."""
    try:
        inferred = shape_inference.infer_shapes(model).graph
    except Exception as error:  # it raises InferenceError, ValueError and others
        raise ModelError(
            f"the types of the model's tensors are not known: {first_line(error)}; export it in float32"
        ) from error
    infos = (*inferred.input, *inferred.output, *inferred.value_info)
    float32 = {info.name for info in infos if info.type.tensor_type.elem_type == _T.FLOAT}
    float32 |= {tensor.name for tensor in inferred.initializer if tensor.data_type == _T.FLOAT}
    graph = Graph(model)
    for node in list(graph.nodes):
        if operator(node) != "Cast" or attribute(node, "to") != _T.FLOAT or node.input[0] not in float32:
            continue
        source, target = node.input[0], node.output[0]
        maker = graph.producer.get(source)
        if target not in graph.outputs and target not in graph.captured:
            graph.reroute(list(graph.consumers[target]), target, source)
            graph.remove(node)
        elif maker is not None and len(maker.output) == 1 and graph.sole_consumer(source) is node:
            graph.merge_into(maker, node)
    graph.commit()


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    yield model.graph
    for node in _nodes(model):
        yield from subgraphs(node)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those of local functions and of graphs inside others too."""
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        yield node
        yield from _inner(node)


def _inner(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    for graph in subgraphs(node):
        for inner in graph.node:
            yield inner
            yield from _inner(inner)


def _values(model: onnx.ModelProto) -> dict[int, int]:
    """Float type -> number of values in constants of it with more than one axis, which are what weights are."""
    tensors = [tensor for graph in _graphs(model) for tensor in graph.initializer]
    tensors += [item.t for node in _nodes(model) if operator(node) == "Constant" for item in node.attribute]
    found: Counter[int] = Counter()
    for tensor in tensors:
        if tensor.data_type in VALUE_BYTES and len(tensor.dims) > 1:
            found[tensor.data_type] += int(np.prod(tensor.dims))
    return found


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type not in VALUE_BYTES or tensor.data_type == _T.FLOAT:
        return
    with np.errstate(over="ignore"):  # a bound beyond float32's range is none
        value = np.asarray(numpy_helper.to_array(tensor), np.float32)
    name, doc = tensor.name, tensor.doc_string
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    if doc:
        tensor.doc_string = doc


def _tensor_types(kind: onnx.TypeProto) -> Iterator[onnx.TypeProto.Tensor | onnx.TypeProto.SparseTensor]:
    """The types of the tensors that a value of this type holds."""
    word = kind.WhichOneof("value")
    if word in ("tensor_type", "sparse_tensor_type"):
        yield getattr(kind, word)
    elif word in ("sequence_type", "optional_type"):
        yield from _tensor_types(getattr(kind, word).elem_type)


def _kinds(kind: onnx.TypeProto) -> set[int]:
    """Its float types."""
    return {part.elem_type for part in _tensor_types(kind)} & set(VALUE_BYTES)


def _other(kind: onnx.TypeProto) -> bool:
    return bool(_kinds(kind) - {_T.FLOAT})


def _kind(info: onnx.ValueInfoProto) -> int:
    if not info.type.HasField("tensor_type"):
        raise ModelError(f"{info.name!r} holds tensors that are not float32 and is none itself; export it in float32")
    return info.type.tensor_type.elem_type


def _retype(kind: onnx.TypeProto) -> None:
    for part in _tensor_types(kind):
        if part.elem_type in VALUE_BYTES:
            part.elem_type = _T.FLOAT
