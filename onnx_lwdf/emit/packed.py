"""Storage of codes below 8 bits in bytes without a gap, rebuilt by bit operations that onnxruntime folds at load.

A code plus 2^(bits - 1) is cut into pieces of 4, 2 and 1 bits, from the top (6 = 4 + 2, 7 = 4 + 2 + 1); the pieces of one
width fill bytes of their own. Piece k of w bits in byte j belongs to code k * bytes + j, so that one column of masks and
one of shifts, broadcast over the row of bytes, take all of them out:

    bytes [n w / 8]  -> BitwiseAnd [[2^w - 1], [(2^w - 1) << w], ...] -> BitShift right by [[0], [w], ...] -> [8 / w, n w / 8]
    codes            =  (piece << lower bits) | ... - 2^(bits - 1)

The mask comes before the shift: OpenVINO shifts by multiplication, and rounds what should fall out of the byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lwdf.emit import dense
from onnx_lwdf.emit.stored import Values, smallest
from onnx_lwdf.graph import Graph

WIDTHS = (4, 2, 1)


@dataclass(frozen=True, slots=True)
class Piece:
    """The same `width` bits of all codes."""

    data: npt.NDArray[np.uint8]  # [codes * width / 8]
    width: int
    lower: int  # bits of the code below these


def store(graph: Graph, stem: str, values: Values, bits: int, kind: int) -> str:
    """The codes packed where that is smaller, operators included; 8-bit codes and floats as they are."""
    packs = values.dtype == np.int8 and bits < 8
    return smallest((dense.store, _store) if packs else (dense.store,), stem, values, bits, kind)(
        graph, stem, values, bits, kind
    )


def pack(codes: npt.NDArray[np.int8], bits: int) -> list[Piece]:
    """The pieces of all codes, in C order; the last bytes are filled up with the smallest code.

    >>> [piece.data.tolist() for piece in pack(np.array([-4, 3, 0], np.int8), 3)]
    [[8, 3], [2]]
    """
    widths = [width for width in WIDTHS if bits & width]
    unsigned = (codes.ravel().astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    unsigned = np.pad(unsigned, (0, -unsigned.size % (8 // widths[-1])))
    pieces, lower = [], bits
    for width in widths:
        lower -= width
        rows = (unsigned >> lower & 2**width - 1).reshape(8 // width, -1)  # row k at bit k * width
        shifts = width * np.arange(8 // width, dtype=np.uint8)[:, None]
        pieces.append(Piece(np.bitwise_or.reduce(rows << shifts, axis=0), width, lower))
    return pieces


def _store(graph: Graph, stem: str, values: Values, bits: int, kind: int) -> str:
    pieces = pack(values.astype(np.int8), bits)
    parts = [_unpacked(graph, f"{stem}.bits{piece.width}", piece, pieces[0].width) for piece in pieces]
    whole = parts[0]
    for part in parts[1:]:
        whole = graph.add_folded("BitwiseOr", [whole, part])
    # int8 cannot be subtracted in onnxruntime, floats can, and most weights are wanted as floats.
    offset = graph.shared_constant(np.float32(2 ** (bits - 1)))
    codes = graph.add_folded("Sub", [graph.add_folded("Cast", [whole], to=onnx.TensorProto.FLOAT), offset])
    codes = codes if kind == onnx.TensorProto.FLOAT else graph.add_folded("Cast", [codes], to=kind)
    if values.size < pieces[0].data.size * 8 // pieces[0].width:
        flat = graph.add_folded("Reshape", [codes, graph.shared_constant(np.array([-1]))])
        ends = [graph.shared_constant(np.array([end])) for end in (0, values.size)]
        codes = graph.add_folded("Slice", [flat, *ends])
    return graph.add_folded("Reshape", [codes, graph.shared_constant(np.array(values.shape))])


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
        lower = graph.shared_constant(np.uint8(piece.lower))
        part = graph.add_folded("BitShift", [part, lower], direction="LEFT")
    return part
