"""What an emitter is given for each layer, laid out as the model stores weights, and how storages compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Layer
from onnx_lwdf.ranges import ActivationGrid

OPERATOR_BYTES = 40  # that an operator must save, beside its own size, for the time that folding it takes at load

Values = npt.NDArray[np.int8] | npt.NDArray[np.float32]  # codes, or a weight that stays float

# Writes values under names that begin with a stem: (graph, stem, values, bits of the codes, ONNX type of the answer) -> the
# name of a tensor of the same values and shape, int8 or float.
Store = Callable[[Graph, str, Values, int, int], str]


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight on its grid: codes times one scale per output channel."""

    codes: npt.NDArray[np.int8]  # the shape of the model's weight
    scale: npt.NDArray[np.float32]  # [scales], along `axis`
    axis: int  # of the weight, along which the scales run
    bits: int  # all codes are in code_range(bits)


@dataclass(frozen=True, slots=True)
class Stored:
    """One layer's solution."""

    layer: Layer
    weight: npt.NDArray[np.float32]  # the shape of the model's weight
    rounded: Rounded | None  # the same weight as codes; None: its values are float
    bias: npt.NDArray[np.float64]  # [out]
    grid: ActivationGrid | None  # of the input; None: the input is float


def smallest(stores: Sequence[Store], stem: str, values: Values, bits: int, kind: int) -> Store:
    """The store that takes the fewest bytes of a file for these values; the first of equals.

    Operators count, and a little more for the time that they take at load; constants that layers share do not.
    """
    return min(stores, key=lambda store: stored_bytes(store, stem, values, bits, kind, OPERATOR_BYTES))


def stored_bytes(store: Store, stem: str, values: Values, bits: int, kind: int, operator: int = 0) -> int:
    """What the store adds to a file, and so many bytes more for each operator."""
    scratch = Graph(onnx.ModelProto())
    store(scratch, stem, values, bits, kind)
    own = [tensor for name, tensor in scratch.initializers.items() if name not in scratch.shared.values()]
    written = sum(proto.ByteSize() for proto in (*scratch.nodes, *own, *scratch.model.graph.sparse_initializer))
    return written + operator * len(scratch.nodes)
