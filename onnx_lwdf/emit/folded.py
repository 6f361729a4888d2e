"""Weights of layers with float activations cost no time: integer codes, Cast, Mul.

onnxruntime folds Cast and Mul of constants when it loads the file (a DequantizeLinear it does not fold, it would run at
every inference). The file holds the codes, the session holds floats, the speed is float's.
"""

from __future__ import annotations

from onnx_lwdf.emit.stored import Held, Rounded
from onnx_lwdf.graph import Graph


def weight(graph: Graph, stem: str, codes: Held, rounded: Rounded) -> Held:
    """The float weight of a float tensor that holds its codes."""
    shape = [1] * rounded.codes.ndim
    shape[rounded.axis] = -1
    scale = graph.add_constant(f"{stem}.scale", rounded.scale.reshape(shape))
    return Held(graph.add("Mul", [codes.tensor, scale], f"{stem}.stored"), codes.bytes + rounded.scale.nbytes)
