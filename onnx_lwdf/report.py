"""What happened to every layer, as data, as JSON, as Markdown."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnx_lwdf import page
from onnx_lwdf.errors import ModelError, OptionError
from onnx_lwdf.staging import settle, staging
from onnx_lwdf.tradeoff import Point

SCHEMA = 1  # of to_dict(): raised when a name changes its meaning or goes away


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One operator that holds weights, or a Concat behind the last layer, which stays float."""

    name: str
    op: str
    shape: tuple[int, ...]  # of the weight as the model stores it; () where it is not constant
    status: str  # "compressed" or "kept"
    reason: str  # why it was kept, or a note
    statistics: str  # of its input: "bn", "recovered", "propagated", "weights-only" (none), "data", or ""
    method: str
    weight_bits: int | None
    activation_bits: int | None
    sparsity: float
    sqnr_db: float | None  # at the layer's output, float beside compressed; None where not measured
    bytes_before: int
    bytes_after: int

    @property
    def bits(self) -> str:
        """w6a6, w8 (float activations), float, or nothing where the layer was kept."""
        if self.weight_bits is None:
            return "float" if self.status == "compressed" else ""
        return f"w{self.weight_bits}" + ("" if self.activation_bits is None else f"a{self.activation_bits}")


@dataclass(frozen=True, slots=True)
class Report:
    """The whole run. `to_dict()` is the JSON schema that pipelines rely on."""

    tool: Mapping[str, str]  # name, version
    input: Mapping[str, Any]  # path, sha256, bytes
    output: Mapping[str, Any]  # path, bytes; the bytes are None in a dry run
    options: Mapping[str, Any]
    layers: tuple[LayerReport, ...]
    outputs: Mapping[str, float]  # output name -> SQNR dB on synthetic inputs; empty in a dry run
    warnings: tuple[str, ...] = ()
    tradeoff: tuple[Point, ...] = ()  # where bits were chosen: files that could be written, sizes rising

    @property
    def compressed(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.status == "compressed")

    @property
    def kept(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.status == "kept")

    @property
    def worst(self) -> LayerReport | None:
        """The compressed layer with the lowest SQNR."""
        measured = [(_rank(layer.sqnr_db), layer) for layer in self.compressed if layer.sqnr_db is not None]
        return min(measured, key=lambda pair: pair[0], default=(0.0, None))[1]

    @property
    def output_db(self) -> float | None:
        """The lowest SQNR over the outputs, which `--fail-under` gates."""
        return min(self.outputs.values(), key=_rank, default=None)

    def to_dict(self) -> dict[str, Any]:
        """The JSON schema, in plain dicts, lists, strings and numbers.

        JSON has no infinities: a number that is not finite is null. An SQNR of null was not measured, or nothing
        differs (+inf dB), or the float tensor is zero everywhere (-inf dB). `bytes` and the totals' `bytes_before` and
        `bytes_after` are sizes of files with their external data; those of a layer are of its weight.
        """
        worst = self.worst
        return {
            "schema": SCHEMA,
            "tool": _plain(self.tool),
            "input": _plain(self.input),
            "output": _plain(self.output),
            "options": _plain(self.options),
            "layers": [_plain(asdict(layer) | {"sqnr_db": _rounded(layer.sqnr_db)}) for layer in self.layers],
            "totals": {
                "bytes_before": self.input["bytes"],
                "bytes_after": self.output["bytes"],
                "layers_compressed": len(self.compressed),
                "layers_kept": len(self.kept),
                "worst_layer": worst.name if worst else None,
                "worst_layer_db": _rounded(worst.sqnr_db) if worst else None,
                "output_db": _rounded(self.output_db),
                "outputs": {name: _rounded(value) for name, value in self.outputs.items()},
            },
            "tradeoff": [asdict(point) | {"predicted_db": _rounded(point.predicted_db)} for point in self.tradeoff],
            "warnings": list(self.warnings),
        }

    def to_json(self) -> str:
        """`to_dict()` in ASCII, so that any encoding of stdout can carry it."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """The summary, a table of the layers, that of the trade-off where there is one, and the warnings."""
        title = f"# {self.tool['name']} {self.tool['version']}\n\n{_escaped(self.summary())}\n\n"
        parts = [title, _markdown(COLUMNS, self.rows())]
        if self.tradeoff:
            parts += ["\n", _markdown(TRADEOFF_COLUMNS, self.tradeoff_rows())]
        notes = [f"- warning: {_escaped(printable(text))}\n" for text in self.warnings]
        return "".join([*parts, *(["\n", *notes] if notes else [])])

    def to_html(self) -> str:
        """The same as a page that needs nothing else, with a picture of the trade-off."""
        return page.html(
            f"{self.tool['name']} {self.tool['version']}",
            [self.summary(), *(f"warning: {printable(text)}" for text in self.warnings)],
            (COLUMNS, self.rows()),
            (TRADEOFF_COLUMNS, self.tradeoff_rows()),
            [(point.bytes, point.predicted_db, point.chosen) for point in self.tradeoff],
        )

    def tradeoff_rows(self) -> list[tuple[str, ...]]:
        """The cells of the trade-off, in the order of TRADEOFF_COLUMNS."""
        return [
            (f"{point.bytes:,}", _decibels(point.predicted_db), "chosen" if point.chosen else "")
            for point in self.tradeoff
        ]

    def rows(self) -> list[tuple[str, ...]]:
        """The layer table's cells, one tuple per layer, in the order of COLUMNS."""
        return [
            (
                printable(layer.name),
                printable(layer.op),
                "x".join(map(str, layer.shape)),
                layer.statistics,
                layer.method,
                layer.bits or "float",
                f"{layer.sparsity:.3f}" if layer.sparsity else "",
                _decibels(layer.sqnr_db),
                f"{layer.bytes_before:,} -> {layer.bytes_after:,}",
                printable(layer.reason),
            )
            for layer in self.layers
        ]

    def summary(self) -> str:
        """One line: the file, its sizes, fidelity, the worst layer, and what was left alone and why."""
        parts = [*self._sizes(), self._counts(), *self._fidelity()]
        reasons = Counter(layer.reason for layer in self.kept)
        parts.extend(f"left alone: {count} ({reason})" for reason, count in reasons.items())
        path = self.output["path"]
        return printable(("" if path is None else f"{path}: ") + "; ".join(parts))

    def _sizes(self) -> list[str]:
        before, after = self.input["bytes"], self.output["bytes"]
        return [] if after is None else [f"{before:,} -> {after:,} bytes ({after / before:.3f} of the original)"]

    def _counts(self) -> str:
        planned = "to be " if self.output["bytes"] is None else ""
        kinds = Counter(layer.bits or "float" for layer in self.compressed)
        bits = ", ".join(f"{count} at {name}" for name, count in kinds.most_common())
        return f"{len(self.compressed)} of {len(self.layers)} layers {planned}compressed" + (
            f" ({bits})" if bits else ""
        )

    def _fidelity(self) -> list[str]:
        parts = [] if self.output_db is None else [f"output {_decibels(self.output_db)} dB on synthetic inputs"]
        worst = self.worst
        return parts + ([] if worst is None else [f"worst layer {worst.name} {_decibels(worst.sqnr_db)} dB"])


