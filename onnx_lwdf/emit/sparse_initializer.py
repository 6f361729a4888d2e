"""Storage in ONNX's own sparse tensors, for tools that read them.

A value takes eight bytes for its index beside its own. onnxruntime makes a dense tensor of it at load. The full check of
onnx's checker rejects a Conv fed by one: its shape inference knows no sparse weights.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_lwdf.emit import dense
from onnx_lwdf.emit.stored import Values, smallest
from onnx_lwdf.graph import Graph


def store(graph: Graph, stem: str, values: Values, bits: int, kind: int) -> str:
    """The nonzero values and their flat indices where that is smaller, else all values."""
    return smallest((dense.store, _store), stem, values, bits, kind)(graph, stem, values, bits, kind)


def warnings(model: onnx.ModelProto) -> tuple[str, ...]:
    """What a report must say of a model that holds sparse initializers."""
    count = len(model.graph.sparse_initializer)
    text = f"onnx's full check rejects the {count} layers that read a sparse initializer; onnxruntime runs them"
    return (text,) if count else ()


def _store(graph: Graph, stem: str, values: Values, bits: int, kind: int) -> str:
    name, flat = graph.unique(f"{stem}.nonzero"), values.ravel()
    index = np.flatnonzero(flat)
    sparse = onnx.SparseTensorProto(
        values=numpy_helper.from_array(flat[index], name), indices=numpy_helper.from_array(index), dims=values.shape
    )
    graph.model.graph.sparse_initializer.append(sparse)
    return name if helper.np_dtype_to_tensor_dtype(values.dtype) == kind else graph.add_folded("Cast", [name], to=kind)
