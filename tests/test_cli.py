from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner, Result

from onnx_lwdf import api, cli
from onnx_lwdf.compress import Progress
from onnx_lwdf.config import TARGETS, Config
from onnx_lwdf.emit import FORMATS, INTEGER
from onnx_lwdf.errors import ModelError, OptionError
from onnx_lwdf.model_io import tool_version
from onnx_lwdf.report import COLUMNS, LayerReport, Report
from onnx_lwdf.solvers import SOLVERS
from onnx_lwdf.tradeoff import Point

COLOURED = re.compile(r"\x1b\[[0-9;]*3[0-9;]*m")
STYLED = re.compile(r"\x1b\[[0-9;]*m")
LONG_NAME = "/features/features.0/" + "block/" * 30 + "Conv"
LONG_NOTE = "the weight is shared by two nodes " * 10
LAYER = LayerReport(
    name="/stem/Conv",
    op="Conv",
    shape=(16, 3, 3, 3),
    status="compressed",
    reason="",
    statistics="bn",
    method="gptq",
    weight_bits=6,
    activation_bits=6,
    sparsity=0.0,
    sqnr_db=21.5,
    bytes_before=1728,
    bytes_after=496,
)
REPORT = Report(
    tool={"name": "onnx-lwdf", "version": "0"},
    input={"path": "m.onnx", "sha256": "ab", "bytes": 100_000},
    output={"path": "out.onnx", "bytes": 26_000},
    options={},
    layers=(LAYER, replace(LAYER, name=LONG_NAME, reason=LONG_NOTE), replace(LAYER, name="[/red]x[bold]")),
    outputs={"y": 17.25},
    warnings=("opset raised from 11 to 13, which the format needs",),
)
RESULT = api.Result(onnx.ModelProto(), REPORT)


@dataclass
class Calls:
    """What the command line asked of the API, and what the API is to answer."""

    config: Config | None = None
    model: Path | None = None
    output: Path | None = None
    force: bool | None = None
    checked: list[Path] = field(default_factory=list)
    inspected: bool = False
    failure: BaseException | None = None
    problems: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def compress(self, config: Config, model: Path, output: Any, *, force: bool, on_layer: Any) -> api.Result:
        self.config, self.model, self.force = config, model, force
        self.output = output(config) if callable(output) else output
        on_layer(Progress("solve", "/stem/Conv", 1, 3))
        if self.failure is not None:
            raise self.failure
        return RESULT

    def inspect(self, model: Path, config: Config) -> Report:
        self.config, self.model, self.inspected = config, model, True
        return replace(REPORT, output={"path": None, "bytes": None}, outputs={})

    def check(self, path: Path) -> tuple[str, ...]:
        self.checked.append(path)
        if self.failure is not None:
            raise self.failure
        return self.problems.get(str(path), ())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    result = Calls()
    monkeypatch.setattr(api, "compress_with", result.compress)
    monkeypatch.setattr(api, "inspect", result.inspect)
    monkeypatch.setattr(api, "check", result.check)
    return result


def run(*args: str, charset: str = "utf-8") -> Result:
    apart = {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}  # click 8.1
    return CliRunner(charset=charset, **apart).invoke(cli.command, args)  # type: ignore[arg-type]


def error_of(result: Result) -> str:
    """The one line on stderr."""
    assert result.stdout == ""
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").rstrip()


