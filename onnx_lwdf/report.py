"""What happened to every layer, as data, as JSON, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One Conv, ConvTranspose, Gemm or MatMul."""

    name: str
    op: str
    shape: tuple[int, ...]  # of the weight as the model stores it; () where it is not constant
    status: str  # "compressed" or "kept"
    reason: str  # why it was kept, or a note
    statistics: str  # where its input statistics come from: "bn", "propagated", "data", "weights-only", ""
    method: str
    weight_bits: int | None
    activation_bits: int | None
    sparsity: float
    sqnr_db: float | None  # at the layer's output, float beside compressed; None where not measured
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True)
class Report:
    """The whole run. `to_dict()` is the JSON schema that pipelines rely on."""

    tool: Mapping[str, str]  # name, version
    input: Mapping[str, Any]  # path, sha256, bytes
    output: Mapping[str, Any]  # path, bytes
    options: Mapping[str, Any]
    layers: tuple[LayerReport, ...]
    outputs: Mapping[str, float]  # output name -> SQNR dB on synthetic inputs; empty in a dry run
    warnings: tuple[str, ...] = ()

    @property
    def compressed(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.status == "compressed")

    @property
    def kept(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.status == "kept")

    @property
    def worst(self) -> LayerReport | None:
        """The compressed layer with the lowest SQNR."""
        measured = [layer for layer in self.compressed if layer.sqnr_db is not None]
        return min(measured, key=lambda layer: layer.sqnr_db or 0.0, default=None)

    @property
    def output_db(self) -> float | None:
        """The lowest SQNR over the outputs, which `--fail-under` gates."""
        return min(self.outputs.values(), default=None)
