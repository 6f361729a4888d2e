"""Fashion-MNIST's test images: those of Debian's package dataset-fashion-mnist, else a committed sample."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SAMPLE = Path(__file__).parent / "data" / "fashion_mnist_sample.npz"
MEAN, DEVIATION = 0.2860, 0.3530
IMAGES_HEADER, LABELS_HEADER = 16, 8  # bytes


def load() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Images [N, 1, 28, 28] as the shipped networks want them, labels [N]; N is 10,000, or 1,000 of the sample."""
    if DEBIAN.is_dir():
        pixels = _read(DEBIAN / "t10k-images-idx3-ubyte.gz", IMAGES_HEADER).reshape(-1, 28, 28)
        labels = _read(DEBIAN / "t10k-labels-idx1-ubyte.gz", LABELS_HEADER)
    else:
        with np.load(SAMPLE) as stored:
            pixels, labels = stored["images"], stored["labels"]
    images = (pixels[:, None].astype(np.float32) / 255 - MEAN) / DEVIATION  # [N, 1, 28, 28]
    return images.astype(np.float32), labels.astype(np.int64)


def _read(path: Path, header: int) -> npt.NDArray[np.uint8]:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)
