"""What an emitter is given for each layer: codes in the weight's own shape, one scale per output channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lwdf.layers import Layer
from onnx_lwdf.ranges import ActivationGrid


@dataclass(frozen=True, slots=True)
class Stored:
    """One layer's solution, laid out as the model stores weights."""

    layer: Layer
    codes: npt.NDArray[np.int8]  # the shape of the model's weight
    scale: npt.NDArray[np.float32]  # [scales], along `axis`
    axis: int  # of the weight, along which the scales run
    bias: npt.NDArray[np.float64]  # [out]
    grid: ActivationGrid | None  # of the input; None: the input is float
