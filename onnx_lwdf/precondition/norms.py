"""BatchNormalizations that stay in the graph, because no layer could take them up: behind a Concat, an Add, a pool.

    y = gamma (x - mean) / sqrt(v + epsilon) + beta

reads channels that were multiplied by s where gamma is divided by s and the mean is multiplied by it, and puts out channels
multiplied by s where gamma and beta are. The function stays, exactly but for float32.

What the grids of its input add in the mean, its stored mean takes up, as the bias of a layer does: it may amplify a channel
that hardly varies, and whose every value one code stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_lwdf.activations.taps import Samples
from onnx_lwdf.graph import Graph, operator
from onnx_lwdf.precondition.fold import is_batchnorm, parameters
from onnx_lwdf.ranges import F64, ActivationGrid

GAMMA, BETA, MEAN = 1, 2, 3  # places among the node's inputs


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """One of them, of constant parameters."""

    node: onnx.NodeProto
    channels: int

    @property
    def input(self) -> str:
        """The tensor that it reads."""
        return str(self.node.input[0])

    @property
    def output(self) -> str:
        """The tensor that it puts out."""
        return str(self.node.output[0])


def find_norms(graph: Graph) -> list[Norm]:
    """All of them, in graph order."""
    known = ((node, parameters(graph, node)) for node in graph.nodes if is_batchnorm(node))
    return [Norm(node, len(values[0])) for node, values in known if values is not None]


def change_norm_input(graph: Graph, norm: Norm, factor: F64, shift: F64 | None = None) -> None:
    """Let it read factor (x - shift) in place of x, [channels] each."""
    _change(graph, norm, {GAMMA: 1 / factor, MEAN: factor}, MEAN, shift)


def change_norm_output(graph: Graph, norm: Norm, factor: F64, shift: F64 | None = None) -> None:
    """Let it put out factor (y - shift) in place of y, [channels] each."""
    _change(graph, norm, {GAMMA: factor, BETA: factor}, BETA, shift)


def mean_shifts(graph: Graph, grids: Mapping[str, ActivationGrid], samples: Samples) -> dict[str, F64]:
    """Output of a normalization -> [channels], what the grids of its input add in the mean, where that was sampled."""
    found: dict[str, F64] = {}
    for norm in find_norms(graph) if grids else ():
        values = _exact_and_stored(graph, norm.input, grids, samples)
        if values is not None and len(values[0]) == norm.channels:
            found[norm.output] = (values[1] - values[0]).mean(1)
    return found


def take_up(graph: Graph, shifts: Mapping[str, F64]) -> None:
    """Let the normalizations that put out these tensors expect the means of their inputs moved by so much."""
    for norm in (norm for norm in find_norms(graph) if norm.output in shifts):
        _change(graph, norm, {MEAN: np.ones(norm.channels)}, MEAN, -shifts[norm.output])


def _exact_and_stored(
    graph: Graph, tensor: str, grids: Mapping[str, ActivationGrid], samples: Samples
) -> tuple[F64, F64] | None:
    """Values of a tensor, or of those that a Concat lines up, as they are and behind the grids: [channels, values] each."""
    node = graph.producer.get(tensor)
    if node is not None and operator(node) == "Concat":
        parts = [_exact_and_stored(graph, name, grids, samples) for name in node.input]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or len({part[0].shape[1] for part in known}) > 1:
            return None
        exact, stored = (np.concatenate([part[i] for part in known]) for i in range(2))
    elif tensor in samples.values:
        exact = stored = samples.values[tensor].astype(np.float64)
    else:
        return None
    return exact, grids[tensor].quantize(stored) if tensor in grids else stored


def _change(graph: Graph, norm: Norm, factors: Mapping[int, F64], moved: int, shift: F64 | None) -> None:
    """Multiply these parameters; the one that moves, behind its shift."""
    for index, factor in factors.items():
        name = norm.node.input[index]
        old = graph.constant(name)
        assert old is not None, norm.output
        value = old.astype(np.float64) - (shift if shift is not None and index == moved else 0.0)
        graph.set_input(norm.node, index, (value * factor).astype(old.dtype), name)
