"""No inputs at all: of a layer's input x nothing is assumed but that every element counts the same,

    E[x] = 0,    H = E[x x^T] = I

so that the error of a weight is its own squared error, and no bias takes anything up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_lwdf.activations.moments import Moments
from onnx_lwdf.activations.taps import Samples
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Layer, input_blocks, shape_of


def isotropic(graph: Graph, layers: Sequence[Layer]) -> Samples:
    """Moments for every layer, values of no tensor."""
    return Samples({layer.name: _moments(graph, layer) for layer in layers}, {})


def _moments(graph: Graph, layer: Layer) -> Moments:
    groups, _, width = shape_of(graph, layer)
    if layer.op == "ConvTranspose":  # whose patches are single positions
        width //= layer.kernel_size
    blocks = input_blocks(graph, layer)
    groups, width = groups * blocks, width // blocks
    identity = np.broadcast_to(np.eye(width), (groups, width, width))
    return Moments(np.zeros((groups, width)), identity, np.zeros(groups), blocks)
