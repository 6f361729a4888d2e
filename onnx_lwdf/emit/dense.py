"""Storage as plain initializers: one byte per code, four per float; zeros stay in place."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import helper

from onnx_lwdf.emit.stored import Held, Values
from onnx_lwdf.graph import Graph


def store(graph: Graph, tensors: Sequence[Values]) -> list[Held]:
    """The values as they are."""
    return [_store(graph, values) for values in tensors]


def _store(graph: Graph, values: Values) -> Held:
    own = helper.np_dtype_to_tensor_dtype(values.data.dtype)
    name = graph.add_constant(f"{values.stem}.{'codes' if own == onnx.TensorProto.INT8 else 'values'}", values.data)
    name = name if own == values.kind else graph.add_folded("Cast", [name], to=values.kind)
    return Held(name, values.data.nbytes)
