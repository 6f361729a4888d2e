"""The public functions: the command line's words as arguments."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_lwdf import model_io
from onnx_lwdf.axis import give_axis, with_axis
from onnx_lwdf.compress import Compressed, OnLayer, Progress, compress_model
from onnx_lwdf.config import Config
from onnx_lwdf.emit import planned_bytes, sparse_initializer
from onnx_lwdf.errors import GateError, ModelError, OptionError
from onnx_lwdf.layers import Layer, Skipped
from onnx_lwdf.layerwise import Solved, method_of
from onnx_lwdf.preparation import Prepared, possible, prepare
from onnx_lwdf.report import LayerReport, Report
from onnx_lwdf.tradeoff import Point

AUTO, FLOAT = "auto", "float"
DEFAULT_BITS = 8


@dataclass(frozen=True, slots=True)
class Result:
    """The compressed model and what happened to it."""

    model: onnx.ModelProto  # of a source above 2 GiB as it was written, its weights in the file's external data
    report: Report


class Gate(GateError):
    """A gate failed; `result` holds what was written all the same."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result


def compress(
    model: str | Path | onnx.ModelProto,
    output: str | Path | None = None,
    *,
    bits: int | str | None = None,
    weight_bits: int | None = None,
    activation_bits: int | str | None = None,
    bits_for: Mapping[str, int] | None = None,
    keep_first_last: bool | None = None,
    method: str = "auto",
    activations_from: str | Path = "aligned",
    format: str = "auto",
    target: str = "generic",
    vector_size: int = 16,
    sparsity: float = 0.0,
    nm: tuple[int, int] | None = None,
    sparsity_for: Mapping[str, float] | None = None,
    channels: float = 0.0,
    recalibrate: bool = True,
    exclude: Sequence[str] = (),
    input_shape: Mapping[str, Sequence[int]] | None = None,
    input_range: tuple[float, float] | None = None,
    input_mean: Sequence[float] | None = None,
    input_std: Sequence[float] | None = None,
    fail_under: float | None = None,
    max_size: float | None = None,
    jobs: int | None = None,
    samples: int = 128,
    seed: int = 0,
    save_as_external_data: bool = False,
    force: bool = False,
    on_layer: OnLayer = lambda progress: None,
) -> Result:
    """Compress a model, and write it where `output` is given. The words are those of the command line.

    `bits` stands for `weight_bits` and `activation_bits` where they are not given, and is 8 where nothing else is asked
    for; `activation_bits="float"` compresses the weights alone. `bits="auto"` gives each weight 2 to 8 bits, so that the
    file has at most `max_size` (bytes, or a share of the source's size where it is at most 1) at the least predicted
    error, or without it is the smallest that is predicted to hold `fail_under`; `max_size` alone means it.
    `sparsity` (a share of all weights), `nm` (N of every M input channels stay) and `sparsity_for` (a layer's own share)
    zero weights, `channels` (a share of all channels) removes them; without any bits these round nothing. `recalibrate`
    gives the channels of every convolution the means and deviations back that they have in the float network.
    `on_layer` is called after each step with a `Progress`.

    Raises ModelError where the model cannot be read, compressed or written, OptionError where an option is wrong, and
    Gate (with the result; the file is written) where `fail_under` dB are not reached at an output, or the file is larger
    than `max_size`.
    """
    config = configure(
        bits=bits,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        bits_for=bits_for or {},
        keep_first_last=keep_first_last,
        method=method,
        activations_from=activations_from,
        format=format,
        target=target,
        vector_size=vector_size,
        sparsity=sparsity,
        nm=nm,
        sparsity_for=sparsity_for or {},
        channels=channels,
        recalibrate=recalibrate,
        exclude=exclude,
        input_shape=input_shape or {},
        input_range=input_range,
        input_mean=input_mean,
        input_std=input_std,
        fail_under=fail_under,
        max_size=max_size,
        jobs=jobs,
        samples=samples,
        seed=seed,
        save_as_external_data=save_as_external_data,
    )
    return compress_with(config, model, output, force=force, on_layer=on_layer)