COLUMNS = ("layer", "op", "shape", "statistics", "method", "bits", "sparsity", "SQNR dB", "bytes", "note")
TRADEOFF_COLUMNS = ("file bytes", "predicted dB", "")
NUMERIC_COLUMNS = ("sparsity", "SQNR dB", "bytes", "file bytes", "predicted dB")

WRITERS: Mapping[str, Callable[[Report], str]] = {
    ".json": Report.to_json,
    ".md": Report.to_markdown,
    ".html": Report.to_html,
}


def check_path(path: Path) -> None:
    """OptionError where no writer knows the suffix, ModelError where the folder does not exist."""
    if path.suffix.lower() not in WRITERS:
        raise OptionError(f"report {str(path)!r} has no known suffix; it must end in {', '.join(WRITERS)}")
    if not path.parent.is_dir():
        raise ModelError(f"{path.parent}: no such folder; create it first")
    if path.exists() and not path.is_file():
        raise ModelError(f"{path}: is no file; give another --report")


def write(report: Report, path: Path) -> None:
    """Write the report in the format of the path's suffix, in one step; ModelError where the disk refuses."""
    check_path(path)
    text = WRITERS[path.suffix.lower()](report)
    try:
        with staging(path) as folder:
            (folder / path.name).write_text(text, encoding="utf-8", newline="\n")
            settle(folder / path.name, path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror or error}") from error


def printable(text: str) -> str:
    r"""One line that does nothing to a terminal: control characters and lone surrogates as escapes.

    >>> print(printable("conv\x1b[2J\n"))
    conv\x1b[2J\n
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _plain(value: Any) -> Any:
    """What JSON can carry: mappings as dicts, sequences as lists, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rank(decibels: float) -> float:
    """NaN is below everything."""
    return -math.inf if math.isnan(decibels) else decibels


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 4)


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _markdown(columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    rules = tuple("---:" if name in NUMERIC_COLUMNS else "---" for name in columns)
    table = (columns, rules, *(tuple(_escaped(cell) for cell in row) for row in rows))
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_~<\[|])", r"\\\1", text)
