"""Weight-only storage that costs no time: integer codes, Cast, Mul.

onnxruntime folds Cast and Mul of constants when it loads the file (a DequantizeLinear it does not fold, it would run at
every inference). The file holds one byte per weight, the session holds floats, the speed is float's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from onnx_lwdf.emit.stored import Stored
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import set_bias
from onnx_lwdf.ranges import ActivationGrid
from onnx_lwdf.sites import Site


def emit(
    graph: Graph, layers: Sequence[Stored], sites: Sequence[Site], grids: Mapping[str, ActivationGrid], signed: bool
) -> None:
    """Write the weights as int8 codes behind Cast and Mul; activations stay float."""
    for stored in layers:
        node, stem, rounded = stored.layer.node, stored.layer.weight, stored.rounded
        assert rounded is not None, stored.layer.name
        shape = [1] * rounded.codes.ndim
        shape[rounded.axis] = -1
        codes = graph.add_constant(f"{stem}.codes", rounded.codes)
        scale = graph.add_constant(f"{stem}.scale", rounded.scale.reshape(shape))
        cast = graph.add("Cast", [codes], f"{stem}.cast", to=onnx.TensorProto.FLOAT)
        graph.connect(node, 1, graph.add("Mul", [cast, scale], f"{stem}.stored"))
        if stored.layer.bias is not None and (stored.bias.any() or len(node.input) > 2):
            set_bias(graph, stored.layer, np.asarray(stored.bias))
