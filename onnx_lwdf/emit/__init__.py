"""How a solution is stored: one format a file, one visible table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onnx_lwdf.emit import dense, folded, qdq
from onnx_lwdf.emit.stored import Stored
from onnx_lwdf.graph import Graph
from onnx_lwdf.ranges import ActivationGrid
from onnx_lwdf.sites import Site

Emitter = Callable[[Graph, Sequence[Stored], Sequence[Site], Mapping[str, ActivationGrid], bool], None]


@dataclass(frozen=True, slots=True)
class Format:
    """An emitter and what it needs."""

    emit: Emitter
    integer_activations: bool
    opset: int  # the oldest operator set that has what it writes
    operators: tuple[str, ...]  # the layers that it can store


FORMATS: Mapping[str, Format] = {
    "qdq": Format(qdq.emit, True, 13, ("Conv", "Gemm", "MatMul")),
    "dense": Format(dense.emit, False, 7, ("Conv", "ConvTranspose", "Gemm", "MatMul")),
    "folded": Format(folded.emit, False, 9, ("Conv", "ConvTranspose", "Gemm", "MatMul")),
}
