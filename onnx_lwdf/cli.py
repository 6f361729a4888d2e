"""The command line: the only place that prints, draws progress or exits."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import onnx_lwdf
from onnx_lwdf import report as reports
from onnx_lwdf.activations.sources import SOURCES
from onnx_lwdf.compress import Progress as Step
from onnx_lwdf.config import BITS, TARGETS
from onnx_lwdf.emit import FORMATS
from onnx_lwdf.errors import LwdfError, OptionError
from onnx_lwdf.report import COLUMNS, Report
from onnx_lwdf.solvers import SOLVERS

INTERRUPTED = 130
UNLIMITED_WIDTH = 10_000  # of a table that is not shown on a terminal: nothing is cut off
NUMERIC_COLUMNS = ("SQNR dB", "bytes")


class _Pairs(click.ParamType):
    """NAME=VALUE or NAME:VALUE, the separator the last one in the text."""

    def __init__(self, separator: str, convert: Callable[[str], Any], metavar: str) -> None:
        self.separator, self.read, self.name = separator, convert, metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        name, found, text = value.rpartition(self.separator)
        try:
            if not (found and name):
                raise ValueError
            return name, self.read(text)
        except ValueError:
            self.fail(f"{value!r} is not {self.name}", param, ctx)


class _Numbers(click.ParamType):
    """Comma-separated numbers."""

    name = "NUMBERS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.5,0.5,0.5", param, ctx)


class _Bits(click.ParamType):
    """A number of bits, or "float"."""

    name = "N|float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "float" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor 'float'", param, ctx)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("models", metavar="MODEL.onnx", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write; MODEL.w8a8.onnx if not given.")
@click.option("-b", "--bits", default=8, show_default=True, help="Bits of weights and activations, 2 to 8.")
@click.option("--weight-bits", type=int, help="Bits of weights alone.")
@click.option("--activation-bits", type=_Bits(), help="Bits of activations alone; float compresses weights only.")
@click.option(
    "--bits-for",
    multiple=True,
    type=_Pairs("=", int, "PATTERN=N"),
    help="Bits of the layers whose name or operator matches a glob; repeatable.",
)
@click.option(
    "--keep-first-last/--no-keep-first-last",
    default=None,
    help="First and last layer stay at 8 bits; on below 8 bits.",
)
@click.option("--method", default="auto", show_default=True, type=click.Choice(["auto", *SOLVERS]))
@click.option(
    "--activations-from",
    default="aligned",
    show_default=True,
    metavar="|".join(key for key in SOURCES if key != "data") + "|PATH",
    help="Where layer inputs come from; a PATH is a folder of images, .npy or .npz.",
)
@click.option("--format", default="auto", show_default=True, type=click.Choice(["auto", *FORMATS]))
@click.option("--target", default="generic", show_default=True, type=click.Choice(list(TARGETS)))
@click.option("-x", "--exclude", multiple=True, metavar="PATTERN", help="Leave these layers alone; repeatable.")
@click.option(
    "--input-shape",
    multiple=True,
    type=_Pairs(":", _shape, "NAME:DIMS"),
    help="Where the model leaves it open, e.g. x:1,3,224,224; repeatable.",
)
@click.option("--input-range", type=_Numbers(), metavar="LO,HI", help="Values of the darkest and brightest pixel.")
@click.option("--input-mean", type=_Numbers(), help="Per channel, pixels on the 0..255 scale.")
@click.option("--input-std", type=_Numbers(), help="Per channel, pixels on the 0..255 scale.")
@click.option("--fail-under", type=float, metavar="DB", help="Exit 3 where an output's SQNR is below.")
@click.option("--report", "report_paths", multiple=True, type=click.Path(path_type=Path), help="x.json or x.md.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout, nothing else.")
@click.option("-j", "--jobs", type=int, help="Layers in parallel; all cores if not given.")
@click.option("--samples", default=64, show_default=True, help="Synthetic inputs.")
@click.option("--seed", default=0, show_default=True)
@click.option("-n", "--dry-run", is_flag=True, help="Only list what would be done to each layer.")
@click.option("--check", is_flag=True, help="Verify files that this tool wrote.")
@click.option("--save-as-external-data", is_flag=True, help="Weights in a file of their own.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stdout but what --json asks for.")
@click.option("-v", "--verbose", is_flag=True, help="A traceback behind an error.")
@click.option("--no-progress", is_flag=True)
@click.version_option(onnx_lwdf.__version__, "-V", "--version", prog_name="onnx-lwdf")
def command(models: tuple[Path, ...], check: bool, **options: Any) -> None:
    """Compress a trained CNN, without data: smaller, faster, with the same answers."""
    if check:
        _check(models)
        return
    if len(models) != 1:
        raise OptionError(f"one model at a time, not {len(models)}; only --check takes several")
    _compress(models[0], options)


def _compress(model: Path, options: dict[str, Any]) -> None:
    """The main job and the dry run; `options` are click's, by the names of the parameters above."""
    printing = {name: options.pop(name) for name in ("report_paths", "as_json", "quiet", "verbose", "no_progress")}
    dry, output, force = options.pop("dry_run"), options.pop("output"), options.pop("force")
    for path in printing["report_paths"]:
        reports.check_path(path)
    options["bits_for"], options["input_shape"] = dict(options["bits_for"]), dict(options["input_shape"])
    if options["input_range"] is not None and len(options["input_range"]) != 2:
        raise OptionError("input-range needs two numbers, LO,HI")
    config = onnx_lwdf.api.configure(**options)
    if dry:
        _show(onnx_lwdf.inspect(model, config), printing)
        return
    target = output or model.with_name(f"{model.stem}.{config.bits_name}.onnx")
    failed: onnx_lwdf.Gate | None = None
    try:
        with _Bar(shown=not (printing["quiet"] or printing["no_progress"])) as bar:
            result = onnx_lwdf.api.compress_with(config, model, target, force=force, on_layer=bar.step)
    except onnx_lwdf.Gate as gate:
        failed, result = gate, gate.result
    _show(result.report, printing)
    if failed is not None:
        raise failed


