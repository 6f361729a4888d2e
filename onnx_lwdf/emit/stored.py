"""What an emitter is given for each layer, laid out as the model stores weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnx_lwdf.layers import Layer
from onnx_lwdf.ranges import ActivationGrid


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight on its grid: codes times one scale per output channel."""

    codes: npt.NDArray[np.int8]  # the shape of the model's weight
    scale: npt.NDArray[np.float32]  # [scales], along `axis`
    axis: int  # of the weight, along which the scales run
    bits: int  # all codes are in code_range(bits)


@dataclass(frozen=True, slots=True)
class Stored:
    """One layer's solution."""

    layer: Layer
    weight: npt.NDArray[np.float32]  # the shape of the model's weight
    rounded: Rounded | None  # the same weight as codes; None: its values are float
    bias: npt.NDArray[np.float64]  # [out]
    grid: ActivationGrid | None  # of the input; None: the input is float
