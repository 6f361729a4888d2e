"""Synthetic images with the statistics of photographs, in milliseconds.

Dead leaves: opaque shapes of random colour fall on a canvas, radius density r^-3. Such images have the edges, the
occlusions and the 1/f spectrum of natural ones (Lee, Mumford, Huang, "Occlusion models for natural images", IJCV 2001).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

SMALLEST_RADIUS = 1.5  # pixels; below it a shape is noise, not an edge
LARGEST_RADIUS = 0.45  # of the shorter side
SHAPES_PER_PIXEL = 0.008  # covers the canvas; twice as many change no layer's statistics visibly
COLOUR = 0.5  # how far a shape's channels move from their common grey: photographs are mostly grey
GRATING = 0.08  # amplitude of the faint texture on the shapes


def dead_leaves(count: int, channels: int, height: int, width: int, rng: np.random.Generator) -> F32:
    """`count` images in [0, 1], float32 [count, channels, height, width]."""
    return np.stack([_dead_leaves(channels, height, width, rng) for _ in range(count)])


def _dead_leaves(channels: int, height: int, width: int, rng: np.random.Generator) -> F32:
    shapes = max(16, int(SHAPES_PER_PIXEL * height * width))
    largest = max(LARGEST_RADIUS * min(height, width), SMALLEST_RADIUS + 1)
    # inverse of the cumulative distribution of the density r^-3
    radius = (rng.random(shapes) * (largest**-2 - SMALLEST_RADIUS**-2) + SMALLEST_RADIUS**-2) ** -0.5
    row, column = rng.random(shapes) * height, rng.random(shapes) * width
    grey = rng.random((shapes, 1))
    colour = np.clip(grey + COLOUR * (rng.random((shapes, channels)) - 0.5), 0, 1)
    kind, aspect = rng.integers(0, 3, shapes), 2.0 ** rng.uniform(-1, 1, shapes)
    wave = rng.uniform(-1.2, 1.2, (shapes, 2))  # radians per pixel
    image = np.empty((channels, height, width), np.float32)
    image[:] = rng.random((channels, 1, 1))
    for i in range(shapes):
        reach_y, reach_x = radius[i] * aspect[i], radius[i] / aspect[i]
        top, bottom = max(0, int(row[i] - reach_y)), min(height, int(row[i] + reach_y) + 2)
        left, right = max(0, int(column[i] - reach_x)), min(width, int(column[i] + reach_x) + 2)
        y = (np.arange(top, bottom)[:, None] - row[i]) / reach_y
        x = (np.arange(left, right)[None, :] - column[i]) / reach_x
        inside = _inside(int(kind[i]), y, x)
        texture = GRATING * np.sin(wave[i, 0] * y * reach_y + wave[i, 1] * x * reach_x)
        patch = image[:, top:bottom, left:right]
        np.copyto(patch, (colour[i][:, None, None] + texture).astype(np.float32), where=inside)
    return np.clip(image, 0, 1)


def _inside(kind: int, y: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Disc, box or diamond around the origin, within [-1, 1] on both axes."""
    if kind == 0:
        return y * y + x * x <= 1
    if kind == 1:
        return (np.abs(y) <= 1) & (np.abs(x) <= 1)
    return np.abs(y) + np.abs(x) <= 1
