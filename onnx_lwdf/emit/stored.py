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


@dataclass(frozen=True, slots=True)
class Runs:
    """Multipliers of runs of inputs (vectors.py)."""

    multiplier: npt.NDArray[np.int8]  # the shape of the model's weight, with runs in place of inputs
    axis: int  # of the weight, along which inputs run
    size: int  # inputs in a run; the last one may be shorter

    def spread(self, inputs: int) -> npt.NDArray[np.int8]:
        """The multiplier of each weight, of the weight's shape."""
        return np.repeat(self.multiplier, self.size, axis=self.axis).take(range(inputs), axis=self.axis)


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight on its grid: codes times one scale per output channel."""

    codes: npt.NDArray[np.int8]  # the shape of the model's weight; with runs, times their multipliers
    scale: npt.NDArray[np.float32]  # [scales], along `axis`
    axis: int  # of the weight, along which the scales run
    bits: int  # the codes of one scale, without multipliers, differ by less than 2^bits
    runs: Runs | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """One layer's solution."""

    layer: Layer
    values: npt.NDArray[np.float32] | None  # the shape of the model's weight, where they stay float
    rounded: Rounded | None  # the weight as codes; None: its values are float
    bias: npt.NDArray[np.float64]  # [out]
    grid: ActivationGrid | None  # of the input; None: the input is float
    codes_of: str = ""  # the layer whose codes or floats these are, where they are written once for several

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the model's weight."""
        held = self.values if self.rounded is None else self.rounded.codes
        assert held is not None, self.layer.name
        return held.shape


@dataclass(frozen=True, slots=True)
class Values:
    """A tensor to be written: codes, or a weight that stays float."""

    stem: str  # of the names
    data: npt.NDArray[np.int8] | npt.NDArray[np.float32]
    bits: int  # of the codes, without multipliers; 32 of floats
    axis: int | None  # along which the ranges of the codes differ; None: one range for all
    kind: int  # ONNX type of what is rebuilt
    runs: Runs | None = None  # whose multipliers the codes were multiplied by

    @property
    def codes(self) -> npt.NDArray[np.int8] | npt.NDArray[np.float32]:
        """The data without multipliers."""
        if self.runs is None:
            return self.data
        return np.asarray(self.data // self.runs.spread(self.data.shape[self.runs.axis]), np.int8)


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor of the graph that has the values, and the bytes of the data that it is made of."""

    tensor: str
    bytes: int


# Writes tensors of any number, and answers one for one.
Store = Callable[[Graph, Sequence[Values]], list[Held]]


def smallest(stores: Sequence[Store], graph: Graph, tensors: Sequence[Values]) -> list[Held]:
    """Each tensor by the store that takes the fewest bytes of a file for it alone; the first of equals.

    Operators count, and a little more for the time that they take at load; constants that all share do not.
    """
    chosen = [min(stores, key=lambda store: stored_bytes(store, [values], OPERATOR_BYTES)) for values in tensors]
    held: dict[int, Held] = {}
    for store in stores:
        own = [place for place, choice in enumerate(chosen) if choice is store]
        held.update(zip(own, store(graph, [tensors[place] for place in own]), strict=True))
    return [held[place] for place in range(len(tensors))]


def stored_bytes(store: Store, tensors: Sequence[Values], operator: int = 0) -> int:
    """What the store adds to a file, and so many bytes more for each operator."""
    scratch = Graph(onnx.ModelProto())
    store(scratch, tensors)
    own = [tensor for name, tensor in scratch.initializers.items() if name not in scratch.shared.values()]
    written = sum(proto.ByteSize() for proto in (*scratch.nodes, *own, *scratch.model.graph.sparse_initializer))
    return written + operator * len(scratch.nodes)