# Options


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("-b 6", "weight_bits", 6),
        ("--bits 6", "activation_bits", 6),
        ("--weight-bits 4", "weight_bits", 4),
        ("--activation-bits 5", "activation_bits", 5),
        ("--activation-bits float", "activation_bits", None),
        ("--bits-for a=b=4 --bits-for */head/*=8", "bits_for", {"a=b": 4, "*/head/*": 8}),
        ("--keep-first-last", "keep_first_last", True),
        ("--no-keep-first-last", "keep_first_last", False),
        ("--bits auto --fail-under 9", "auto_bits", True),
        ("--max-size 25%", "auto_bits", True),
        ("--max-size 25%", "max_size", 0.25),
        ("--max-size 2MB", "max_size", 2e6),
        ("--max-size 1.5kB", "max_size", 1500.0),
        ("--max-size 123456", "max_size", 123456.0),
        ("--max-size 25% --activation-bits 6", "activation_bits", 6),
        ("--max-size 25% --bits 8", "auto_bits", False),
        ("--max-size 25% --weight-bits 8", "auto_bits", False),
        ("--max-size 25% --sparsity 0.5", "weight_bits", None),
        ("--sparsity 0.5", "sparsity", 0.5),
        ("--sparsity 0.5", "weight_bits", None),
        ("--sparsity 0.5 --bits 8", "activation_bits", 8),
        ("--sparsity 0.5 --weight-bits 4", "activation_bits", 8),
        ("--nm 2:4", "nm", (2, 4)),
        ("--sparsity-for a=b=.5 --sparsity-for */head/*=0", "sparsity_for", {"a=b": 0.5, "*/head/*": 0.0}),
        ("--activations-from gaussian", "activations_from", "gaussian"),
        ("--activations-from some/folder", "activations_from", "some/folder"),
        ("-x Gemm --exclude head*", "exclude", ("Gemm", "head*")),
        ("--input-shape x:1,3,224,224 --input-shape a:0:7", "input_shape", {"x": (1, 3, 224, 224), "a:0": (7,)}),
        ("--input-range -1,2.5", "input_range", (-1.0, 2.5)),
        ("--input-mean 1,2,3 --input-std 4,5,6", "input_mean", (1.0, 2.0, 3.0)),
        ("--input-mean 1 --input-std 4.5", "input_std", (4.5,)),
        ("--fail-under 20", "fail_under", 20.0),
        ("--fail-under -3.5", "fail_under", -3.5),
        ("-j 3", "jobs", 3),
        ("--jobs 1", "jobs", 1),
        ("--samples 7", "samples", 7),
        ("--seed 9", "seed", 9),
        ("--save-as-external-data", "save_as_external_data", True),
        *((f"--method {name}", "method", name) for name in ("auto", *SOLVERS)),
        ("--format dense --sparsity 0.5", "format", "dense"),
        *((f"--target {name}", "target", name) for name in TARGETS),
        *(
            (f"--format {name} --activation-bits {8 if INTEGER in form.activations else 'float'}", "format", name)
            for name, form in FORMATS.items()
            if INTEGER in form.weights
        ),
        ("--format dense --channels 0.1", "format", "dense"),
        ("--channels 0.1", "channels", 0.1),
        ("--channels 0.1", "weight_bits", None),
        ("--channels 0.1", "activation_bits", None),
        ("--channels 0.1 --bits 6", "weight_bits", 6),
        ("--channels 0.1 --weight-bits 4", "activation_bits", 8),
        ("--channels 0.1 --activation-bits float", "weight_bits", None),
        ("--channels 0", "weight_bits", 8),
        ("--no-recalibrate", "recalibrate", False),
    ],
)
def test_option_reaches_the_config(calls: Calls, words: str, name: str, value: object) -> None:
    result = run("m.onnx", *words.split())
    assert result.exit_code == 0, result.stderr
    reached = getattr(calls.config, name)
    assert reached == value
    assert type(reached) is type(value)


def test_without_options_the_config_has_its_defaults(calls: Calls) -> None:
    assert run("m.onnx").exit_code == 0
    assert calls.config == Config()
    assert calls.force is False


def test_every_option_of_the_config_has_a_word() -> None:
    words = {parameter.name for parameter in cli.command.params}
    assert set(Config.__dataclass_fields__) - {"auto_bits"} <= words  # that one is a value of bits


