"""The paper's sampler: independent draws N(mean, deviation^2) for every channel and position, through the activation.

Horton et al., arXiv 2011.09058. The tensors that a BatchNormalization put out are replaced by draws; between them and
the next layers the network's own operators run, so activations clip them, joins add and concatenate them, and channels
are correlated by the network's structure alone. No image and no convolution is needed.
"""

from __future__ import annotations

import numpy as np

from onnx_lwdf.graph import Graph
from onnx_lwdf.statistics import ChannelStatistics


def align(graph: Graph, tensor: str, known: ChannelStatistics, shape: tuple[int, ...]) -> str:
    """In place of the tensor [N, C, ...]: independent Gaussian draws with the known statistics."""
    seed = float(len(graph.nodes))  # differs from draw to draw; onnxruntime's generator goes on from run to run
    draws = graph.add("RandomNormal", [], "draw", shape=list(shape), seed=seed)
    spatial = (1,) * (len(shape) - 2)
    scale = graph.add_constant("draw.deviation", known.deviation.astype(np.float32).reshape(1, -1, *spatial))
    shift = graph.add_constant("draw.mean", known.mean.astype(np.float32).reshape(1, -1, *spatial))
    return graph.add("Add", [graph.add("Mul", [draws, scale], "draw"), shift], "draw")
