"""Storage as plain initializers: one byte per code, four per float; zeros stay in place."""

from __future__ import annotations

import onnx
from onnx import helper

from onnx_lwdf.emit.stored import Values
from onnx_lwdf.graph import Graph


def store(graph: Graph, stem: str, values: Values, bits: int, kind: int) -> str:
    """The values as they are."""
    own = helper.np_dtype_to_tensor_dtype(values.dtype)
    name = graph.add_constant(f"{stem}.{'codes' if own == onnx.TensorProto.INT8 else 'values'}", values)
    return name if own == kind else graph.add_folded("Cast", [name], to=kind)
