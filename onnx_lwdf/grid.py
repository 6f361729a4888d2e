"""Grids of weights: signed codes, one scale per output channel.

    stored weight = scale * code,    code in [low, low + 2^bits - 1],    low <= 0 <= high

Integer kernels want weights with zero point 0. An int8 code has room for more than 6 bits, so below 7 bits the range of
codes itself moves, per output channel, to where the weights are: an asymmetric grid without a zero point.

Runs of inputs may have a multiplier each: see vectors.py.

Neighbouring codes 2k and 2k + 1 of a filter may have to satisfy |code[2k] + code[2k + 1]| <= limit: x86 without VNNI
adds the two products u8 * s8 in 16 bits (vpmaddubsw), and 255 * 128 is the largest multiple that fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnx_lwdf.solvers.problem import F64, LayerProblem, Mask, Rounding, apart, together
from onnx_lwdf.vectors import Vectors, slack

COARSE_STEPS, FINE_STEPS = 24, 8
# The share of the weights' span at which the best grid may end: fewer codes pay to be spent on the bulk.
SMALLEST_SHARE = {2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5, 6: 0.65, 7: 0.8, 8: 0.9}
LARGEST_SHARE = 1.06
# Where a grid that is narrower than the weights' span lies in it: at the smallest weight, in the middle, at the largest.
PLACES = (0.0, 0.5, 1.0)
VECTOR_STEPS, REFITS = 6, 3
HELD_SHARE = 0.8  # of a run's largest weight, that its first multiplier holds
REFIT_FACTORS = (0.94, 0.98, 1.02, 1.06)
AT_ONCE = 2**16  # weights times grids in one pass of the search
LARGEST_CODE = 127  # of int8, and of its negative too
MOST_ASYMMETRIC_BITS = 6  # two such codes of any sign add up to 126 at most, within the pair limit of 128
# A weight with less than this share of its channel's energy met nothing in the samples that would show what it does.
NEGLIGIBLE = 1e-8
# There its input counts this share of a typical one: samples are a thousand and more, and may miss what is rarer. So a large
# weight at an input that looks dead is clipped only where covering it would cost the other weights more than that.
UNSEEN = 1e-3
TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class WeightGrid:
    """scale * code for low <= code <= high, per output channel."""

    scale: F64  # [groups, out], positive and exactly representable in float32
    low: F64  # [groups, out], integers
    bits: int
    multiplier: F64 | None = None  # [groups, out, in], integers of at least 1; None: 1

    @property
    def step(self) -> F64:
        """Between two neighbouring values of each weight, [groups, out, in or 1]."""
        return self.scale[..., None] if self.multiplier is None else self.scale[..., None] * self.multiplier

    def of(self, rows: npt.NDArray[np.int64], axis: int) -> WeightGrid:
        """Of these groups (axis 0), or of these output channels of every group (axis 1)."""
        multiplier = None if self.multiplier is None else self.multiplier.take(rows, axis)
        return WeightGrid(self.scale.take(rows, axis), self.low.take(rows, axis), self.bits, multiplier)

    def multiplied(self, codes: F64) -> F64:
        """The integers that kernels read in place of the codes, [groups, out, in]."""
        return codes if self.multiplier is None else codes * self.multiplier

    def rounding(self, codes: F64, vectors: Vectors | None) -> Rounding:
        """What is stored of the codes [groups, out, in]."""
        multiplier = None
        if self.multiplier is not None and vectors is not None:
            multiplier = self.multiplier[..., vectors.starts(codes.shape[-1])].astype(np.int8)
        return Rounding(self.multiplied(codes).astype(np.int8), self.scale, multiplier)

    @property
    def high(self) -> F64:
        """The largest code, [groups, out]."""
        return self.low + steps(self.bits)


def steps(bits: int) -> int:
    """From the smallest to the largest code; 8 bits leave out -128, which no integer kernel likes."""
    return 2**bits - (2 if bits == 8 else 1)


def symmetric(scale: F64, bits: int) -> WeightGrid:
    """The grid [-2^(bits - 1), 2^(bits - 1) - 1] of every channel, without -128."""
    return WeightGrid(scale, np.full(scale.shape, -float((steps(bits) + 1) // 2)), bits)


def nearest(weight: F64, grid: WeightGrid, pair_limit: int | None = None) -> F64:
    """The codes of least squared error within range and pair limit, [groups, out, in] (integers in float64).

    weight [groups, out, in].
    """
    exact = weight / grid.step
    codes = np.clip(np.rint(exact), grid.low[..., None], grid.high[..., None])
    return codes if pair_limit is None else _limit_pairs(exact, codes, grid, pair_limit)


def _limit_pairs(exact: F64, codes: F64, grid: WeightGrid, limit: int) -> F64:
    """Move pairs whose sum is too large to the nearest point with the largest sum allowed."""
    low, high = grid.low[..., None], grid.high[..., None]
    even = codes.shape[-1] // 2 * 2
    first, second = codes[..., 0:even:2], codes[..., 1:even:2]
    total = first + second
    over = np.abs(total) > limit
    if not over.any():
        return codes
    bound = np.where(total > 0, limit, -limit)
    a, b = exact[..., 0:even:2], exact[..., 1:even:2]
    moved = np.clip(np.rint(a - (a + b - bound) / 2), np.maximum(low, bound - high), np.minimum(high, bound - low))
    result = codes.copy()
    result[..., 0:even:2] = np.where(over, moved, first)
    result[..., 1:even:2] = np.where(over, bound - moved, second)
    return result


def weight_grid(problem: LayerProblem, importance: F64) -> WeightGrid:
    """The grid of least weighted error for a problem, one for all blocks of an output channel; importance [groups, in]."""
    joined = together(importance[:, None, :], problem.blocks)[:, 0]
    weight, floor = together(problem.weight, problem.blocks), problem.scale_floor[:: problem.blocks]
    grid = search_weight_grid(weight, joined, problem.rounded_bits, problem.pair_limit, floor, problem.vectors)
    multiplier = None if grid.multiplier is None else apart(grid.multiplier, problem.blocks)
    return WeightGrid(problem.shared(grid.scale), problem.shared(grid.low), grid.bits, multiplier)


def search_weight_grid(
    weight: F64,
    importance: F64,
    bits: int,
    pair_limit: int | None,
    scale_floor: F64,
    vectors: Vectors | None = None,
) -> WeightGrid:
    """Per output channel the grid of least weighted squared error; its scale is exact in float32.

    weight [groups, out, in]; importance [groups, in], of an error of each weight (the diagonal of H); the scale is not
    below scale_floor [groups, out]. The error is that of the codes after range and pair limit.
    """
    importance = np.where(importance.any(axis=1, keepdims=True), importance, 1.0)[:, None, :]  # all dead: all alike
    energy = weight * weight * importance
    shown = energy > NEGLIGIBLE * energy.sum(-1, keepdims=True)
    typical = np.nanmedian(np.where(importance > 0, importance, np.nan), axis=2, keepdims=True)
    importance = np.where(shown, importance, np.maximum(importance, UNSEEN * typical))
    grids = [_search(weight, importance, bits, pair_limit, scale_floor, span) for span in _spans(weight, shown)]
    plain = grids[0] if len(grids) == 1 else _best(weight, importance, pair_limit, grids)
    if vectors is None:
        return plain
    return _best(weight, importance, None, [plain, _search_multiplied(weight, importance, bits, scale_floor, vectors)])


def _spans(weight: F64, shown: Mask) -> list[tuple[F64, F64]]:
    """The smallest and the largest weight, or 0, [groups, out] each: of all, and of those shown where that differs."""
    spans = [(weight.min(-1, initial=0.0, where=w), weight.max(-1, initial=0.0, where=w)) for w in (True, shown)]
    return spans[: 1 if all(map(np.array_equal, *spans)) else 2]


def _search(
    weight: F64, importance: F64, bits: int, pair_limit: int | None, scale_floor: F64, span: tuple[F64, F64]
) -> WeightGrid:
    """The same, importance [groups, out, in], among the grids about a span of weights."""
    smallest, largest = span
    moves = bits <= MOST_ASYMMETRIC_BITS and pair_limit is None
    middle = symmetric(scale_floor, bits)
    plain = np.maximum(largest, -smallest) / middle.high
    full = (largest - smallest) / steps(bits) if moves else plain

    def several(scale: F64, low: F64) -> Iterator[WeightGrid]:
        """Grids of [..., groups, out], so many at a time that one pass over them is no longer than what it costs to begin."""
        low = np.clip(low, -steps(bits), 0) if moves else np.broadcast_to(middle.low, low.shape)
        scale = np.broadcast_to(storable(scale, scale_floor), low.shape).reshape(-1, *weight.shape[:2])
        low, most = low.reshape(scale.shape), max(1, AT_ONCE // weight.size)
        for i in range(0, len(scale), most):
            yield WeightGrid(scale[i : i + most], low[i : i + most], bits)

    shares = np.linspace(SMALLEST_SHARE[bits], LARGEST_SHARE if pair_limit is None else 2.0, COARSE_STEPS)
    scale = full * shares[:, None, None, None]  # [shares, places, groups, out]
    places = np.array(PLACES if moves else PLACES[:1])[:, None, None]
    low = smallest + places * (largest - smallest - steps(bits) * scale)
    coarse = several(scale, np.rint(low / np.maximum(scale, TINY)))
    plainest = WeightGrid(storable(plain, scale_floor), middle.low, bits)  # what is found is never worse
    best = _best(weight, importance, pair_limit, [plainest, *coarse])
    moved = np.linspace(-1, 1, FINE_STEPS + 1)[:, None, None, None] * full * (shares[1] - shares[0]) + best.scale
    scale, shifts = np.maximum(moved, best.scale / 8), np.array((-1, 0, 1) if moves else (0,))[:, None, None]
    fine = several(scale, np.rint(best.low * best.scale / np.maximum(scale, TINY)) + shifts)
    return _best(weight, importance, pair_limit, [best, *fine])


def _search_multiplied(weight: F64, importance: F64, bits: int, scale_floor: F64, vectors: Vectors) -> WeightGrid:
    """The same among the grids with multipliers, importance [groups, out, in].

    Scales and multipliers in turn: of any scale each run has a multiplier that nearly holds its largest weight.
    """
    starts, inputs, middle = vectors.starts(weight.shape[-1]), weight.shape[-1], float(2 ** (bits - 1))
    reach = np.maximum.reduceat(np.abs(weight), starts, axis=-1)  # [groups, out, runs]
    full = reach.max(-1) / (vectors.most * (middle - 0.5))

    def grid(scale: F64, low: F64, multiplier: F64) -> WeightGrid:
        return WeightGrid(scale, low, bits, vectors.spread(np.clip(multiplier, 1, vectors.most), inputs))

    def at(scale: F64) -> WeightGrid:
        held = reach / (np.maximum(scale, TINY) * middle)[..., None]
        return grid(storable(scale, scale_floor), np.full(scale.shape, -middle), np.ceil(held * HELD_SHARE))

    def errors(one: WeightGrid) -> F64:
        """Of every run."""
        difference = nearest(weight, one) * one.step - weight
        return np.asarray(np.add.reduceat(difference * difference * importance, starts, axis=-1))

    best = _best(
        weight,
        importance,
        None,
        (at(full * share) for share in np.linspace(SMALLEST_SHARE[bits], LARGEST_SHARE, VECTOR_STEPS)),
    )
    moves = range(-slack(bits), slack(bits) + 1)
    best = _best(weight, importance, None, [best, *(replace(best, low=best.low + move) for move in moves if move)])
    for _ in range(REFITS):
        assert best.multiplier is not None
        held, least = best.multiplier[..., starts], errors(best)
        multiplier = held
        for change in (-1, 1):
            error = errors(grid(best.scale, best.low, held + change))
            multiplier, least = np.where(error < least, held + change, multiplier), np.minimum(error, least)
        best = grid(best.scale, best.low, multiplier)
        scales = [storable(best.scale * factor, scale_floor) for factor in REFIT_FACTORS]
        best = _best(weight, importance, None, [best, *(replace(best, scale=scale) for scale in scales)])
    return best


def storable(scale: F64, scale_floor: F64) -> F64:
    """The scale as float32 stores it, not below the floor; 1 where a channel of zeros has none."""
    floored = np.maximum(scale, scale_floor)
    rounded = floored.astype(np.float32)
    rounded = np.where(rounded < scale_floor, np.nextafter(rounded, np.float32(np.inf)), rounded)
    return np.where(rounded > TINY, rounded, np.float32(1)).astype(np.float64)


def _best(weight: F64, importance: F64, pair_limit: int | None, grids: Iterable[WeightGrid]) -> WeightGrid:
    """Per output channel the grid of least error, the first of equals; of single grids, or of several at a time."""
    best, least = None, np.full(weight.shape[:2], np.inf)
    for grid in grids:
        difference = nearest(weight, grid, pair_limit) * grid.step - weight
        error = np.einsum("...goi,goi->...go", difference * difference, importance)
        if error.ndim > 2:
            first = np.where(error < np.inf, error, np.inf).argmin(0)[None]
            error, scale, low = (np.take_along_axis(values, first, 0)[0] for values in (error, grid.scale, grid.low))
            grid = replace(grid, scale=scale, low=low)
        better = error < least
        least = np.where(better, error, least)
        best = grid if best is None else choose(better, grid, best)
    assert best is not None
    return best


def choose(first: npt.NDArray[np.bool_], grid: WeightGrid, other: WeightGrid) -> WeightGrid:
    """`grid` where `first` [groups, out], else `other`."""
    multiplier = None
    if grid.multiplier is not None or other.multiplier is not None:
        one, two = (1.0 if of.multiplier is None else of.multiplier for of in (grid, other))
        multiplier = np.where(first[..., None], one, two)
    scale, low = np.where(first, grid.scale, other.scale), np.where(first, grid.low, other.low)
    return WeightGrid(scale, low, grid.bits, multiplier)
