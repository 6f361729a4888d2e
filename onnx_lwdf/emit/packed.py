"""Storage of codes below 8 bits in bytes without a gap, rebuilt by bit operations that onnxruntime folds at load.

The codes of all tensors of one width follow each other in one row. A code less the smallest of its channel is cut into
pieces of 6, 4, 2 and 1 bits, from the top (5 = 4 + 1, 7 = 6 + 1); the pieces of one width fill bytes of their own. They
lie in rows under each other, so that one column of masks and one of shifts take all rows out of the same bytes:

    w = 4, 2, 1:  [n w / 8] bytes  -> BitwiseAnd [[2^w - 1], [(2^w - 1) << w], ...] -> BitShift right by [[0], [w], ...]
    w = 6:        [3, n / 4] bytes -> BitwiseAnd 63 -> the first three of four rows; the upper bits hold the fourth:
                  BitwiseAnd 192 -> BitShift right by [[6], [4], [2]] -> Split -> BitwiseOr
    codes         =  (piece << lower bits) | ... -> Split -> Reshape -> + smallest of the channel [-> * multiplier of the run]

One chain serves all tensors because onnxruntime spends more time on a folded operator than on the bytes that it reads.
The mask comes before the shift: OpenVINO shifts by multiplication, and rounds what should fall out of the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lwdf.emit import dense
from onnx_lwdf.emit.stored import Held, Runs, Values, smallest
from onnx_lwdf.graph import Graph

ROWS = {6: 4, 4: 2, 2: 4, 1: 8}  # of pieces under each other, by their width
MULTIPLIER_BITS = 3  # multipliers of runs are 1 to 8
FOURTH = np.array([[0], [2], [4]], np.uint8)  # bits of the fourth row of width 6 that the bytes of the other rows hold


@dataclass(frozen=True, slots=True)
class Piece:
    """The same `width` bits of all codes."""

    data: npt.NDArray[np.uint8]  # [codes * width / 8], [3, codes / 4] of width 6
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
    widths = _widths(bits)
    filled = np.pad(codes, (0, -codes.size % max(ROWS[width] for width in widths)))
    pieces, lower = [], bits
    for width in widths:
        lower -= width
        rows = (filled >> lower & 2**width - 1).reshape(ROWS[width], -1)
        pieces.append(Piece(_bytes(rows, width), width, lower))
    return pieces


def _widths(bits: int) -> list[int]:
    """Of the pieces of a code, from the top: the widest that fit."""
    widths: list[int] = []
    for width in ROWS:
        if sum(widths) + width <= bits:
            widths.append(width)
    return widths


def _bytes(rows: npt.NDArray[np.uint8], width: int) -> npt.NDArray[np.uint8]:
    """Rows [ROWS[width], m] of pieces without a gap between them."""
    if width == 6:
        return rows[:3] | rows[3] >> FOURTH << 6
    return np.asarray(np.bitwise_or.reduce(rows << _places(width), axis=0))


def _places(width: int) -> npt.NDArray[np.uint8]:
    """The bit of a byte at which each row of pieces starts [rows, 1]."""
    return width * np.arange(ROWS[width], dtype=np.uint8)[:, None]


def _store(graph: Graph, tensors: Sequence[Values]) -> list[Held]:
    """Tensors of codes of one width below 8 bits."""
    if not tensors:
        return []
    bits, codes = tensors[0].bits, [np.asarray(values.codes, np.int16) for values in tensors]
    least = [_least(values, own) for values, own in zip(tensors, codes, strict=True)]
    shifted = [own - low for own, low in zip(codes, least, strict=True)]
    row, filling = _row(graph, shifted, bits)
    sizes = [own.size for own in shifted]
    split = graph.add_split(row, [*sizes, filling] if filling else sizes)
    multipliers = _multipliers(graph, tensors)
    return [
        _tensor(graph, values, own, low, multiplier)
        for values, own, low, multiplier in zip(tensors, split, least, multipliers, strict=False)
    ]


def _row(graph: Graph, arrays: Sequence[npt.NDArray[np.int16]], bits: int) -> tuple[str, int]:
    """All the codes, below 2^bits, in one row of uint8, and how many zeros follow them."""
    flat = np.concatenate([codes.ravel() for codes in arrays]).astype(np.uint8)
    pieces = pack(flat, bits)
    stem = graph.unique(f"packed{bits}")
    parts = [_unpacked(graph, f"{stem}.bits{piece.width}", piece, ROWS[pieces[0].width]) for piece in pieces]
    row = graph.add_folded("Reshape", [_united(graph, parts), graph.shared_constant(np.array([-1]))])
    return row, pieces[0].data.size * 8 // pieces[0].width - flat.size


def _multipliers(graph: Graph, tensors: Sequence[Values]) -> list[str | None]:
    """Of each tensor the multipliers of its runs in a row of floats; None where it has none."""
    runs = {place: values.runs for place, values in enumerate(tensors) if values.runs is not None}
    if not runs:
        return [None] * len(tensors)
    row, filling = _row(graph, [of.multiplier.astype(np.int16) - 1 for of in runs.values()], MULTIPLIER_BITS)
    floats = graph.add_folded("Cast", [row], to=onnx.TensorProto.FLOAT)
    floats = graph.add_folded("Add", [floats, graph.shared_constant(np.ones(1, np.float32))])
    sizes = [of.multiplier.size for of in runs.values()]
    split = dict(zip(runs, graph.add_split(floats, [*sizes, filling] if filling else sizes), strict=False))
    return [split.get(place) for place in range(len(tensors))]


def _least(values: Values, codes: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """The smallest code of each channel, of the values' rank."""
    axes = tuple(axis for axis in range(codes.ndim) if axis != values.axis)
    return np.asarray(codes.min(axis=axes, keepdims=True))


