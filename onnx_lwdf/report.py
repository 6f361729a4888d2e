"""What happened to every layer, as data, as JSON, as Markdown."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnx_lwdf.errors import ModelError, OptionError

SCHEMA = 1  # of to_dict(): raised when a name changes its meaning or goes away


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One Conv, ConvTranspose, Gemm or MatMul."""

    name: str
    op: str
    shape: tuple[int, ...]  # of the weight as the model stores it; () where it is not constant
    status: str  # "compressed" or "kept"
    reason: str  # why it was kept, or a note
    statistics: str  # where its input statistics come from: "bn", "propagated", "data", or ""
    method: str
    weight_bits: int | None
    activation_bits: int | None
    sparsity: float
    sqnr_db: float | None  # at the layer's output, float beside compressed; None where not measured
    bytes_before: int
    bytes_after: int

    @property
    def bits(self) -> str:
        """w6a6, w8 (float activations), or nothing."""
        if self.weight_bits is None:
            return ""
        return f"w{self.weight_bits}" + ("" if self.activation_bits is None else f"a{self.activation_bits}")


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

    def to_dict(self) -> dict[str, Any]:
        """The JSON schema. An SQNR that is not finite (nothing differs, or nothing is left) is null."""
        worst = self.worst
        return {
            "schema": SCHEMA,
            "tool": dict(self.tool),
            "input": dict(self.input),
            "output": dict(self.output),
            "options": dict(self.options),
            "layers": [
                asdict(layer) | {"shape": list(layer.shape), "sqnr_db": _finite(layer.sqnr_db)} for layer in self.layers
            ],
            "totals": {
                "bytes_before": self.input["bytes"],
                "bytes_after": self.output["bytes"],
                "layers_compressed": len(self.compressed),
                "layers_kept": len(self.kept),
                "worst_layer": worst.name if worst else None,
                "worst_layer_db": _finite(worst.sqnr_db) if worst else None,
                "output_db": _finite(self.output_db),
                "outputs": {name: _finite(value) for name, value in self.outputs.items()},
            },
            "warnings": list(self.warnings),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """A table of the layers and the summary."""
        head = "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS) + "\n"
        rows = ("| " + " | ".join(_escaped(cell) for cell in row) + " |\n" for row in self.rows())
        notes = "".join(f"\n- warning: {text}" for text in self.warnings)
        return f"# {self.tool['name']} {self.tool['version']}\n\n{self.summary()}\n\n{head}{''.join(rows)}{notes}"

    def rows(self) -> list[tuple[str, ...]]:
        """The layer table's cells, one tuple per layer, in the order of COLUMNS."""
        return [
            (
                layer.name,
                layer.op,
                "x".join(map(str, layer.shape)),
                layer.statistics,
                layer.method,
                layer.bits or "float",
                _decibels(layer.sqnr_db),
                f"{layer.bytes_before:,} -> {layer.bytes_after:,}",
                layer.reason,
            )
            for layer in self.layers
        ]

    def summary(self) -> str:
        """One line: sizes, fidelity, the worst layer, and what was left alone."""
        before, after = self.input["bytes"], self.output["bytes"]
        parts = [f"{len(self.compressed)} of {len(self.layers)} layers compressed"]
        if after is not None:
            parts.insert(0, f"{before:,} -> {after:,} bytes ({after / before:.3f} of the original)")
        if self.output_db is not None:
            parts.append(f"output {_decibels(self.output_db)} dB on synthetic inputs")
        worst = self.worst
        if worst is not None:
            parts.append(f"worst layer {worst.name} {_decibels(worst.sqnr_db)} dB")
        reasons = Counter(layer.reason for layer in self.kept)
        parts.extend(f"left alone: {count} ({reason})" for reason, count in reasons.items())
        return "; ".join(parts)


COLUMNS = ("layer", "op", "shape", "statistics", "method", "bits", "SQNR dB", "bytes", "note")

WRITERS: Mapping[str, Callable[[Report], str]] = {".json": Report.to_json, ".md": Report.to_markdown}


def check_path(path: Path) -> None:
    """OptionError where no writer knows the suffix."""
    if path.suffix not in WRITERS:
        raise OptionError(f"report {str(path)!r} has no known suffix; it must end in {' or '.join(WRITERS)}")


def write(report: Report, path: Path) -> None:
    """Write the report in the format of the path's suffix, in one step; ModelError where the disk refuses."""
    check_path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            staged = Path(folder) / path.name
            staged.write_text(WRITERS[path.suffix](report), encoding="utf-8")
            os.replace(staged, path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror or error}") from error


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
