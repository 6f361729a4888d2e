"""Storage of codes below 8 bits in bytes without a gap, rebuilt by bit operations that onnxruntime folds at load.

The codes of all tensors of one width follow each other in one row. A code less the smallest of its channel is cut into
pieces of 4, 2 and 1 bits, from the top (6 = 4 + 2, 7 = 4 + 2 + 1); the pieces of one width fill bytes of their own.
Piece k of w bits in byte j belongs to code k * bytes + j, so that one column of masks and one of shifts, broadcast over
the row of bytes, take all of them out:

    bytes [n w / 8]  -> BitwiseAnd [[2^w - 1], [(2^w - 1) << w], ...] -> BitShift right by [[0], [w], ...] -> [8 / w, n w / 8]
    codes            =  (piece << lower bits) | ... -> Split -> Reshape -> + smallest of the channel

One chain serves all tensors because onnxruntime spends more time on a folded operator than on the bytes that it reads.
The mask comes before the shift: OpenVINO shifts by multiplication, and rounds what should fall out of the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lwdf.emit import dense
from onnx_lwdf.emit.stored import Held, Values, smallest
from onnx_lwdf.graph import Graph

WIDTHS = (4, 2, 1)


@dataclass(frozen=True, slots=True)
class Piece:
    """The same `width` bits of all codes."""

    data: npt.NDArray[np.uint8]  # [codes * width / 8]
    width: int
    lower: int  # bits of the code below these


def store(graph: Graph, tensors: Sequence[Values]) -> list[Held]:
    """The codes packed where that is smaller, operators included; 8-bit codes and floats as they are."""
    held: dict[int, Held] = {}
    for bits in sorted({values.bits for values in tensors}):
        own = [place for place, values in enumerate(tensors) if values.bits == bits]
        stores = (dense.store, _store) if bits < 8 else (dense.store,)
        held.update(zip(own, smallest(stores, graph, [tensors[place] for place in own]), strict=True))
    return [held[place] for place in range(len(tensors))]


def pack(codes: npt.NDArray[np.uint8], bits: int) -> list[Piece]:
    """The pieces of all codes [n], each below 2^bits; the last bytes are filled up with zeros.

    >>> [piece.data.tolist() for piece in pack(np.array([0, 7, 4], np.uint8), 3)]
    [[8, 3], [2]]
    """
    widths = [width for width in WIDTHS if bits & width]
    filled = np.pad(codes, (0, -codes.size % (8 // widths[-1])))
    pieces, lower = [], bits
    for width in widths:
        lower -= width
        rows = (filled >> lower & 2**width - 1).reshape(8 // width, -1)  # row k at bit k * width
        shifts = width * np.arange(8 // width, dtype=np.uint8)[:, None]
        pieces.append(Piece(np.bitwise_or.reduce(rows << shifts, axis=0), width, lower))
    return pieces


def _store(graph: Graph, tensors: Sequence[Values]) -> list[Held]:
    """Tensors of codes of one width below 8 bits."""
    if not tensors:
        return []
    bits, least = tensors[0].bits, [_least(values) for values in tensors]
    shifted = [values.data.astype(np.int16) - low for values, low in zip(tensors, least, strict=True)]
    pieces = pack(np.concatenate([codes.ravel() for codes in shifted]).astype(np.uint8), bits)
    stem = graph.unique(f"packed{bits}")
    parts = [_unpacked(graph, f"{stem}.bits{piece.width}", piece, pieces[0].width) for piece in pieces]
    row = parts[0]
    for part in parts[1:]:
        row = graph.add_folded("BitwiseOr", [row, part])
    row = graph.add_folded("Reshape", [row, graph.shared_constant(np.array([-1]))])
    sizes = [codes.size for codes in shifted]
    filling = pieces[0].data.size * 8 // pieces[0].width - sum(sizes)
    split = graph.add_split(row, [*sizes, filling] if filling else sizes)
    return [_tensor(graph, values, codes, low, bits) for values, codes, low in zip(tensors, split, least, strict=False)]


def _least(values: Values) -> npt.NDArray[np.int16]:
    """The smallest code of each channel, of the values' rank."""
    axes = tuple(axis for axis in range(values.data.ndim) if axis != values.axis)
    return np.asarray(values.data.min(axis=axes, keepdims=True), np.int16)


def _tensor(graph: Graph, values: Values, codes: str, least: npt.NDArray[np.int16], bits: int) -> Held:
    """uint8 codes in a row -> the values. int8 cannot be added in onnxruntime; floats can, and most weights become floats."""
    shaped = graph.add_folded("Reshape", [codes, graph.shared_constant(np.array(values.data.shape))])
    low = graph.add_constant(f"{values.stem}.least", least.astype(np.int8))
    floats = [graph.add_folded("Cast", [name], to=onnx.TensorProto.FLOAT) for name in (shaped, low)]
    name = graph.add_folded("Add", floats)
    if values.kind != onnx.TensorProto.FLOAT:
        name = graph.add_folded("Cast", [name], to=values.kind)
    return Held(name, -(-values.data.size * bits // 8) + least.size)


def _unpacked(graph: Graph, stem: str, piece: Piece, first_width: int) -> str:
    """The piece's bits at their place in the code, uint8 [8 / first_width, codes * first_width / 8]."""
    data, rows = graph.add_constant(stem, piece.data), 8 // piece.width
    shifts = piece.width * np.arange(rows, dtype=np.uint8)[:, None]
    masked = graph.add_folded("BitwiseAnd", [data, graph.shared_constant(2**piece.width - 1 << shifts)])
    part = graph.add_folded("BitShift", [masked, graph.shared_constant(shifts)], direction="RIGHT")
    if piece.width != first_width:
        shape = graph.shared_constant(np.array([8 // first_width, -1]))
        part = graph.add_folded("Reshape", [part, shape])
    if piece.lower:
        lower = graph.shared_constant(np.array([[piece.lower]], np.uint8))
        part = graph.add_folded("BitShift", [part, lower], direction="LEFT")
    return part
