"""Bounds that hold for every image: pixels have a range, and so has what a layer makes of them. For low <= x <= high

    y <= b + sum_k max(w_k low, w_k high, 0)

where the 0 stands for padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_lwdf.activations.inputs import InputSpec
from onnx_lwdf.graph import Graph, operator
from onnx_lwdf.layers import Layer, bias_of, weight_of
from onnx_lwdf.solvers.problem import F64

SAME_VALUES = ("Transpose", "Identity")

Range = tuple[float, float]


def pixel_ranges(graph: Graph, inputs: Sequence[InputSpec]) -> dict[str, Range]:
    """Tensor -> the lowest and the highest value that a pixel becomes; of inputs whose normalization is known."""
    ranges = {name: bounds for spec in inputs if not spec.vague for name, bounds in spec.ranges.items()}
    for node in graph.nodes:
        if operator(node) in SAME_VALUES and node.input[0] in ranges:
            ranges[node.output[0]] = ranges[node.input[0]]
    return ranges


def highest(graph: Graph, layer: Layer, ranges: Mapping[str, Range]) -> F64:
    """What no output channel of the layer exceeds, [out of all groups]; infinite where its input has no known range."""
    if layer.input not in ranges:
        return np.full(bias_of(graph, layer).shape, np.inf)
    low, high = ranges[layer.input]
    weight = weight_of(graph, layer)  # [groups, out, in]
    return bias_of(graph, layer) + np.maximum(np.maximum(weight * low, weight * high), 0).sum(-1).ravel()
