"""Float storage: the weights as the model's own kind of initializers, for what is pruned and not rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_lwdf.emit.stored import Stored
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import set_bias, set_weight, to_canonical
from onnx_lwdf.ranges import ActivationGrid
from onnx_lwdf.sites import Site


def emit(
    graph: Graph, layers: Sequence[Stored], sites: Sequence[Site], grids: Mapping[str, ActivationGrid], signed: bool
) -> None:
    """Write the weights as float32; activations stay float."""
    for stored in layers:
        if not np.array_equal(stored.weight, np.asarray(graph.constant(stored.layer.weight))):
            set_weight(graph, stored.layer, to_canonical(stored.layer, stored.weight))
        if stored.bias.any() or len(stored.layer.node.input) > 2:
            set_bias(graph, stored.layer, np.asarray(stored.bias))
