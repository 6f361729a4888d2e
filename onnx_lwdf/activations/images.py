"""Synthetic images with the statistics of photographs, in milliseconds.

Dead leaves: opaque shapes of random colour fall on a canvas, radius density r^-3. Such images have the edges, the
occlusions and the 1/f spectrum of natural ones (Lee, Mumford, Huang, "Occlusion models for natural images", IJCV 2001).
What photographs have besides:

    things      leaves near each other share half of their colour
    outlines    one smooth displacement bends them all
    focus       a sharp subject stands before a background that is out of focus
    light       of another strength on subject and background, and changing smoothly
    noise       of the sensor, of another strength in every image

Each is here because without it the statistics that BatchNormalization stored in trained networks are met less well: no
photograph is needed to tell (docs/accuracy.md).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

SMALLEST_RADIUS = 1.5  # pixels; below it a shape is noise, not an edge
LARGEST_RADIUS = 0.45  # of the shorter side
SHAPES_PER_PIXEL = 0.02  # covers the canvas several times
SMALL_REACH = 6  # pixels; up to here shapes are drawn all at once
MOST_SHAPES = 2048  # larger images have larger shapes in place of more
COLOUR = 0.3  # how far a shape's channels move from their common grey: photographs are mostly grey
GRATING = 0.07  # amplitude of the faint texture on the shapes
THINGS = 10
OWN_COLOUR = 0.5  # the share of a leaf's colour that is not its thing's
BEND, BEND_REACH = 0.04, 0.07  # of the shorter side: how far outlines are moved, and over what distance that changes
FOCUSED = 0.6  # the share of images with a subject
DEFOCUS = 0.027  # of the shorter side, mean deviation of the background's blur
SUBJECT_REACH = 0.125  # of the shorter side: over what distance the subject's outline changes
LIGHT, LIGHT_REACH = 0.5, 0.25  # deviation of its logarithm, from scene to scene and within; of the shorter side
NOISE = 0.015  # mean deviation


def scenes(count: int, channels: int, height: int, width: int, rng: np.random.Generator) -> F32:
    """`count` images in [0, 1], float32 [count, channels, height, width]."""
    return np.stack([_scene((channels, height, width), rng) for _ in range(count)])


def _scene(shape: tuple[int, int, int], rng: np.random.Generator) -> F32:
    _, height, width = shape
    side = min(height, width)
    image = _leaves(shape, rng)
    if rng.random() < FOCUSED:
        subject = _subject(height, width, rng)
        image = _blurred(image, rng.exponential(DEFOCUS * side)) * (1 - subject) + _leaves(shape, rng) * subject
    image += rng.exponential(NOISE) * rng.standard_normal(shape)
    return np.clip(image, 0, 1).astype(np.float32)


def _leaves(shape: tuple[int, int, int], rng: np.random.Generator) -> F64:
    channels, height, width = shape
    side = min(height, width)
    fair = SHAPES_PER_PIXEL * height * width
    shapes = int(np.clip(fair, 16, MOST_SHAPES))
    smallest = SMALLEST_RADIUS * max(1.0, (fair / MOST_SHAPES) ** 0.5)
    largest = max(LARGEST_RADIUS * side, smallest + 1)
    # inverse of the cumulative distribution of the density r^-3
    radius = (rng.random(shapes) * (largest**-2 - smallest**-2) + smallest**-2) ** -0.5
    centre = rng.random((shapes, 2)) * (height, width)
    aspect = 2.0 ** rng.uniform(-1, 1, shapes)
    reach = np.stack([radius * aspect, radius / aspect], 1)  # [shapes, 2]
    top = _topmost(height, width, centre, reach)

    moved = [BEND * side * _field(height, width, BEND_REACH * side, rng) for _ in range(2)]
    row, column = np.mgrid[:height, :width]
    bent_row = np.clip(row + moved[0], 0, height - 1).astype(np.int64)
    bent_column = np.clip(column + moved[1], 0, width - 1).astype(np.int64)
    leaf = top[bent_row, bent_column]  # [height, width]

    thing = _nearest(centre, rng.random((THINGS, 2)) * (height, width), rng.uniform(0.1, 0.5, THINGS))
    shared, own = _colours(THINGS, channels, rng), _colours(shapes, channels, rng)
    colour = (1 - OWN_COLOUR) * shared[thing] + OWN_COLOUR * own
    wave, phase = rng.uniform(-1.2, 1.2, (shapes, 2)), rng.uniform(0, 2 * np.pi, shapes)  # radians per pixel
    texture = GRATING * np.sin(wave[leaf, 0] * row + wave[leaf, 1] * column + phase[leaf])
    light = np.exp(LIGHT * (rng.standard_normal() + _field(height, width, LIGHT_REACH * side, rng)))
    return np.asarray(np.clip((colour[leaf].transpose(2, 0, 1) + texture) * light, 0, 1))


def _topmost(height: int, width: int, centre: F64, reach: F64) -> npt.NDArray[np.int64]:
    """The last of the ellipses that covers each pixel, [height, width]; the first where none does."""
    top = np.zeros((height, width), np.int64)
    begin = np.maximum(0, centre - reach).astype(int)
    end = np.minimum((height, width), centre + reach + 2).astype(int)
    small = (reach <= SMALL_REACH).all(1)
    ids = np.flatnonzero(small)  # most of them, and all at once
    row, column = (begin[ids, axis, None] + np.arange(2 * SMALL_REACH + 2) for axis in (0, 1))
    y, x = ((place - centre[ids, axis, None]) / reach[ids, axis, None] for axis, place in enumerate((row, column)))
    inside = (row < height)[:, :, None] & (column < width)[:, None]
    leaf, i, j = np.nonzero(((y * y)[:, :, None] + (x * x)[:, None] <= 1) & inside)
    top[row[leaf, i], column[leaf, j]] = ids[leaf]  # of several the last is what stays
    for k in np.flatnonzero(~small):
        y = (np.arange(begin[k, 0], end[k, 0]) - centre[k, 0]) / reach[k, 0]
        x = (np.arange(begin[k, 1], end[k, 1]) - centre[k, 1]) / reach[k, 1]
        patch = top[begin[k, 0] : end[k, 0], begin[k, 1] : end[k, 1]]
        patch[((y * y)[:, None] + x * x <= 1) & (patch < k)] = k
    return top


def _nearest(points: F64, centres: F64, size: F64) -> npt.NDArray[np.int64]:
    """The nearest centre of every point, distances in units of the centre's size."""
    distance = ((points[:, None] - centres) ** 2).sum(2) / size**2
    return np.asarray(distance.argmin(1))


