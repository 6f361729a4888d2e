"""The rotation that spreads rare large values over all channels.

A few positions of a deep feature map hold values of ten and more deviations, nearly all along one direction of the channel
space, and one grid for all channels has to reach them. With B the eigenvectors, largest first, of

    E[|z|^2 z z^T]

(the fourth moments: the directions of the heaviest tails) and F Hartley's transform, F[j, k] = (cos + sin)(2 pi j k / n) /
sqrt(n), the rotation F B^T sends the first direction to (1, ..., 1) / sqrt(n): no rotation leaves less of it in one channel.
The others end up in entries of sqrt(2 / n) at most. A random rotation leaves sqrt(2 ln n / n) of each.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def spreading(values: F64) -> F64:
    """The rotation F B^T, [channels, channels], for these values [channels, samples]."""
    power = (values**2).sum(0)
    mean = float(power.mean())
    weight = power / mean if mean > 0 else power
    moments = (values * weight) @ values.T / values.shape[1]
    basis = np.linalg.eigh((moments + moments.T) / 2)[1][:, ::-1]
    skew = ((basis.T @ values) ** 3).mean(1)
    basis = basis * np.where(skew < 0, -1.0, 1.0)  # the tails point up in every channel, and a grid has a zero point
    return np.asarray(hartley(len(values)) @ basis.T)


def hartley(n: int) -> F64:
    """Hartley's transform, [n, n]: orthogonal and symmetric."""
    turns = 2 * np.pi / n * (np.outer(np.arange(n), np.arange(n)) % n)
    return np.asarray((np.cos(turns) + np.sin(turns)) / np.sqrt(n))
