"""The table of sources: how the tensors with known statistics are made."""

from __future__ import annotations

from collections.abc import Mapping

from onnx_lwdf.activations import aligned, gaussian
from onnx_lwdf.activations.taps import Align

SOURCES: Mapping[str, Align | None] = {
    "aligned": aligned.align,  # synthetic images, every BatchNormalization in batch-statistics mode
    "gaussian": gaussian.align,  # the paper's independent draws
    "none": None,  # no inputs: each weight on its own
    "data": None,  # a path: images or arrays through the float network as it is
}