@pytest.mark.parametrize(
    ("words", "output"),
    [
        ("a/m.onnx", "a/m.w8a8.onnx"),
        ("m.v2.onnx -b 6", "m.v2.w6a6.onnx"),
        ("m.onnx --channels 0.2", "m.c20.onnx"),
        ("m.onnx --channels 0.125 -b 8", "m.w8a8.c12.5.onnx"),
        ("m.onnx --weight-bits 4", "m.w4a8.onnx"),
        ("m.onnx --weight-bits 4 --activation-bits float", "m.w4.onnx"),
        ("m.onnx --sparsity 0.5", "m.s50.onnx"),
        ("m.onnx --sparsity 0.5 --bits 8", "m.w8a8.s50.onnx"),
        ("m.onnx --nm 2:4", "m.2of4.onnx"),
        ("m.onnx --max-size 25%", "m.auto.a8.onnx"),
        ("m.onnx -o b/o.onnx", "b/o.onnx"),
        ("m.onnx --output o.onnx", "o.onnx"),
        (".", ".w8a8.onnx"),
    ],
)
def test_output_name(calls: Calls, words: str, output: str) -> None:
    assert run(*words.split()).exit_code == 0
    assert calls.output == Path(output)
    assert calls.model == Path(words.split()[0])


def test_force_reaches_the_api(calls: Calls) -> None:
    assert run("m.onnx", "--force").exit_code == 0
    assert calls.force is True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("m.onnx --bits 9", "--bits': '9' is neither 2 to 8 nor 'auto'"),
        ("m.onnx -b 1", "'1' is neither 2 to 8"),
        ("m.onnx -b auto", "bits auto needs an aim; give --max-size or --fail-under"),
        ("m.onnx -b auto --weight-bits 4 --max-size 9%", "leave weight-bits out"),
        ("m.onnx --max-size 0", "'--max-size': '0' is not a size, such as 25%, 2MB or a number of bytes"),
        ("m.onnx --max-size 101%", "'101%' is not a size"),
        ("m.onnx --max-size -2MB", "'-2MB' is not a size"),
        ("m.onnx --max-size MB", "'MB' is not a size"),
        ("m.onnx --max-size 2MM", "'2MM' is not a size"),
        ("m.onnx --max-size x%", "'x' is not a number"),
        ("m.onnx --weight-bits six", "'six' is not a valid integer"),
        ("m.onnx --activation-bits half", "'half' is neither a number nor 'float'"),
        ("m.onnx --activation-bits 9", "it must be 2 to 8"),
        ("m.onnx --bits-for head", "'--bits-for': 'head' is not PATTERN=N, such as '*/head/*=8'"),
        ("m.onnx --bits-for =8", "'=8' is not PATTERN=N"),
        ("m.onnx --bits-for head=x", "'head=x' is not PATTERN=N"),
        ("m.onnx --bits-for head=9", "it must be 2 to 8"),
        ("m.onnx --sparsity half", "'half' is not a number"),
        ("m.onnx --sparsity 1", "it must be at least 0 and below 1"),
        ("m.onnx --nm 2/4", "'2/4' is not N:M, such as 2:4"),
        ("m.onnx --nm 4:2", "N must be at least 1 and below M"),
        ("m.onnx --nm 2:4 --sparsity .5", "sparsity excludes nm"),
        ("m.onnx --sparsity-for head", "'head' is not PATTERN=F"),
        ("m.onnx --sparsity-for head=1", "sparsity-for 'head' is 1"),
        ("m.onnx --sparsity .5 --method squant", "use auto or one of magnitude, obs"),
        ("m.onnx --input-shape x", "'--input-shape': 'x' is not NAME:DIMS, such as x:1,3,224,224"),
        ("m.onnx --input-shape x:", "'x:' is not NAME:DIMS"),
        ("m.onnx --input-shape x:1,N", "'x:1,N' is not NAME:DIMS"),
        ("m.onnx --input-shape x:1,0", "'x:1,0' is not NAME:DIMS"),
        ("m.onnx --input-range 1", "'1' is not LO,HI"),
        ("m.onnx --input-range 1,2,3", "'1,2,3' is not LO,HI"),
        ("m.onnx --input-range 0,nan", "'nan' is not a number"),
        ("m.onnx --input-mean 1,,2 --input-std 1,1,1", "'' is not a number"),
        ("m.onnx --input-mean 1", "give both or neither"),
        ("m.onnx --fail-under nan", "'nan' is not a number"),
        ("m.onnx --method magic", "'--method': 'magic' is not one of"),
        ("m.onnx --target toaster", "'toaster' is not one of"),
        ("m.onnx --format zip", "'zip' is not one of"),
        ("m.onnx --jobs 0", "0 is not in the range x>=1"),
        ("m.onnx --channels 1", "'1' is not a share"),
        ("m.onnx --channels -0.1", "'-0.1' is not a share"),
        ("m.onnx --samples 0", "0 is not in the range x>=1"),
        ("m.onnx --seed -1", "-1 is not in the range x>=0"),
        ("m.onnx --report r.txt", "report 'r.txt' has no known suffix; it must end in .json, .md, .html"),
        ("m.onnx --no-such-option", "No such option"),
        ("m.onnx n.onnx", "2 models were given; give one, only --check takes several"),
        ("", "Missing argument 'MODEL.onnx'; see onnx-lwdf --help"),
        ("--check", "Missing argument 'MODEL.onnx'"),
        ("m.onnx --check --json", "--json does not go with --check"),
        ("m.onnx --check -o o.onnx", "--output does not go with --check"),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(calls: Calls, words: str, said: str) -> None:
    result = run(*words.split())
    assert result.exit_code == 2
    assert said in error_of(result)
    assert calls.config is None
    assert not calls.checked


