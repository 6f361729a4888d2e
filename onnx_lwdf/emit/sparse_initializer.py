"""Storage in ONNX's own sparse tensors, for tools that read them.

A value takes eight bytes for its index beside its own. onnxruntime makes a dense tensor of it at load. The full check of
onnx's checker rejects a Conv fed by one: its shape inference knows no sparse weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_lwdf.emit import dense
from onnx_lwdf.emit.stored import Held, Values, smallest
from onnx_lwdf.graph import Graph


def store(graph: Graph, tensors: Sequence[Values]) -> list[Held]:
    """The nonzero values and their flat indices where that is smaller, else all values."""
    return smallest((dense.store, _store_all), graph, tensors)


def warnings(model: onnx.ModelProto) -> tuple[str, ...]:
    """What a report must say of a model that holds sparse initializers."""
    count = len(model.graph.sparse_initializer)
    text = f"onnx's full check rejects the {count} layers that read a sparse initializer; onnxruntime runs them"
    return (text,) if count else ()


def _store_all(graph: Graph, tensors: Sequence[Values]) -> list[Held]:
    return [_store(graph, values) for values in tensors]


def _store(graph: Graph, values: Values) -> Held:
    name, flat = graph.unique(f"{values.stem}.nonzero"), values.data.ravel()
    index = np.flatnonzero(flat)
    sparse = onnx.SparseTensorProto(
        values=numpy_helper.from_array(flat[index], name),
        indices=numpy_helper.from_array(index),
        dims=values.data.shape,
    )
    graph.model.graph.sparse_initializer.append(sparse)
    own = helper.np_dtype_to_tensor_dtype(flat.dtype)
    name = name if own == values.kind else graph.add_folded("Cast", [name], to=values.kind)
    return Held(name, flat[index].nbytes + index.nbytes)
