"""Storage as plain initializers: one byte per code, four per float; zeros stay in place."""

from __future__ import annotations

import numpy as np

from onnx_lwdf.emit.stored import Values
from onnx_lwdf.graph import Graph


def store(graph: Graph, stem: str, values: Values, bits: int) -> str:
    """The values as they are; the tensor's name."""
    return graph.add_constant(f"{stem}.{'codes' if values.dtype == np.int8 else 'values'}", values)