class _Bar:
    """Progress on stderr, only on a terminal."""

    def __init__(self, shown: bool) -> None:
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        self.progress = Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))
        self.task = self.progress.add_task("synthesize", total=1)

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, step: Step) -> None:
        text = f"{step.stage} {step.name}".strip()
        self.progress.update(self.task, description=text, completed=step.done, total=step.total)


def _show(report: Report, printing: dict[str, Any]) -> None:
    for path in printing["report_paths"]:
        reports.write(report, path)
    for text in report.warnings:
        click.echo(f"warning: {text}", err=True)
    if printing["as_json"]:
        click.echo(report.to_json(), nl=False)
    elif not printing["quiet"]:
        console = Console(soft_wrap=True)
        if not console.is_terminal:
            console = Console(width=UNLIMITED_WIDTH)
        console.print(_table(report))
        click.echo(report.summary())
        if report.output["path"] is not None:
            click.echo(f"wrote {report.output['path']}")


def _table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in NUMERIC_COLUMNS else "left", overflow="fold")
    for row in report.rows():
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    return table


def _check(paths: tuple[Path, ...]) -> None:
    failed = 0
    for path in paths:
        problems = onnx_lwdf.check(path)
        failed += bool(problems)
        for problem in problems:
            click.echo(f"failed {path}: {problem}")
        if not problems:
            click.echo(f"ok {path}")
    if failed:
        raise LwdfError(f"{failed} of {len(paths)} files failed the check; compress them again")


def main() -> None:
    """The console script: every failure is one line on stderr and its exit code."""
    verbose = any(word in ("-v", "--verbose") for word in sys.argv[1:])
    try:
        command(standalone_mode=False)
        sys.stdout.flush()
        code = 0
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("error: interrupted; nothing was written", err=True)
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of stdout went away, for example `| head`
        sys.stderr.close()
        code = 0
    except Exception as error:
        if verbose:
            traceback.print_exc()
        click.echo(f"error: {_line(error)}", err=True)
        code = _exit_code(error)
    sys.exit(code)


def _line(error: Exception) -> str:
    """What, where, what to do, in one line."""
    if isinstance(error, LwdfError):
        text = str(error)
    elif isinstance(error, click.ClickException):
        text = f"{error.format_message()}; see onnx-lwdf --help"
    elif isinstance(error, MemoryError):
        text = "out of memory; use fewer --samples or a smaller --input-shape"
    elif isinstance(error, OSError):
        text = f"{error.filename or 'file'}: {error.strerror or error}"
    else:
        text = f"internal: {type(error).__name__}: {error}; run again with -v and report the traceback"
    return " ".join(text.split())


def _exit_code(error: Exception) -> int:
    if isinstance(error, LwdfError | click.ClickException):
        return error.exit_code
    return 1