def configure(
    *,
    bits: int | str | None,
    weight_bits: int | None,
    activation_bits: int | str | None,
    bits_for: Mapping[str, int],
    keep_first_last: bool | None,
    method: str,
    activations_from: str | Path,
    format: str,
    target: str,
    vector_size: int,
    sparsity: float,
    nm: tuple[int, int] | None,
    sparsity_for: Mapping[str, float],
    channels: float,
    recalibrate: bool,
    exclude: Sequence[str],
    input_shape: Mapping[str, Sequence[int]],
    input_range: Sequence[float] | None,
    input_mean: Sequence[float] | None,
    input_std: Sequence[float] | None,
    fail_under: float | None,
    max_size: float | None,
    jobs: int | None,
    samples: int,
    seed: int,
    save_as_external_data: bool,
) -> Config:
    """The words of `compress` as a validated Config."""
    shares = sparsity_for.values() if isinstance(sparsity_for, Mapping) else ()
    prunes = bool(sparsity or nm or channels or any(shares))
    auto = bits == AUTO or (bits is None and weight_bits is None and max_size is not None and not prunes)
    if bits == AUTO and weight_bits is not None:
        raise OptionError("bits auto chooses the bits of the weights; leave weight-bits out")
    if auto or (bits is None and not (prunes and weight_bits is None and activation_bits in (None, FLOAT))):
        bits = DEFAULT_BITS
    if isinstance(bits, str):
        raise OptionError(f"bits is {bits!r}; it must be a number or {AUTO!r}")
    return Config(
        weight_bits=bits if weight_bits is None else weight_bits,
        activation_bits=_activation_bits(bits, activation_bits),
        auto_bits=auto,
        bits_for=bits_for,
        keep_first_last=keep_first_last,
        method=method,
        activations_from=str(activations_from),
        format=format,
        target=target,
        vector_size=vector_size,
        sparsity=sparsity,
        nm=nm,
        sparsity_for=sparsity_for,
        channels=channels,
        recalibrate=recalibrate,
        exclude=exclude,
        input_shape=input_shape,
        input_range=input_range,
        input_mean=input_mean,
        input_std=input_std,
        fail_under=fail_under,
        max_size=max_size,
        jobs=jobs,
        samples=samples,
        seed=seed,
        save_as_external_data=save_as_external_data,
    )


def compress_with(
    config: Config,
    model: str | Path | onnx.ModelProto,
    output: str | Path | Callable[[Config], Path] | None,
    *,
    force: bool,
    on_layer: OnLayer,
) -> Result:
    """`compress` for who has a Config. `output` may be a name that depends on what of it can be done with the model."""

    def checked(target: str | Path | None) -> Path | None:
        if target is not None:
            model_io.check_target(Path(target), None if isinstance(model, onnx.ModelProto) else Path(model), force)
        return None if target is None else Path(target)

    path = None if callable(output) else checked(output)  # before a large model is read
    source = model_io.read(model)
    if callable(output):
        path = checked(output(possible(source.model, config)[0]))
    if source.mapped and config.auto_bits:  # each size that is tried would be a file's worth of codes on the disk
        raise ModelError(f"{source.path}: is too large for bits to be chosen by size; give --bits, without --max-size")
    with model_io.scratch(source, path) as scratch:
        done = compress_model(source, config, on_layer, scratch)
        model_io.add_provenance(done.model, source, config.to_dict())
        external = config.save_as_external_data or source.external
        if path is not None:
            on_layer(Progress("write", "", 0, 1))
        size = done.model.ByteSize() if path is None else model_io.write(done.model, path, external)
        report = _report(source, config, done, {"path": path and str(path), "bytes": size})
    written = done.model if scratch is None or path is None else onnx.load(path, load_external_data=False)
    result = Result(written, report)
    _check_gates(result, config)
    if done.prepared.unseen is not None and config.fail_under is not None:
        raise Gate(
            f"nothing could be verified, so nothing tells whether --fail-under {config.fail_under:g} holds", result
        )
    return result


def inspect(model: str | Path | onnx.ModelProto, config: Config | None = None) -> Report:
    """The dry run: what would be compressed, and why the rest would not; nothing is solved or written."""
    config = config or Config()
    source = model_io.read(model)
    with model_io.scratch(source, Path(tempfile.gettempdir()) / model_io.TOOL) as scratch:
        model, bare = give_axis(source.model)
        prepared = prepare(model, with_axis(config, model, bare), scratch)
        layers = [_planned(prepared, layer, prepared.config, source.precision.value_bytes) for layer in prepared.layers]
    return _assemble(source, config, prepared, layers, {}, {"path": None, "bytes": None}, prepared.warnings)


def check(path: str | Path) -> tuple[str, ...]:
    """Problems of a file that this tool wrote; empty where it is sound.

    The file must be valid ONNX with our provenance, and every scale in it positive and finite. Nothing is run. The full
    check of onnx, which infers shapes, is for files without sparse initializers: it knows no layer that reads one; nor is
    it for inputs and outputs of unknown rank.
    """
    model = model_io.load(Path(path))
    if not model_io.provenance(model):
        return ("was not written by onnx-lwdf: it has no provenance",)
    problems = []
    try:
        checked = model_io.with_shapes(model)
        onnx.checker.check_model(checked, full_check=checked is model and not model.graph.sparse_initializer)
    except Exception as error:  # ValidationError, InferenceError and others
        if model_io.WITHDRAWN not in str(error):
            problems.append(f"is not valid: {str(error).strip().splitlines()[0]}")
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".scale"):
            scale = numpy_helper.to_array(tensor)
            if not (np.isfinite(scale).all() and (scale > 0).all()):
                problems.append(f"scale {tensor.name!r} is not positive and finite")
    return tuple(problems)


