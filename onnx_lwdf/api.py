"""The public functions: the command line's words as arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from onnx_lwdf.config import Config
from onnx_lwdf.report import Report


@dataclass(frozen=True, slots=True)
class Result:
    model: onnx.ModelProto
    report: Report


@dataclass(frozen=True, slots=True)
class Progress:
    """One step done: `stage` is a word such as "solve", `name` the layer, or empty."""

    stage: str
    name: str
    done: int
    total: int


OnLayer = Callable[[Progress], None]


def compress(
    model: str | Path | onnx.ModelProto,
    output: str | Path | None = None,
    *,
    bits: int = 8,
    weight_bits: int | None = None,
    activation_bits: int | str | None = None,
    bits_for: Mapping[str, int] | None = None,
    keep_first_last: bool | None = None,
    method: str = "auto",
    activations_from: str | Path = "aligned",
    format: str = "auto",
    target: str = "generic",
    exclude: Sequence[str] = (),
    input_shape: Mapping[str, Sequence[int]] | None = None,
    input_range: tuple[float, float] | None = None,
    input_mean: Sequence[float] | None = None,
    input_std: Sequence[float] | None = None,
    fail_under: float | None = None,
    jobs: int | None = None,
    samples: int = 64,
    seed: int = 0,
    save_as_external_data: bool = False,
    force: bool = False,
    on_layer: OnLayer | None = None,
) -> Result:
    raise NotImplementedError


def inspect(model: str | Path | onnx.ModelProto, *, config: Config | None = None) -> Report:
    raise NotImplementedError


def check(path: str | Path) -> tuple[str, ...]:
    raise NotImplementedError
