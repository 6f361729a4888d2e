"""Grids of weights: symmetric signed codes, one scale per output channel.

    stored weight = scale * code,    code in [low, high]

Neighbouring codes 2k and 2k + 1 of a filter may have to satisfy |code[2k] + code[2k + 1]| <= limit: x86 without VNNI
adds the two products u8 * s8 in 16 bits (vpmaddubsw), and 255 * 128 is the largest multiple that fits.
"""

from __future__ import annotations

import numpy as np

from onnx_lwdf.solvers.problem import F64

COARSE_STEPS, FINE_STEPS = 24, 8
# The share of the largest weight at which the best grid may end: fewer codes pay to be spent on the bulk.
SMALLEST_SHARE = {2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5, 6: 0.65, 7: 0.8, 8: 0.9}
LARGEST_SHARE = 1.06
# A weight with less than this share of its channel's energy has no say in the range: clipping it costs nothing. A dead
# input may carry any weight, and at 8 bits one outlier there would cost every other weight its precision.
NEGLIGIBLE = 1e-8
TINY = float(np.finfo(np.float32).tiny)


def code_range(bits: int) -> tuple[int, int]:
    """The smallest and the largest code; 8 bits leave out -128, which no integer kernel likes."""
    high = 2 ** (bits - 1) - 1
    return (-high if bits == 8 else -high - 1), high


def nearest(weight: F64, scale: F64, bits: int, pair_limit: int | None = None) -> F64:
    """The codes of least squared error within range and pair limit, [groups, out, in] (integers in float64).

    weight [groups, out, in], scale [groups, out].
    """
    low, high = code_range(bits)
    exact = weight / scale[..., None]
    codes = np.clip(np.rint(exact), low, high)
    return codes if pair_limit is None else _limit_pairs(exact, codes, bits, pair_limit)


def _limit_pairs(exact: F64, codes: F64, bits: int, limit: int) -> F64:
    """Move pairs whose sum is too large to the nearest point with the largest sum allowed."""
    low, high = code_range(bits)
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


def search_scale(weight: F64, importance: F64, bits: int, pair_limit: int | None, scale_floor: F64) -> F64:
    """Per output channel the scale of least weighted squared error, [groups, out], exact in float32.

    weight [groups, out, in]; importance [groups, in], of an error of each weight (the diagonal of H); the scale is not
    below scale_floor [groups, out]. The error is that of the codes after range and pair limit.
    """
    importance = np.where(importance.any(axis=1, keepdims=True), importance, 1.0)  # all dead: all alike
    full = _span(weight, importance) / code_range(bits)[1]  # [groups, out]
    largest = max(LARGEST_SHARE, 2.0 if pair_limit is not None else 0.0)
    shares = np.linspace(SMALLEST_SHARE[bits], largest, COARSE_STEPS)
    step = shares[1] - shares[0]
    coarse = [np.full(full.shape, share) for share in (1.0, *shares)]  # never worse than the plain range
    best = _best_share(weight, importance, bits, pair_limit, scale_floor, full, coarse)
    fine = [np.maximum(best + step * offset, 1e-3) for offset in np.linspace(-1, 1, FINE_STEPS + 1)]
    best = _best_share(weight, importance, bits, pair_limit, scale_floor, full, [best, *fine])
    return storable(full * best, scale_floor)


def _span(weight: F64, importance: F64) -> F64:
    """The largest weight that counts, [groups, out]."""
    energy = weight * weight * importance[:, None, :]
    total = energy.sum(-1, keepdims=True)
    counts = (energy > NEGLIGIBLE * total) | (total <= 0)
    return np.asarray(np.abs(weight).max(-1, initial=0.0, where=counts))


def storable(scale: F64, scale_floor: F64) -> F64:
    """The scale as float32 stores it, not below the floor; 1 where a channel of zeros has none."""
    floored = np.maximum(scale, scale_floor)
    rounded = floored.astype(np.float32)
    rounded = np.where(rounded < scale_floor, np.nextafter(rounded, np.float32(np.inf)), rounded)
    return np.where(rounded > TINY, rounded, np.float32(1)).astype(np.float64)


def _best_share(
    weight: F64,
    importance: F64,
    bits: int,
    pair_limit: int | None,
    floor: F64,
    full: F64,
    shares: list[F64],
) -> F64:
    least, best = np.full(full.shape, np.inf), np.ones(full.shape)
    for share in shares:
        scale = storable(full * share, floor)
        difference = nearest(weight, scale, bits, pair_limit) * scale[..., None] - weight
        error = np.einsum("goi,gi->go", difference * difference, importance)
        better = error < least
        least, best = np.where(better, error, least), np.where(better, share, best)
    return best