def _colours(count: int, channels: int, rng: np.random.Generator) -> F64:
    """[count, channels]"""
    return rng.random((count, 1)) + COLOUR * (rng.random((count, channels)) - 0.5)


def _subject(height: int, width: int, rng: np.random.Generator) -> F64:
    """1 where the subject is, 0 elsewhere: a smooth random outline around the middle, [height, width]."""
    row, column = np.mgrid[:height, :width]
    centre = 0.5 + 0.15 * rng.standard_normal(2)
    away = (row / height - centre[0]) ** 2 + (column / width - centre[1]) ** 2
    level = _field(height, width, SUBJECT_REACH * min(height, width), rng) + 1.5 - 12 * away
    return np.clip(10 * level + 0.5, 0, 1)


def _field(height: int, width: int, reach: float, rng: np.random.Generator) -> F64:
    """A smooth random field of mean 0 and deviation 1, [height, width]; it changes over `reach` pixels."""
    field = _blurred(rng.standard_normal((height, width)), reach)
    field -= field.mean()
    return np.asarray(field / max(float(field.std()), np.finfo(np.float64).tiny))


def _blurred(image: F64, deviation: float) -> F64:
    """By a Gaussian of this deviation in pixels, [..., height, width], around the borders."""
    height, width = image.shape[-2:]
    frequency = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.rfftfreq(width) ** 2
    response = np.exp(-2 * (np.pi * deviation) ** 2 * frequency)
    return np.fft.irfft2(np.fft.rfft2(image) * response, s=(height, width))
