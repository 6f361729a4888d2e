"""Grids of activations: codes, scale and zero point, and the search for the range of least error.

    code = clip(round(x / scale) + zero_point, 0, 2^bits - 1),    stored value = scale (code - zero_point)

The range [low, high] contains 0, which is exactly representable. It is searched on samples for the least weighted
squared error, rounding and clipping together; min/max ranges waste codes on values that hardly occur.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

FRACTIONS = np.geomspace(1.0, 0.08, 40)  # of the observed bound, coarse
REFINED = np.linspace(0.94, 1.06, 7)  # around the best, fine
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
    if symmetric:
        bound = max(-low, high)
        scale = _float32_below(bound / (2 ** (bits - 1) - 1))
        return ActivationGrid(scale, 2 ** (bits - 1), bits)
    scale = _float32_below((high - low) / levels)
    while scale > 0 and np.float32(scale) * np.float32(levels) > np.float32(high - low):
        scale = float(np.nextafter(np.float32(scale), np.float32(0)))
    return ActivationGrid(scale, int(np.clip(np.rint(-low / scale), 0, levels)), bits)


def _float32_below(value: float) -> float:
    """The largest float32 not above the value; a tensor that is always zero gets scale 1."""
    scale = np.float32(value)
    if float(scale) > value:  # in float64: NumPy 2 would compare in float32
        scale = np.nextafter(scale, np.float32(0))
    return float(scale) if scale > np.finfo(np.float32).tiny else 1.0


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

    def error(low: float, high: float) -> float:
        difference = grid_for(low, high, bits, symmetric).quantize(values) - values
        return float(np.dot(weights, difference * difference))

    best = (error(least, most), least, most)
    for _ in range(ROUNDS):
        for fractions in (FRACTIONS, REFINED):
            _, low_now, high_now = best
            highs = [(error(low_now, high_now * f), low_now, high_now * f) for f in fractions if high_now * f <= most]
            best = min([best, *highs])
            if least < 0:
                lows = [(error(low_now * f, best[2]), low_now * f, best[2]) for f in fractions if low_now * f >= least]
                best = min([best, *lows])
        if least >= 0:
            break
    return grid_for(best[1], best[2], bits, symmetric)


def _thinned(values: F64, weights: F64) -> tuple[F64, F64]:
    """Fewer values that stand for all: rare large ones decide where a range may end, so the tails stay whole."""
    if values.size <= BULK + 2 * TAIL:
        return values, weights
    order = np.argpartition(values, (TAIL, values.size - TAIL))
    bulk = np.sort(order[TAIL:-TAIL])  # in the order of the samples: a fixed stride through it is a fair draw
    step = -(-bulk.size // BULK)
    chosen = np.concatenate([order[:TAIL], bulk[step // 2 :: step], order[-TAIL:]])
    share = weights[bulk].sum() / max(weights[bulk[step // 2 :: step]].sum(), np.finfo(np.float64).tiny)
    scaled = weights[chosen].copy()
    scaled[TAIL:-TAIL] *= share
    return values[chosen], scaled
