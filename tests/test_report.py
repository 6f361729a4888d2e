from __future__ import annotations

import json
import math
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest

from onnx_lwdf import report as reports
from onnx_lwdf.errors import ModelError, OptionError
from onnx_lwdf.report import LayerReport, Report, printable, write
from onnx_lwdf.tradeoff import Point

CONV = LayerReport(
    name="/stem/Conv",
    op="Conv",
    shape=(16, 3, 3, 3),
    status="compressed",
    reason="",
    statistics="bn",
    method="gptq",
    weight_bits=8,
    activation_bits=8,
    sparsity=0.125,
    sqnr_db=31.123456,
    bytes_before=1728,
    bytes_after=496,
)
GEMM = replace(CONV, name="/fc/Gemm", op="Gemm", shape=(10, 64), weight_bits=6, activation_bits=6, sqnr_db=18.5)
KEPT = LayerReport(
    name="attention",
    op="MatMul",
    shape=(),
    status="kept",
    reason="its weight is not constant",
    statistics="",
    method="",
    weight_bits=None,
    activation_bits=None,
    sparsity=0.0,
    sqnr_db=None,
    bytes_before=0,
    bytes_after=0,
)
REPORT = Report(
    tool={"name": "onnx-lwdf", "version": "1.2.3"},
    input={"path": "m.onnx", "sha256": "ab12", "bytes": 100_000},
    output={"path": "out.onnx", "bytes": 26_000},
    options={"weight_bits": 6, "activation_bits": 6, "bits_for": {"/stem/*": 8}, "input_range": (-1.0, 1.0)},
    layers=(CONV, GEMM, KEPT),
    outputs={"logits": 17.25, "features": 20.0},
    warnings=("x: its range is not known; -1 to 1 is assumed",),
    tradeoff=(Point(20_000, 12.345678), Point(26_000, 17.0, chosen=True)),
)
DRY_RUN = replace(
    REPORT,
    output={"path": None, "bytes": None},
    outputs={},
    layers=(replace(CONV, sqnr_db=None), replace(GEMM, sqnr_db=None), KEPT),
)

# What pipelines rely on. A change here that is more than a new name needs a new schema number.
GOLDEN = {
    "schema": 1,
    "tool": {"name": "onnx-lwdf", "version": "1.2.3"},
    "input": {"path": "m.onnx", "sha256": "ab12", "bytes": 100_000},
    "output": {"path": "out.onnx", "bytes": 26_000},
    "options": {"weight_bits": 6, "activation_bits": 6, "bits_for": {"/stem/*": 8}, "input_range": [-1.0, 1.0]},
    "layers": [
        {
            "name": "/stem/Conv",
            "op": "Conv",
            "shape": [16, 3, 3, 3],
            "status": "compressed",
            "reason": "",
            "statistics": "bn",
            "method": "gptq",
            "weight_bits": 8,
            "activation_bits": 8,
            "sparsity": 0.125,
            "sqnr_db": 31.1235,
            "bytes_before": 1728,
            "bytes_after": 496,
        },
        {
            "name": "/fc/Gemm",
            "op": "Gemm",
            "shape": [10, 64],
            "status": "compressed",
            "reason": "",
            "statistics": "bn",
            "method": "gptq",
            "weight_bits": 6,
            "activation_bits": 6,
            "sparsity": 0.125,
            "sqnr_db": 18.5,
            "bytes_before": 1728,
            "bytes_after": 496,
        },
        {
            "name": "attention",
            "op": "MatMul",
            "shape": [],
            "status": "kept",
            "reason": "its weight is not constant",
            "statistics": "",
            "method": "",
            "weight_bits": None,
            "activation_bits": None,
            "sparsity": 0.0,
            "sqnr_db": None,
            "bytes_before": 0,
            "bytes_after": 0,
        },
    ],
    "totals": {
        "bytes_before": 100_000,
        "bytes_after": 26_000,
        "layers_compressed": 2,
        "layers_kept": 1,
        "worst_layer": "/fc/Gemm",
        "worst_layer_db": 18.5,
        "output_db": 17.25,
        "outputs": {"logits": 17.25, "features": 20.0},
    },
    "tradeoff": [
        {"bytes": 20_000, "predicted_db": 12.3457, "chosen": False},
        {"bytes": 26_000, "predicted_db": 17.0, "chosen": True},
    ],
    "warnings": ["x: its range is not known; -1 to 1 is assumed"],
}


def test_schema_is_as_promised() -> None:
    assert REPORT.to_dict() == GOLDEN
    assert json.loads(REPORT.to_json()) == GOLDEN


def test_names_keep_their_order() -> None:
    assert json.dumps(REPORT.to_dict()) == json.dumps(GOLDEN)


def test_dry_run_has_the_same_names() -> None:
    totals = DRY_RUN.to_dict()["totals"]
    assert totals.keys() == GOLDEN["totals"].keys()  # type: ignore[attr-defined]
    assert totals["bytes_before"] == 100_000
    assert {totals[name] for name in ("bytes_after", "worst_layer", "worst_layer_db", "output_db")} == {None}
    assert totals["outputs"] == {}


