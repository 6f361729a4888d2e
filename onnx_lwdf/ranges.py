"""Grids of activations: codes, scale and zero point, and the search for the range of least error.

    code = clip(round(x / scale) + zero_point, 0, 2^bits - 1),    stored value = scale (code - zero_point)

The range [low, high] contains 0, which is exactly representable. It is searched on samples for the least weighted sum
of error^2, rounding and clipping together; min/max ranges waste codes on values that hardly occur.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

FRACTIONS = np.geomspace(1.0, 0.08, 40)  # of the observed bound, coarse
REFINED = np.linspace(0.94, 1.06, 7)[::-1]  # around the best, fine
SMALLEST_SCALE = 1e-30  # far above float32's denormals, far below any activation
ROUNDS = 2  # low and high in turn
BULK, TAIL = 2**13, 2**11  # values that the search looks at: the bulk is thinned, the tails are kept whole


@dataclass(frozen=True, slots=True)
class ActivationGrid:
    """An unsigned grid; `scale` is exactly representable in float32."""

    scale: float
    zero_point: int
    bits: int

    @property
    def levels(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def quantize(self, values: F64) -> F64:
        """The stored values nearest to these, of the same shape."""
        codes = np.rint(values / self.scale) + self.zero_point
        return np.asarray((np.clip(codes, 0, self.levels) - self.zero_point) * self.scale)


def grid_for(low: float, high: float, bits: int, symmetric: bool = False) -> ActivationGrid:
    """The grid over [low, high], widened to contain 0.

    The scale is rounded towards zero in float32, so that scale * levels never exceeds the range: a Clip that the range
    makes redundant must stay redundant, else onnxruntime does not fuse it.
    """
    low, high, levels = min(low, 0.0), max(high, 0.0), 2**bits - 1
    middle = 2 ** (bits - 1)
    width = max(-low, high) / (middle - 1) * levels if symmetric else high - low
    if width / levels < SMALLEST_SCALE:  # always zero, as good as
        return ActivationGrid(1.0, middle if symmetric else 0, bits)
    scale = np.float32(width / levels)
    while float(scale) * levels > width or scale * np.float32(levels) > np.float32(width):  # one step, seldom two
        scale = np.nextafter(scale, np.float32(0))
    zero_point = middle if symmetric else int(np.clip(np.rint(-low / float(scale)), 0, levels))
    return ActivationGrid(float(scale), zero_point, bits)


def widened(
    grid: ActivationGrid, factor: float, low: float | None = None, high: float | None = None, symmetric: bool = False
) -> ActivationGrid:
    """The grid over so many times the range, within the bounds that the values cannot leave."""
    least, most = -grid.zero_point * grid.scale * factor, (grid.levels - grid.zero_point) * grid.scale * factor
    least, most = least if low is None else max(least, low), most if high is None else min(most, high)
    return grid_for(least, most, grid.bits, symmetric)


def search_grid(
    values: F64,
    weights: F64,
    bits: int,
    low: float | None = None,
    high: float | None = None,
    symmetric: bool = False,
) -> ActivationGrid:
    """The grid with the least weighted squared error on samples.

    values, weights: [samples]. low, high: bounds that the values cannot leave (a Clip), used where they are tighter.
    """
    least, most = float(min(values.min(), 0.0)), float(max(values.max(), 0.0))
    least, most = max(least, low) if low is not None else least, min(most, high) if high is not None else most
    values, weights = _thinned(values, weights)

    total = float(weights.sum())

    def narrower(ranges: Iterable[tuple[float, float]], least: float) -> Iterator[tuple[float, float, float]]:
        """Error, low and high of ranges that end nearer and nearer to 0, as long as one may have less error than `least`."""
        for low, high in ranges:
            grid = grid_for(low, high, bits, symmetric)
            error = float(np.dot(weights, (grid.quantize(values) - values) ** 2))
            yield error, low, high
            if error - total * (grid.scale / 2) ** 2 > least:  # more is cut off than that, and more will be
                return

    (best,) = narrower([(least, most)], np.inf)
    for _ in range(ROUNDS):
        for fractions in (FRACTIONS, REFINED):
            _, low, high = best
            best = min([best, *narrower(((low, high * f) for f in fractions if high * f <= most), best[0])])
            if least < 0:
                best = min([best, *narrower(((low * f, best[2]) for f in fractions if low * f >= least), best[0])])
        if least >= 0:
            break
    return grid_for(best[1], best[2], bits, symmetric)


def _thinned(values: F64, weights: F64) -> tuple[F64, F64]:
    """Fewer values that stand for all: rare large ones decide where a range may end, so the tails stay whole."""
    if values.size <= BULK + 2 * TAIL:
        return values, weights
    order = np.argpartition(values, (TAIL, values.size - TAIL))
    inside = np.ones(values.size, bool)
    inside[order[:TAIL]] = inside[order[-TAIL:]] = False
    bulk = np.flatnonzero(inside)  # in the order of the samples: a fixed stride through it is a fair draw
    step = -(-bulk.size // BULK)
    chosen = np.concatenate([order[:TAIL], bulk[step // 2 :: step], order[-TAIL:]])
    share = weights[bulk].sum() / max(weights[bulk[step // 2 :: step]].sum(), np.finfo(np.float64).tiny)
    scaled = weights[chosen].copy()
    scaled[TAIL:-TAIL] *= share
    return values[chosen], scaled
