"""How a layer's input varies: the covariance that its channels are judged and re-fitted by.

Behind a global pool there is one value per image, fewer than channels; the pool's own input has the same channels and
many positions. What merges channels at every position merges them on average too, so both count, at equal power:

    S = (S_pooled + c S_positions) / 2,    c = tr S_pooled / tr S_positions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_lwdf.activations.taps import Samples
from onnx_lwdf.graph import Graph, operator
from onnx_lwdf.layers import Layer
from onnx_lwdf.solvers.problem import F64

POOLS = ("GlobalAveragePool", "ReduceMean")
ARRANGING = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


def pooled_sources(graph: Graph, layers: Sequence[Layer]) -> dict[str, str]:
    """Layer name -> the tensor before the pool, for every layer whose input is a pool's output, rearranged at most."""
    found = {}
    for layer in layers:
        node = graph.producer.get(layer.input)
        while node is not None and operator(node) in ARRANGING:
            node = graph.producer.get(node.input[0])
        if node is not None and operator(node) in POOLS:
            found[layer.name] = node.input[0]
    return found


def spread(layer: Layer, samples: Samples, sources: Mapping[str, str]) -> F64:
    """[in, in] of a full layer: all but the mean, which its bias takes up where it has one."""
    moments = samples.moments[layer.name]
    mean, centered = moments.mean[0], layer.bias is not None
    own = moments.hessian[0] - (np.outer(mean, mean) if centered else 0)
    values = samples.values.get(sources.get(layer.name, ""))
    if values is None or len(values) != len(own):
        return np.asarray(own)
    inner = values.astype(np.float64)
    if centered:
        inner -= inner.mean(1, keepdims=True)
    positions = inner @ inner.T / inner.shape[1]
    power = float(np.trace(positions))
    return (own + positions * (float(np.trace(own)) / power)) / 2 if power > 0 else np.asarray(own)
