"""The command line: the only place that prints, draws progress or exits."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from onnx_lwdf import api, words
from onnx_lwdf import report as reports
from onnx_lwdf.activations.sources import SOURCES
from onnx_lwdf.compress import Progress as Step
from onnx_lwdf.config import BITS, TARGETS, Config
from onnx_lwdf.emit import FORMATS
from onnx_lwdf.errors import LwdfError, OptionError
from onnx_lwdf.interrupt import INTERRUPTED, noticed
from onnx_lwdf.model_io import TOOL, check_apart, tool_version
from onnx_lwdf.report import COLUMNS, NUMERIC_COLUMNS, Report, printable
from onnx_lwdf.solvers import SOLVERS

UNLIMITED_WIDTH = 10_000  # of a table that is not shown on a terminal: nothing is cut off or folded
FOLDED_COLUMNS = ("layer", "note")  # the first to give way on a narrow terminal
BESIDE_CHECK = ("models", "check", "quiet", "verbose", "no_progress")  # parameters that --check reads or may ignore


class _Command(click.Command):
    """Every failure is one line on stderr and its exit code."""

    def main(self, *args: Any, **extra: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a name that stdout's encoding lacks is no failure
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False}) or 0
        except click.Abort:
            click.echo("interrupted", err=True)
            code = INTERRUPTED
        except Exception as error:
            click.echo(f"error: {_line(error)}", err=True)
            code = error.exit_code if isinstance(error, LwdfError | click.ClickException) else 1
        sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise click.Abort from stop
        except Exception:
            if ctx.params["verbose"]:
                traceback.print_exc()
            raise


def _line(error: Exception) -> str:
    """What, where, what to do, in one line."""
    if isinstance(error, LwdfError):
        text = str(error)
    elif isinstance(error, click.ClickException):
        text = f"{error.format_message().rstrip('.')}; see {TOOL} --help"
    elif isinstance(error, MemoryError):
        text = "out of memory; use fewer --samples, fewer --jobs or a smaller --input-shape"
    elif isinstance(error, OSError):
        text = (f"{error.filename}: " if error.filename else "") + (error.strerror or str(error))
    else:
        text = f"internal: {type(error).__name__}: {error}; run again with -v for the traceback and report it"
    return printable(" ".join(text.split()))


_PATH = click.Path(path_type=Path)
_SOME_BITS = click.IntRange(BITS.start, BITS.stop - 1)


@click.command(TOOL, cls=_Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("models", metavar="MODEL.onnx", nargs=-1, required=True, type=_PATH)
@click.option(
    "-o", "--output", type=_PATH, help="Where to write. [default: beside MODEL, as MODEL.w6a6.onnx at 6 bits]"
)
@click.option(
    "-b",
    "--bits",
    type=words.bits,
    metavar="N|auto",
    help="Bits of weights and activations; auto chooses each weight's, for --max-size or --fail-under. "
    "[default: 8; auto with --max-size; with pruning alone they stay float]",
)
@click.option("--weight-bits", type=_SOME_BITS, metavar="N", help="Bits of weights alone.")
@click.option(
    "--activation-bits",
    type=words.activation_bits,
    metavar="N|float",
    help="Bits of activations alone; float compresses the weights only.",
)
@click.option(
    "--bits-for",
    multiple=True,
    type=words.pattern_bits,
    metavar="PATTERN=N",
    help="Bits of the layers whose name or operator matches a glob, such as '*/head/*=8'; repeatable.",
)
@click.option(
    "--keep-first-last/--no-keep-first-last",
    default=None,
    help="First and last layer stay at 8 bits. [default: on below 8 bits]",
)
@click.option(
    "--channels",
    type=words.share,
    metavar="F",
    default=0.0,
    help="Remove this share of the channels, with all that depends on them; 0.2 is a fifth.",
)
@click.option(
    "--method",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", *SOLVERS]),
    help="How the stored weights are found.",
)
@click.option(
    "--activations-from",
    default="aligned",
    show_default=True,
    metavar="|".join(key for key in SOURCES if key != "data") + "|PATH",
    help="Where layer inputs come from; none: weights alone; a PATH is a folder of images, .npy or .npz.",
)
@click.option(
    "--format", default="auto", show_default=True, type=click.Choice(["auto", *FORMATS]), help="How weights are stored."
)
@click.option(
    "--target",
    default="generic",
    show_default=True,
    type=click.Choice(list(TARGETS)),
    help="The processor whose integer kernels run the file.",
)
@click.option(
    "--vector-size",
    type=int,
    default=16,
    show_default=True,
    help="Below 8 bits so many inputs of a weight share a small integer that their codes are multiplied by; "
    "0: one scale per output channel alone.",
)
@click.option(
    "--sparsity",
    type=words.number,
    metavar="F",
    default=0.0,
    help="Share of all weights that become 0, spent where it costs least.",
)
@click.option("--nm", type=words.n_of_m, metavar="N:M", help="Prune to N of every M input channels, such as 2:4.")
@click.option(
    "--sparsity-for",
    multiple=True,
    type=words.pattern_share,
    metavar="PATTERN=F",
    help="Share of the layers whose name or operator matches a glob; repeatable.",
)
@click.option(
    "--recalibrate/--no-recalibrate",
    default=True,
    show_default=True,
    help="Give every channel the mean and deviation back that it has in the float network.",
)
@click.option("-x", "--exclude", multiple=True, metavar="PATTERN", help="Leave these layers alone; repeatable.")
@click.option(
    "--input-shape",
    multiple=True,
    type=words.name_shape,
    metavar="NAME:DIMS",
    help="Where the model leaves it open, such as x:1,3,224,224; repeatable.",
)
@click.option("--input-range", type=words.low_high, metavar="LO,HI", help="Values of the darkest and brightest pixel.")
@click.option("--input-mean", type=words.numbers, metavar="NUMBERS", help="Per channel, of pixels on the 0..255 scale.")
@click.option("--input-std", type=words.numbers, metavar="NUMBERS", help="Per channel, of pixels on the 0..255 scale.")
@click.option(
    "--fail-under", type=words.number, metavar="DB", help="Exit 3 where an output's SQNR is below; still written."
)
@click.option(
    "--max-size",
    type=words.size,
    metavar="SIZE",
    help="Of the file, such as 25% of MODEL's or 2MB. Exit 3 where it is larger; still written.",
)
@click.option(
    "--report",
    "report_paths",
    multiple=True,
    type=_PATH,
    help=f"Write the report too, in the format of the suffix: {', '.join(reports.WRITERS)}; repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout, nothing else.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), metavar="N", help="Layers in parallel. [default: all cores]")
@click.option(
    "--samples", type=click.IntRange(min=1), metavar="N", default=128, show_default=True, help="Synthetic inputs."
)
@click.option(
    "--seed", type=click.IntRange(min=0), metavar="N", default=0, show_default=True, help="Of the synthetic inputs."
)
@click.option("-n", "--dry-run", is_flag=True, help="Only list what would be done to each layer.")
@click.option("--check", is_flag=True, help="Verify files that this tool wrote, any number of them.")
@click.option("--save-as-external-data", is_flag=True, help="Weights in a file of their own.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("-q", "--quiet", is_flag=True, help="No table, summary or progress; with --check, failures only.")
@click.option("-v", "--verbose", is_flag=True, help="A traceback before an error's line.")
@click.option("--no-progress", is_flag=True, help="No progress bar. Without a terminal there is none.")
@click.version_option(tool_version(), "-V", "--version", prog_name=TOOL, message="%(prog)s %(version)s")
@click.pass_context
def command(ctx: click.Context, /, models: tuple[Path, ...], check: bool, **options: Any) -> None:
    """Compress a trained CNN, without data: smaller, faster, with the same answers."""
    if check:
        _refuse_beside_check(ctx)
        _check(models, quiet=options["quiet"])
        return
    if len(models) != 1:
        raise OptionError(f"{len(models)} models were given; give one, only --check takes several")
    with noticed() as interrupts:
        _compress(models[0], options, interrupts)


@dataclass(frozen=True, slots=True)
class _Showing:
    """What of the report goes where."""

    report_paths: Sequence[Path]
    as_json: bool
    quiet: bool
    progress: bool

    def show(self, report: Report) -> None:
        for text in report.warnings:
            click.echo(f"warning: {printable(text)}", err=True)
        if self.as_json:
            _print(report.to_json())
        elif not self.quiet:
            _print(f"{_table(report)}{report.summary()}\n{_tradeoff(report)}")
        for path in self.report_paths:
            reports.write(report, path)


def _compress(model: Path, options: dict[str, Any], interrupts: Callable[[], None]) -> None:
    """The main job and the dry run; what is left of `options` after ours are the words of `api.configure`.

    `interrupts` raises one that was lost.
    """
    no_progress, _ = options.pop("no_progress"), options.pop("verbose")
    paths, as_json, quiet = (options.pop(name) for name in ("report_paths", "as_json", "quiet"))
    dry_run, output, force = (options.pop(name) for name in ("dry_run", "output", "force"))
    showing = _Showing(paths, as_json, quiet, progress=not (quiet or no_progress))
    for path in paths:  # before the work, not after it
        reports.check_path(path)
        check_apart(path, model, "report")
    if len({path.resolve() for path in (*paths, *filter(None, [output]))}) < len(paths) + bool(output):
        raise OptionError("output and reports must be different files; one is named twice")
    config = api.configure(
        **options | {name: dict(options[name]) for name in ("bits_for", "sparsity_for", "input_shape")}
    )
    if dry_run:
        showing.show(api.inspect(model, config))
        return

    def beside(done: Config) -> Path:
        return model.parent / f"{model.stem}.{done.bits_name}.onnx"

    try:
        with _Bar(showing.progress) as bar:

            def step(step: Step) -> None:
                interrupts()
                bar.step(step)

            result = api.compress_with(config, model, output or beside, force=force, on_layer=step)
    except api.Gate as gate:
        showing.show(gate.result.report)
        raise
    showing.show(result.report)


class _Bar:
    """Progress on stderr, only on a terminal."""

    def __init__(self, wanted: bool) -> None:
        console = Console(stderr=True)
        shown = wanted and sys.stderr.isatty() and not console.is_dumb_terminal
        columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
        self._progress = Progress(*columns, console=console, transient=True, disable=not shown)
        self._task = self._progress.add_task("read", total=1)

    def __enter__(self) -> _Bar:
        if not self._progress.disable:  # before rich 14.3 a disabled one prints an empty line when it stops
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._progress.disable:
            self._progress.stop()

    def step(self, step: Step) -> None:
        text = printable(f"{step.stage} {step.name}".strip())
        self._progress.update(self._task, description=text, completed=step.done, total=step.total)


def _table(report: Report) -> str:
    """The layers in columns that fit the terminal; in lines as long as they are where stdout is none."""
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        justify: JustifyMethod = "right" if name in NUMERIC_COLUMNS else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name not in FOLDED_COLUMNS)
    for row in report.rows():
        table.add_row(*map(Text, row))
    console = Console() if sys.stdout.isatty() else Console(width=UNLIMITED_WIDTH, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _tradeoff(report: Report) -> str:
    """Sizes and what they are predicted to reach, a line each."""
    lines = [f"{size:>16} {decibels:>12} {mark}".rstrip() for size, decibels, mark in report.tradeoff_rows()]
    return "\n".join([f"{'bytes':>16} {'predicted dB':>12}", *lines, ""]) if lines else ""


def _refuse_beside_check(ctx: click.Context) -> None:
    for parameter in ctx.command.params:
        name = parameter.name or ""
        given = ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in BESIDE_CHECK:
            raise OptionError(f"{max(parameter.opts, key=len)} does not go with --check; leave one of them out")


def _check(paths: Sequence[Path], quiet: bool) -> None:
    failed = 0
    for path in paths:
        problems = _problems(path)
        failed += bool(problems)
        if problems or not quiet:
            _print(printable(f"failed {path}: {'; '.join(problems)}" if problems else f"ok {path}") + "\n")
    if failed:
        raise LwdfError(f"{failed} of {len(paths)} files failed the check; compress their originals again")


def _problems(path: Path) -> tuple[str, ...]:
    try:
        return api.check(path)
    except LwdfError as error:
        return (str(error).removeprefix(f"{path}: "),)


def _print(text: str) -> None:
    """To stdout, at once. Where its reader went away, for example `| head`, the work goes on without it."""
    try:
        click.echo(text, nl=False)
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # else Python flushes again at exit, and complains
        if not isinstance(error, BrokenPipeError):
            raise


def main() -> None:
    """The console script."""
    command()