def test_report_into_a_missing_folder_fails_before_the_work(calls: Calls, tmp_path: Path) -> None:
    result = run("m.onnx", "--report", str(tmp_path / "no" / "r.json"))
    assert result.exit_code == 1
    assert "no such folder; create it first" in error_of(result)
    assert calls.config is None


@pytest.mark.parametrize("words", ["-h", "--help"])
def test_help_names_every_option(words: str) -> None:
    result = run(words)
    assert result.exit_code == 0
    for parameter in cli.command.params:
        assert all(word in result.stdout for word in parameter.opts if word.startswith("-"))


@pytest.mark.parametrize("words", ["-V", "--version"])
def test_version(words: str) -> None:
    result = run(words)
    assert (result.exit_code, result.stdout) == (0, f"onnx-lwdf {tool_version()}\n")


# What is shown


def test_piped_table_is_whole(calls: Calls) -> None:
    """Nothing is cut off, folded or coloured, and markup in names is text."""
    lines = run("m.onnx").stdout.splitlines()
    assert len(lines) == 1 + len(REPORT.layers) + 1
    assert all(name in lines[0] for name in COLUMNS)
    for line, row in zip(lines[1:], REPORT.rows(), strict=False):
        assert all(cell.strip() in line for cell in row)
    assert lines[-1] == REPORT.summary()
    assert not any("\x1b" in line or line != line.rstrip() for line in lines)


def test_warnings_are_on_stderr(calls: Calls) -> None:
    assert run("m.onnx").stderr == "warning: opset raised from 11 to 13, which the format needs\n"