def _activation_bits(bits: int | None, given: int | str | None) -> int | None:
    if given is None:
        return bits
    if not isinstance(given, str):
        return given
    if given == FLOAT:
        return None
    raise OptionError(f"activation-bits is {given!r}; it must be a number or {FLOAT!r}")


def _check_gates(result: Result, config: Config) -> None:
    report, least = result.report, config.fail_under
    reached, size, most = report.output_db, report.output["bytes"], config.most_bytes(report.input["bytes"])
    if least is not None and reached is not None and not reached >= least:
        raise Gate(f"an output has {reached:.2f} dB, below --fail-under {least:g}; use more bits or --bits-for", result)
    if most is not None and size > most:
        cure = f"use fewer bits or --bits {AUTO}"
        if config.auto_bits:
            cure = f"{report.tradeoff[0].bytes:,} is the smallest that bits reach in format {config.stored_format}"
        raise Gate(f"the file has {size:,} bytes, above --max-size {most:,}; {cure}", result)


def _report(source: model_io.Source, config: Config, done: Compressed, output: Mapping[str, object]) -> Report:
    layers = [_solved(done, answer, source.precision.value_bytes) for answer in done.solved]
    weak = [
        f"output {name!r} has more error than signal on synthetic inputs ({db:.1f} dB); try it on real ones before you ship it"
        for name, db in done.fidelity.outputs.items()
        if db < 0
    ]
    warnings = *done.prepared.warnings, *sparse_initializer.warnings(done.model), *weak
    return _assemble(source, config, done.prepared, layers, done.fidelity.outputs, output, warnings, done.tradeoff)


def _assemble(
    source: model_io.Source,
    config: Config,
    prepared: Prepared,
    layers: Sequence[LayerReport],
    outputs: Mapping[str, float],
    output: Mapping[str, object],
    warnings: tuple[str, ...],
    tradeoff: tuple[Point, ...] = (),
) -> Report:
    value_bytes = source.precision.value_bytes
    kept = [_kept(skipped, value_bytes) for skipped in prepared.skipped]
    return Report(
        tool={"name": model_io.TOOL, "version": model_io.tool_version()},
        input={"path": source.path and str(source.path), "sha256": source.sha256, "bytes": source.size_bytes},
        output=output,
        options=config.to_dict(),
        layers=(*layers, *kept),
        outputs=outputs,
        warnings=(*filter(None, [source.precision.note]), *warnings),
        tradeoff=tradeoff,
    )


def _kept(skipped: Skipped, value_bytes: int) -> LayerReport:
    size = value_bytes * int(np.prod(skipped.shape)) if skipped.shape else 0
    return LayerReport(
        name=skipped.name,
        op=skipped.op,
        shape=skipped.shape,
        status="kept",
        reason=skipped.reason,
        statistics="",
        method="",
        weight_bits=None,
        activation_bits=None,
        sparsity=0.0,
        sqnr_db=None,
        bytes_before=size,
        bytes_after=size,
    )


def _planned(prepared: Prepared, layer: Layer, config: Config, value_bytes: int) -> LayerReport:
    weight = prepared.graph.constant(layer.weight)
    assert weight is not None, layer.name
    bits, pruning = prepared.plan[layer.name], prepared.pruning[layer.name]
    return LayerReport(
        name=layer.name,
        op=layer.op,
        shape=weight.shape,
        status="compressed",
        reason="; ".join(filter(None, (pruning.note, "or fewer bits, by what they cost" if bits.free else ""))),
        statistics=prepared.origins[layer.name],
        method=method_of(config, bits, pruning.asked),
        weight_bits=bits.weight,
        activation_bits=bits.activation,
        sparsity=pruning.share,
        sqnr_db=None,
        bytes_before=value_bytes * weight.size,
        bytes_after=planned_bytes(config.stored_format, config.activations, layer, weight.shape, bits),
    )


def _notes(done: Compressed, answer: Solved) -> tuple[str, ...]:
    """What is worth saying of the layer, some of it empty."""
    name = answer.layer.name
    return (done.notes.get(name, ""), done.prepared.pruning[name].note, *answer.solution.notes)


def _solved(done: Compressed, answer: Solved, value_bytes: int) -> LayerReport:
    return LayerReport(
        name=answer.layer.name,
        op=answer.layer.op,
        shape=done.shapes[answer.layer.name],
        status="compressed",
        reason="; ".join(filter(None, _notes(done, answer))),
        statistics=done.prepared.origins[answer.layer.name],
        method=answer.method,
        weight_bits=answer.bits.weight,
        activation_bits=answer.bits.activation,
        sparsity=answer.solution.sparsity,
        sqnr_db=done.fidelity.layers.get(answer.layer.name),
        bytes_before=value_bytes * done.before[answer.layer.name],
        bytes_after=done.sizes[answer.layer.name],
    )
