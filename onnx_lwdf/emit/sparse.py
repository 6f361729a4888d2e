"""Storage of the values that are not zero, each with its distance to the one before in a byte.

    index = CumSum(gaps),    weight = ScatterElements(zeros, index, values)

A gap over 255 is bridged by entries of value zero. The values are codes, packed where they are below 8 bits, or floats.
onnxruntime folds all of it at load. Per weight it takes density * (1 + bytes of a value): smaller than dense below a
density of 1/2 for 8-bit codes, of 4/5 for floats.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from onnx_lwdf.emit import packed
from onnx_lwdf.emit.stored import Held, Values, smallest
from onnx_lwdf.graph import Graph

LARGEST_GAP = 255

Array = npt.NDArray[np.int8] | npt.NDArray[np.float32]


def store(graph: Graph, tensors: Sequence[Values]) -> list[Held]:
    """The nonzero values and their gaps where that is smaller, operators included, else all values, packed."""
    return smallest((packed.store, _store), graph, tensors)


def gaps(values: Array) -> tuple[npt.NDArray[np.uint8], Array]:
    """Distances between the values that are kept, the first one from 0, and these values, both [kept].

    >>> gaps(np.array([5, 0, 0, -3], np.int8))
    (array([0, 3], dtype=uint8), array([ 5, -3], dtype=int8))
    """
    flat = values.ravel()
    index = np.flatnonzero(flat) if flat.any() else np.zeros(1, np.int64)
    distance = np.diff(index, prepend=0)
    bridges = np.maximum(-(-distance // LARGEST_GAP) - 1, 0)
    place = np.cumsum(bridges + 1) - 1  # of the kept values among all entries
    steps = np.full(place[-1] + 1, LARGEST_GAP, np.uint8)
    steps[place] = distance - LARGEST_GAP * bridges
    kept = np.zeros(place[-1] + 1, flat.dtype)
    kept[place] = flat[index]
    return steps, kept


def _store(graph: Graph, tensors: Sequence[Values]) -> list[Held]:
    parts = [gaps(values.data) for values in tensors]
    nonzero = packed.store(graph, [_nonzero(values, kept) for values, (_, kept) in zip(tensors, parts, strict=True)])
    return [
        _scattered(graph, values, steps, updates)
        for values, (steps, _), updates in zip(tensors, parts, nonzero, strict=True)
    ]


def _nonzero(values: Values, kept: Array) -> Values:
    """The kept values as a tensor of their own: the ranges of all channels make one range, which may take more bits."""
    bits = values.bits
    if kept.dtype == np.int8:
        bits = max(bits, int(np.ptp(kept.astype(np.int16))).bit_length())
    return Values(f"{values.stem}.nonzero", kept, bits, None, values.kind)


def _scattered(graph: Graph, values: Values, steps: npt.NDArray[np.uint8], updates: Held) -> Held:
    wide = graph.add_folded("Cast", [graph.add_constant(f"{values.stem}.gaps", steps)], to=onnx.TensorProto.INT32)
    index = graph.add_folded("CumSum", [wide, graph.shared_constant(np.array(0))])
    size, zero = graph.shared_constant(np.array([values.data.size])), helper.make_tensor("", values.kind, [1], [0])
    zeros = graph.add_folded("ConstantOfShape", [size], value=zero)
    flat = graph.add_folded("ScatterElements", [zeros, index, updates.tensor], axis=0)
    shape = graph.shared_constant(np.array(values.data.shape))
    return Held(graph.add_folded("Reshape", [flat, shape]), updates.bytes + steps.nbytes)