def test_forced_colour_does_not_reach_a_pipe(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = run("m.onnx")
    assert "\x1b" not in result.stdout + result.stderr
    assert LONG_NAME in result.stdout


def test_json_is_alone_on_stdout(calls: Calls) -> None:
    result = run("m.onnx", "--json")
    assert json.loads(result.stdout) == REPORT.to_dict()
    assert result.stderr.startswith("warning: ")


def test_quiet_is_silent_on_stdout(calls: Calls) -> None:
    result = run("m.onnx", "-q")
    assert (result.exit_code, result.stdout) == (0, "")


def test_quiet_leaves_what_json_asks_for(calls: Calls) -> None:
    assert json.loads(run("m.onnx", "-q", "--json").stdout) == REPORT.to_dict()


def test_reports_are_written(calls: Calls, tmp_path: Path) -> None:
    paths = tmp_path / "r.json", tmp_path / "r.md"
    assert run("m.onnx", "-q", "--report", str(paths[0]), "--report", str(paths[1])).exit_code == 0
    assert json.loads(paths[0].read_text()) == REPORT.to_dict()
    assert paths[1].read_text() == REPORT.to_markdown()


def test_dry_run_only_inspects(calls: Calls) -> None:
    result = run("m.onnx", "-n", "-b", "6")
    assert result.exit_code == 0
    assert calls.inspected
    assert calls.output is None
    assert calls.config == Config(weight_bits=6, activation_bits=6)
    assert "/stem/Conv" in result.stdout
    assert "3 of 3 layers to be compressed" in result.stdout


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def color(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 100 columns, as far as the environment says."""
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "100")):
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def drawn(stream: io.StringIO) -> str:
    """What a bar leaves on this stream."""
    with contextlib.redirect_stderr(stream), cli._Bar(wanted=True) as bar:
        bar.step(Progress("solve", "/stem/[/red]", 1, 3))
    return stream.getvalue()


@pytest.mark.usefixtures("color")
def test_progress_on_a_terminal() -> None:
    text = drawn(Terminal())
    assert "solve /stem/[/red]" in text
    assert "1/3" in text
    assert COLOURED.search(text)


@pytest.mark.usefixtures("color")
def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = drawn(Terminal())
    assert "solve /stem/[/red]" in text
    assert not COLOURED.search(text)


@pytest.mark.usefixtures("color")
def test_no_progress_on_a_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert drawn(Terminal()) == ""


@pytest.mark.usefixtures("color")
def test_no_progress_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert drawn(io.StringIO()) == ""


@pytest.mark.usefixtures("color")
def test_table_folds_to_the_terminal_and_loses_nothing() -> None:
    with contextlib.redirect_stdout(Terminal()):
        lines = STYLED.sub("", cli._table(REPORT)).splitlines()
    assert max(map(len, lines)) <= 100
    first_column = lines[0].index("op")
    assert "".join(line[:first_column].strip() for line in lines[1:]) == "".join(row[0] for row in REPORT.rows())


@pytest.mark.parametrize(("words", "wanted"), [("", True), ("-q", False), ("--no-progress", False)])
def test_progress_can_be_turned_off(calls: Calls, monkeypatch: pytest.MonkeyPatch, words: str, wanted: bool) -> None:
    seen: list[bool] = []

    class Bar(cli._Bar):
        def __init__(self, wanted: bool) -> None:
            seen.append(wanted)
            super().__init__(wanted)

    monkeypatch.setattr(cli, "_Bar", Bar)
    assert run("m.onnx", *words.split()).exit_code == 0
    assert seen == [wanted]


# What goes wrong


def gate() -> api.Gate:
    return api.Gate("an output has 17.25 dB, below --fail-under 20; use more bits", RESULT)


def test_gate_shows_the_table_and_exits_3(calls: Calls, tmp_path: Path) -> None:
    calls.failure = gate()
    path = tmp_path / "r.json"
    result = run("m.onnx", "--fail-under", "20", "--report", str(path))
    assert result.exit_code == 3
    assert result.stdout.endswith(REPORT.summary() + "\n")
    assert result.stderr.splitlines()[-1] == "error: an output has 17.25 dB, below --fail-under 20; use more bits"
    assert json.loads(path.read_text()) == REPORT.to_dict()


def test_the_trade_off_follows_the_summary(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    points = (Point(1_000_000, 5.5), Point(2_000_000, 9.25, chosen=True))
    monkeypatch.setattr(sys.modules[__name__], "RESULT", replace(RESULT, report=replace(REPORT, tradeoff=points)))
    lines = run("m.onnx", "--max-size", "25%").stdout.splitlines()[-3:]
    assert [line.split() for line in lines] == [
        ["bytes", "predicted", "dB"],
        ["1,000,000", "5.50"],
        ["2,000,000", "9.25", "chosen"],
    ]


def test_gate_with_json_keeps_stdout_clean(calls: Calls) -> None:
    calls.failure = gate()
    result = run("m.onnx", "--fail-under", "20", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == REPORT.to_dict()


FAILURES = [
    (ModelError("m.onnx: no such file; check the path"), 1, "m.onnx: no such file; check the path"),
    (ModelError("m.onnx: two\n  lines \x1b[2J"), 1, r"m.onnx: two lines \x1b[2J"),
    (OptionError("exclude 'x' matches no layer"), 2, "exclude 'x' matches no layer"),
    (OSError(28, "No space left on device", "out.onnx"), 1, "out.onnx: No space left on device"),
    (PermissionError(13, "Permission denied", "out.onnx"), 1, "out.onnx: Permission denied"),
    (OSError("strange"), 1, "strange"),
    (MemoryError(), 1, "out of memory; use fewer --samples, fewer --jobs or a smaller --input-shape"),
    (
        TypeError("bad\noperand"),
        1,
        "internal: TypeError: bad operand; run again with -v for the traceback and report it",
    ),
]


@pytest.mark.parametrize(("failure", "code", "said"), FAILURES)
def test_failure_is_one_line(calls: Calls, failure: Exception, code: int, said: str) -> None:
    calls.failure = failure
    result = run("m.onnx")
    assert result.exit_code == code
    assert error_of(result) == said


@pytest.mark.parametrize(("failure", "code", "said"), FAILURES)
def test_verbose_adds_the_traceback(calls: Calls, failure: Exception, code: int, said: str) -> None:
    calls.failure = failure
    result = run("m.onnx", "-v")
    assert result.exit_code == code
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert result.stderr.endswith(f"error: {said}\n")
    assert result.stdout == ""


def test_v_as_a_value_is_not_verbose(calls: Calls) -> None:
    calls.failure = ModelError("m.onnx: broken; export it again")
    assert error_of(run("m.onnx", "-x", "-v")) == "m.onnx: broken; export it again"


def test_interrupt_exits_130(calls: Calls) -> None:
    calls.failure = KeyboardInterrupt()
    result = run("m.onnx", "-v")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_console_script_uses_the_arguments(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["onnx-lwdf", "m.onnx", "-q", "-b", "4"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert calls.config == Config(weight_bits=4, activation_bits=4)


# --check


def test_check_says_each_file(calls: Calls) -> None:
    calls.problems = {"b.onnx": ("scale 's' is not positive", "is not valid")}
    result = run("--check", "a.onnx", "b.onnx", "c.onnx")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "ok a.onnx",
        "failed b.onnx: scale 's' is not positive; is not valid",
        "ok c.onnx",
    ]
    assert result.stderr == "error: 1 of 3 files failed the check; compress their originals again\n"


def test_check_passes(calls: Calls) -> None:
    result = run("--check", "a.onnx")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "ok a.onnx\n", "")
    assert calls.checked == [Path("a.onnx")]


def test_check_goes_on_behind_a_file_that_cannot_be_read(calls: Calls) -> None:
    calls.failure = ModelError("a.onnx: no such file; check the path")
    result = run("--check", "a.onnx", "a.onnx")
    assert result.exit_code == 1
    assert result.stdout == "failed a.onnx: no such file; check the path\n" * 2


def test_quiet_check_says_failures_only(calls: Calls) -> None:
    calls.problems = {"b.onnx": ("is not valid",)}
    assert run("--check", "-q", "a.onnx", "b.onnx").stdout == "failed b.onnx: is not valid\n"


# Real pipes

STUB = """
import sys
sys.path.insert(0, {tests!r})
import test_cli
from onnx_lwdf import api, cli
calls = test_cli.Calls({failure})
api.compress_with = calls.compress
cli.main()
"""


def spawn(stdout: Any, failure: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    code = STUB.format(tests=str(Path(__file__).parent), failure=failure)
    return subprocess.run(
        [sys.executable, "-c", code, "m.onnx"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is another error on Windows")
@pytest.mark.parametrize(("failure", "code"), [("", 0), ("failure=test_cli.gate()", 3)])
def test_closed_pipe_does_not_hide_how_it_went(closed_pipe: int, failure: str, code: int) -> None:
    result = spawn(closed_pipe, failure)
    assert result.returncode == code
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_full_disk_behind_stdout_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        result = spawn(full)
    assert result.returncode == 1
    assert result.stderr.splitlines()[1:] == ["error: No space left on device"]


def test_stdout_may_lack_the_letters_of_a_name(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    named = replace(REPORT, layers=(replace(LAYER, name="層/Conv"),))
    monkeypatch.setattr(api, "inspect", lambda *_: named)
    result = run("m.onnx", "-n", charset="latin-1")
    assert result.exit_code == 0, result.stderr
    assert r"\u5c64/Conv" in result.stdout


def test_module_runs() -> None:
    result = subprocess.run([sys.executable, "-m", "onnx_lwdf", "-V"], capture_output=True, text=True, check=True)
    assert result.stdout == f"onnx-lwdf {tool_version()}\n"