def test_number_that_is_not_finite_is_null() -> None:
    layers = (replace(CONV, sqnr_db=math.inf), replace(GEMM, sqnr_db=-math.inf, sparsity=math.nan))
    odd = replace(REPORT, layers=layers, outputs={"y": math.inf}, options={"fail_under": -math.inf})

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    read = json.loads(odd.to_json(), parse_constant=refuse)
    assert [layer["sqnr_db"] for layer in read["layers"]] == [None, None]
    assert read["layers"][1]["sparsity"] is None
    assert read["totals"]["output_db"] is None
    assert read["totals"]["outputs"] == {"y": None}
    assert read["totals"]["worst_layer"] == "/fc/Gemm"
    assert read["options"] == {"fail_under": None}


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_nan_is_the_worst_wherever_it_stands(order: tuple[str, str]) -> None:
    values = {"a": math.nan, "b": 3.0}
    odd = replace(
        REPORT,
        outputs={name: values[name] for name in order},
        layers=tuple(replace(CONV, name=name, sqnr_db=values[name]) for name in order),
    )
    assert odd.output_db is not None
    assert math.isnan(odd.output_db)
    assert odd.worst is not None
    assert odd.worst.name == "a"


def test_worst_layer_may_have_zero_or_negative_decibels() -> None:
    layers = tuple(replace(CONV, name=str(db), sqnr_db=db) for db in (5.0, 0.0, -3.0, None))
    worst = replace(REPORT, layers=layers).worst
    assert worst is not None
    assert worst.name == "-3.0"


def test_worst_is_none_without_measurements() -> None:
    assert DRY_RUN.worst is None
    assert DRY_RUN.output_db is None


def test_json_is_ascii() -> None:
    odd = replace(REPORT, layers=(replace(CONV, name="слой\udcff\x1b"),))
    text = odd.to_json()
    assert text.isascii()
    assert json.loads(text)["layers"][0]["name"] == "слой\udcff\x1b"


def test_summary() -> None:
    assert REPORT.summary() == (
        "out.onnx: 100,000 -> 26,000 bytes (0.260 of the original); "
        "2 of 3 layers compressed (1 at w8a8, 1 at w6a6); "
        "output 17.25 dB on synthetic inputs; worst layer /fc/Gemm 18.50 dB; "
        "left alone: 1 (its weight is not constant)"
    )


def test_summary_of_a_dry_run_promises_only_what_is_known() -> None:
    assert DRY_RUN.summary() == (
        "2 of 3 layers to be compressed (1 at w8a8, 1 at w6a6); left alone: 1 (its weight is not constant)"
    )


def test_summary_groups_reasons() -> None:
    kept = [replace(KEPT, name=str(n), reason=reason) for n, reason in enumerate(("excluded", "other", "excluded"))]
    assert replace(REPORT, layers=(CONV, *kept)).summary().endswith("left alone: 2 (excluded); left alone: 1 (other)")


def test_summary_is_one_line_whatever_the_names() -> None:
    odd = replace(REPORT, layers=(replace(CONV, name="a\nb\x1b[2J"), replace(KEPT, reason="c\r\nd")))
    assert odd.summary().isprintable()


def test_exact_match_reads_inf() -> None:
    assert "output inf dB" in replace(REPORT, outputs={"y": math.inf}).summary()


def test_rows_have_a_cell_for_each_column() -> None:
    rows = REPORT.rows()
    assert {len(row) for row in rows} == {len(reports.COLUMNS)}
    assert rows[0] == ("/stem/Conv", "Conv", "16x3x3x3", "bn", "gptq", "w8a8", "0.125", "31.12", "1,728 -> 496", "")
    assert rows[2][5:] == ("float", "", "", "0 -> 0", "its weight is not constant")


def test_markdown() -> None:
    lines = REPORT.to_markdown().splitlines()
    assert lines[0] == "# onnx-lwdf 1.2.3"
    assert lines[2] == REPORT.summary()
    table = [line for line in lines[: lines.index("", 4)] if line.startswith("|")]
    assert len(table) == 2 + len(REPORT.layers)
    assert {line.count("|") for line in table} == {len(reports.COLUMNS) + 1}
    assert lines[-3] == "| 26,000 | 17.00 | chosen |"
    assert lines[-1] == "- warning: x: its range is not known; -1 to 1 is assumed"


def test_html_has_what_markdown_has() -> None:
    page = REPORT.to_html()
    for text in (
        escape(REPORT.summary()),
        "warning: x: its range is not known",
        "<td>26,000</td><td>17.00</td><td>chosen</td>",
    ):
        assert text in page
    for row in REPORT.rows():
        assert f"<td>{row[0]}</td>" in page
    assert "<svg" in page
    assert "<svg" not in replace(REPORT, tradeoff=()).to_html()


def test_markdown_shows_names_as_they_are() -> None:
    odd = replace(REPORT, layers=(replace(CONV, name="a|b*c<d>__e__`f`\n[g]"),), warnings=(), tradeoff=())
    row = odd.to_markdown().splitlines()[-1]
    assert row.startswith(r"| a\|b\*c\<d>\_\_e\_\_\`f\`\\n\[g] | Conv |")


def test_printable_leaves_ordinary_text() -> None:
    assert printable("/features/0/Conv [é 層]") == "/features/0/Conv [é 層]"


@pytest.mark.parametrize(
    ("name", "text"), [("r.json", REPORT.to_json()), ("r.MD", REPORT.to_markdown()), ("r.html", REPORT.to_html())]
)
def test_write_goes_by_the_suffix(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text("old")
    write(REPORT, tmp_path / name)
    assert (tmp_path / name).read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["r.txt", "r.htm", "r", ".json"])
def test_unknown_suffix_names_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match=r"must end in \.json, \.md, \.html"):
        write(REPORT, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        write(REPORT, tmp_path / "nowhere" / "r.json")


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ModelError, match=r"r\.json: cannot be written: No space left on device"):
        write(REPORT, path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


def test_folder_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "r.json").mkdir()
    with pytest.raises(ModelError, match="is no file; give another --report"):
        write(REPORT, tmp_path / "r.json")