def _tensor(graph: Graph, values: Values, codes: str, least: npt.NDArray[np.int16], multiplier: str | None) -> Held:
    """uint8 codes in a row -> the values. int8 cannot be added in onnxruntime; floats can, and most weights become floats."""
    whole, runs, factor = values.data.shape, values.runs, None
    shape, size = whole, -(-values.data.size * values.bits // 8) + least.size
    if multiplier is not None and runs is not None:
        shape, factor = _factor(graph, runs, multiplier, whole)
        size += -(-runs.multiplier.size * MULTIPLIER_BITS // 8)
        least = least if shape == whole else np.expand_dims(least, runs.axis + 1)
    shaped = graph.add_folded("Reshape", [codes, graph.shared_constant(np.array(shape))])
    low = graph.add_constant(f"{values.stem}.least", least.astype(np.int8))
    floats = [graph.add_folded("Cast", [name], to=onnx.TensorProto.FLOAT) for name in (shaped, low)]
    name = graph.add_folded("Add", floats)
    if factor is not None:
        name = graph.add_folded("Mul", [name, factor])
    if shape != whole:
        name = graph.add_folded("Reshape", [name, graph.shared_constant(np.array(whole))])
    if values.kind != onnx.TensorProto.FLOAT:
        name = graph.add_folded("Cast", [name], to=values.kind)
    return Held(name, size)


def _factor(graph: Graph, runs: Runs, multiplier: str, whole: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
    """A shape for the codes, and what they are multiplied by in it, from the multipliers of the runs in a row.

    Where all runs are of one size they get an axis of their own, and nothing is spread over the weights (a third of the load).
    """
    count, axis = runs.multiplier.shape[runs.axis], runs.axis
    one = [*runs.multiplier.shape[: axis + 1], 1, *runs.multiplier.shape[axis + 1 :]]
    one[2 if axis == 0 else 0] = -1  # whatever is left: so more layers share their shapes
    name = graph.add_folded("Reshape", [multiplier, graph.shared_constant(np.array(one))])
    if count * runs.size == whole[axis]:
        return (*whole[:axis], count, runs.size, *whole[axis + 1 :]), name
    each = [runs.size if place == axis + 1 else 1 for place in range(len(whole) + 1)]
    held = [*runs.multiplier.shape]
    held[axis], held[1 - axis] = count * runs.size, -1
    for operator, numbers in (("Expand", each), ("Reshape", held)):
        name = graph.add_folded(operator, [name, graph.shared_constant(np.array(numbers))])
    ends = (0, whole[axis], axis)
    return whole, graph.add_folded("Slice", [name, *(graph.shared_constant(np.array([end])) for end in ends)])


def _unpacked(graph: Graph, stem: str, piece: Piece, rows: int) -> str:
    """The piece's bits at their place in the code, uint8 [rows, codes / rows]."""
    data = graph.add_constant(stem, piece.data)
    if piece.width == 6:
        first = _masked(graph, data, np.array([[63]], np.uint8))
        fourth = _shifted(graph, _masked(graph, data, np.array([[192]], np.uint8)), "RIGHT", 6 - FOURTH)
        part = graph.add_folded("Concat", [first, _united(graph, graph.add_split(fourth, [1, 1, 1]))], axis=0)
    else:
        places = _places(piece.width)
        part = _shifted(graph, _masked(graph, data, 2**piece.width - 1 << places), "RIGHT", places)
    if ROWS[piece.width] != rows:
        part = graph.add_folded("Reshape", [part, graph.shared_constant(np.array([rows, -1]))])
    return _shifted(graph, part, "LEFT", np.array([[piece.lower]], np.uint8)) if piece.lower else part


def _masked(graph: Graph, tensor: str, masks: npt.NDArray[np.uint8]) -> str:
    return graph.add_folded("BitwiseAnd", [tensor, graph.shared_constant(masks)])


def _shifted(graph: Graph, tensor: str, direction: str, by: npt.NDArray[np.uint8]) -> str:
    return graph.add_folded("BitShift", [tensor, graph.shared_constant(by)], direction=direction)


def _united(graph: Graph, tensors: Sequence[str]) -> str:
    return reduce(lambda row, part: graph.add_folded("BitwiseOr", [row, part]), tensors)
