"""The five steps: read, precondition, synthesize, solve, emit and verify."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from threadpoolctl import threadpool_limits

from onnx_lwdf.activations.isotropic import isotropic
from onnx_lwdf.activations.sampler import draw_chunks, synthesize
from onnx_lwdf.activations.sources import SOURCES
from onnx_lwdf.activations.taps import Feed, Samples
from onnx_lwdf.axis import give_axis, take_axis, with_axis
from onnx_lwdf.batch import fix_batch
from onnx_lwdf.calibration import calibrate
from onnx_lwdf.channels.prune import Pruned, prune_channels
from onnx_lwdf.channels.spread import pooled_sources
from onnx_lwdf.channels.surgery import Mask
from onnx_lwdf.config import TARGETS, Config
from onnx_lwdf.emit import FORMATS, emit
from onnx_lwdf.emit.rebuilt import rebuilt
from onnx_lwdf.emit.stored import Rounded, Runs, Stored
from onnx_lwdf.errors import ModelError
from onnx_lwdf.gates import Span
from onnx_lwdf.gradients import Sensitivities, sensitivities
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, Layer, committed, from_canonical, output_axis, run_shape, shape_of
from onnx_lwdf.layerwise import Solved, pair_limits, solve_layers
from onnx_lwdf.mapped import Scratch
from onnx_lwdf.model_io import Source, add_provenance
from onnx_lwdf.precision import halve, restore
from onnx_lwdf.precondition.bounds import pixel_ranges
from onnx_lwdf.precondition.channels import ChannelGroup, find_groups
from onnx_lwdf.precondition.copies import copy_channels
from onnx_lwdf.precondition.equalization import transform_groups
from onnx_lwdf.precondition.norms import mean_shifts, take_up
from onnx_lwdf.precondition.order import order_channels
from onnx_lwdf.precondition.readers import beside_gates
from onnx_lwdf.preparation import Prepared, prepare
from onnx_lwdf.pruning import plan_pruning, share_budget
from onnx_lwdf.ranges import F64, ActivationGrid
from onnx_lwdf.recalibration import recalibrate
from onnx_lwdf.runtime import open_session, trim
from onnx_lwdf.sharing import codes_of
from onnx_lwdf.sites import Site, find_sites
from onnx_lwdf.statistics import Statistics
from onnx_lwdf.tradeoff import Point, Sizes, choose_bits, expected
from onnx_lwdf.verify import Fidelity, verify

VERIFIED_SAMPLES = 8
RUN_TWICE = ("aligned", "data")  # sources whose inputs go through both networks; others draw anew, or nothing


@dataclass(frozen=True, slots=True)
class Progress:
    """One step done: `stage` is a word such as "solve", `name` the layer, or empty."""

    stage: str
    name: str
    done: int
    total: int


OnLayer = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Compressed:
    """What the five steps made."""

    model: onnx.ModelProto
    prepared: Prepared
    solved: Sequence[Solved]
    before: Mapping[str, int]  # layer name -> values of its weight in the source
    shapes: Mapping[str, tuple[int, ...]]  # layer name -> of its weight as the model stores it
    notes: Mapping[str, str]  # layer name -> what happened to its channels
    sizes: Mapping[str, int]  # layer name -> bytes of data that hold its weight
    fidelity: Fidelity
    tradeoff: tuple[Point, ...]  # of size and predicted fidelity, where bits were chosen


def compress_model(source: Source, config: Config, on_layer: OnLayer, scratch: Scratch | None = None) -> Compressed:
    """The five steps on a model that was read; the source is not changed. `scratch`: for weights too large for memory.

    A layer that puts out more error than signal, from inputs that are sound, stays float where the outputs gain by it.
    Raises ModelError where an output has more error than signal all the same. With `fail_under` the user says how much
    may be lost: less than 0 dB, too.
    """
    least = min(0.0, config.fail_under or 0.0)
    model, bare = give_axis(source.model)
    source, config = replace(source, model=model), with_axis(config, model, bare)
    # With more threads BLAS sums in another order, and the bytes would depend on the number of cores. What is large runs in
    # onnxruntime, whose sums do not, or in workers.
    with threadpool_limits(limits=1):
        done = _compress(source, config, on_layer, scratch, {})
        if harmed := done.fidelity.harmed(done.prepared.sources, least):
            left = done.fidelity.layers
            spared = {name: f"stays float: at its output {left[name]:.1f} dB were left" for name in harmed}
            other = _compress(source, config, on_layer, scratch, spared)
            done = other if other.fidelity.worst >= done.fidelity.worst else done
    if bare:
        graph = Graph(done.model, scratch)
        take_axis(graph, bare)
        done = replace(done, model=graph.model)
    if config.fail_under is None and (lost := done.fidelity.lost(done.prepared.behind)):
        name, decibels = min(lost.items(), key=lambda pair: pair[1])
        raise ModelError(
            f"output {name!r} would have more error than signal on synthetic inputs ({decibels:.1f} dB); nothing was written; "
            "use more bits, fewer zeros or more channels, or say with --fail-under how much may be lost"
        )
    return done


def _compress(
    source: Source, config: Config, on_layer: OnLayer, scratch: Scratch | None, spared: Mapping[str, str]
) -> Compressed:
    prepared = prepare(source.model, config, scratch, spared)
    trim()
    graph, config = prepared.graph, prepared.config
    before = {layer.name: math.prod(shape_of(graph, layer)) for layer in prepared.layers}
    whole = graph.snapshot() if config.weight_bits is None else None  # channels may go: a copy before they do
    chunks = draw_chunks(prepared.inputs, config)

    work = _solve(source, prepared, chunks, config, on_layer)
    reference = graph.snapshot() if whole is None else whole
    solved = work.solved
    if config.recalibrate and config.source in RUN_TWICE:
        known = {} if config.source == "data" else work.statistics  # data are what channels shall have, as they are
        solved = recalibrate(graph, solved, known, chunks, work.codes)
        on_layer(Progress("recalibrate", "", 1, 1))

    take_up(graph, work.shifts)
    outputs = {layer.name: layer.output for layer in work.layers}  # by the names that they have in the float model
    stored = [_stored(graph, answer, work.codes) for answer in solved]
    signed = TARGETS[config.target].signed_activations
    sizes = emit(graph, FORMATS[config.stored_format].store, stored, work.sites, work.grids, signed)
    graph.commit()
    if prepared.fixed is not None:
        fix_batch(graph, prepared.fixed)
    if source.precision.value_bytes < 4:
        halve(graph)

    kept = work.kept if config.weight_bits is None else {}
    fidelity = Fidelity({}, {})
    if prepared.unseen is None:
        fidelity = verify(source.model, reference, rebuilt(graph), outputs, _verification(prepared, config), kept)
        on_layer(Progress("verify", "", 1, 1))
    if source.precision.interface:
        restore(graph, source.precision.interface)
        if prepared.unseen is None:
            open_session(graph.model)
    shapes = {item.layer.name: item.shape for item in stored}
    return Compressed(graph.model, work.prepared, solved, before, shapes, work.notes, sizes, fidelity, work.tradeoff)


@dataclass(frozen=True, slots=True)
class _Work:
    """What the solvers found, and the float graph's state that it belongs to."""

    prepared: Prepared
    layers: Sequence[Layer]
    statistics: Statistics
    sites: Sequence[Site]
    grids: Mapping[str, ActivationGrid]
    shifts: Mapping[str, F64]  # output of a normalization -> what the grids in front of it add in the mean
    solved: Sequence[Solved]
    codes: Mapping[str, str]  # layer name -> the layer whose codes or floats it has
    kept: Mapping[str, Mask]  # tensor -> which of its channels remain
    notes: Mapping[str, str]
    tradeoff: tuple[Point, ...]


def _solve(source: Source, prepared: Prepared, chunks: Sequence[Feed], config: Config, on_layer: OnLayer) -> _Work:
    """Synthesize, precondition by what the samples say, and solve. The samples, the largest data of all, end here."""
    graph, layers = prepared.graph, prepared.layers
    if config.source == "none":
        codes = codes_of(graph, layers, prepared.plan, prepared.pruning)
        solved = _answers(prepared, prepared.plan, {}, isotropic(graph, layers), config, codes, on_layer)
        return _Work(prepared, layers, {}, [], {}, {}, solved, codes, {}, {}, ())
    sites, groups = find_sites(graph, layers, prepared.plan), find_groups(graph, layers)
    tensors = [
        *(layer.input for layer in layers),
        *(site.tensors[0] for site in sites),
        *(layer.output for group in groups if group.linear for layer in group.producers),
        *(pooled_sources(graph, layers).values() if config.channels else ()),
    ]
    samples = synthesize(graph, layers, tensors, prepared.statistics, chunks, config)
    on_layer(Progress("synthesize", "", 1, 1))

    pruned = Pruned(layers, samples, prepared.statistics, {}, {})
    if config.channels:
        pruned = prune_channels(graph, layers, samples, prepared.statistics, chunks[0], config.channels, config.jobs)
        layers, samples = pruned.layers, pruned.samples
        groups = find_groups(graph, layers)
        prepared = replace(prepared, pruning=plan_pruning(graph, layers, prepared.skipped, config))  # widths changed
        on_layer(Progress("channels", "", 1, 1))
    plan, most = prepared.plan, config.most_bytes(source.size_bytes)
    if config.auto_bits:
        codes = codes_of(graph, layers, plan, prepared.pruning)
        plan = expected(plan, _sizes(source, graph, layers, sites, codes, config), most)
    statistics = pruned.statistics
    pixels = pixel_ranges(graph, prepared.inputs)
    gradients = _gradients(graph, layers, groups, samples, statistics, chunks, config)
    on_layer(Progress("gradients", "", 1, 1))
    samples, statistics, gradients = transform_groups(graph, groups, plan, samples, statistics, gradients, pixels)
    spans: Mapping[str, Span] = {}
    if any(group.written or group.read for group in groups):  # there may be new nodes
        layers = committed(graph, layers)
        spans = beside_gates(graph, find_groups(graph, layers), samples, statistics).spans
    on_layer(Progress("precondition", "", 1, 1))

    pruning = share_budget(graph, layers, prepared.pruning, samples, chunks[0], config)
    known = calibrate(graph, layers, plan, sites, samples, prepared.inputs, chunks, config, spans, gradients)
    grids = known.grids
    read = {spec.pixels: "reads pixels of 0 to 255" for spec in prepared.inputs}
    read |= {spec.parts: "reads its input in two parts of 8 bits" for spec in prepared.inputs}
    notes = [{layer.name: read[layer.input] for layer in layers if layer.input in read}, pruned.notes]
    if not any(one.asked for one in pruning.values()):
        groups = find_groups(graph, layers)
        copied = copy_channels(graph, layers, groups, grids, samples, statistics, gradients, chunks[0], known.noises)
        layers, samples, statistics = copied.layers, copied.samples, copied.statistics
        notes.append(copied.notes)
        limits = pair_limits(graph, layers, plan, grids, config)
        layers, samples, statistics = order_channels(graph, layers, limits, samples, statistics, chunks[0])
    tradeoff: tuple[Point, ...] = ()
    prepared = replace(prepared, layers=layers, pruning=pruning)
    codes = codes_of(graph, layers, plan, pruning)
    notes.append({name: f"has the weights of {first}" for name, first in codes.items()})
    if config.auto_bits:
        sizes = _sizes(source, graph, layers, sites, codes, config)
        plan, tradeoff = choose_bits(graph, layers, plan, pruning, grids, samples, chunks[0], sizes, config, most)
        on_layer(Progress("bits", "", 1, 1))
    solved = _answers(prepared, plan, grids, samples, config, codes, on_layer)
    shifts = mean_shifts(graph, grids, samples)
    return _Work(
        prepared, layers, statistics, sites, grids, shifts, solved, codes, pruned.kept, _joined(notes), tradeoff
    )


def _joined(notes: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """All that is noted of each layer."""
    found: dict[str, list[str]] = {}
    for part in notes:
        for name, note in part.items():
            found.setdefault(name, []).append(note)
    return {name: "; ".join(parts) for name, parts in found.items()}


def _gradients(
    graph: Graph,
    layers: Sequence[Layer],
    groups: Sequence[ChannelGroup],
    samples: Samples,
    statistics: Statistics,
    chunks: Sequence[Feed],
    config: Config,
) -> Sensitivities:
    """Nothing where activations stay float."""
    if config.activation_bits is None:
        return {}
    rng = np.random.default_rng([config.seed, 3])
    rows = {name for layer in layers if layer.window is None for name in (layer.input, layer.output)}
    rows -= {layer.input for layer in layers if layer.window}
    tensors = [*samples.values, *(layer.output for layer in layers)]
    mixed = {name for group in groups if group.mixed for name in group.tensors}
    found = sensitivities(graph.snapshot(), tensors, mixed, rows, chunks, rng, statistics, SOURCES[config.source])
    return {name: graph.keep(value) for name, value in found.items()}


def _answers(
    prepared: Prepared,
    plan: Mapping[str, Bits],
    grids: Mapping[str, ActivationGrid],
    samples: Samples,
    config: Config,
    codes: Mapping[str, str],
    on_layer: OnLayer,
) -> list[Solved]:
    solved: list[Solved] = []
    graph, layers, pruning = prepared.graph, prepared.layers, prepared.pruning
    for answer in solve_layers(graph, layers, plan, pruning, grids, samples, config, codes):
        solved.append(answer)
        on_layer(Progress("solve", answer.layer.name, len(solved), len(layers)))
    place = {layer.name: number for number, layer in enumerate(layers)}
    return sorted(solved, key=lambda answer: place[answer.layer.name])


def _sizes(
    source: Source,
    graph: Graph,
    layers: Sequence[Layer],
    sites: Sequence[Site],
    codes: Mapping[str, str],
    config: Config,
) -> Sizes:
    noted = onnx.ModelProto()
    add_provenance(noted, source, config.to_dict())
    signed = TARGETS[config.target].signed_activations
    return Sizes(graph, layers, sites, config.stored_format, config.activations, signed, noted.ByteSize(), codes)


def _stored(graph: Graph, answer: Solved, shared: Mapping[str, str]) -> Stored:
    """The solution laid out as the model stores weights. `shared`: layer name -> the layer whose codes or floats it has."""
    layer, solution = answer.layer, answer.solution
    weight = graph.constant(layer.weight)
    assert weight is not None, layer.name
    values, rounded = None, None
    if solution.rounding is None or answer.bits.weight is None:
        values = graph.keep(from_canonical(layer, solution.weight, weight.shape).astype(np.float32))
    else:
        codes = graph.keep(from_canonical(layer, solution.rounding.codes, weight.shape))
        scale = solution.rounding.scale.astype(np.float32).ravel()
        axis, runs, size = output_axis(layer), None, answer.bits.vector_size
        if (multiplier := solution.rounding.multiplier) is not None:
            runs = Runs(from_canonical(layer, multiplier, run_shape(layer, weight.shape, size)), 1 - axis, size)
        rounded = Rounded(codes, scale, axis, answer.bits.weight, runs)
    return Stored(layer, values, rounded, answer.stored_bias, answer.grid, shared.get(layer.name, ""))


def _verification(prepared: Prepared, config: Config) -> list[Feed]:
    rng = np.random.default_rng([config.seed, 2])
    count = 1 if prepared.fixed is None else prepared.fixed.size
    return [{spec.name: spec.draw(count, rng) for spec in prepared.inputs} for _ in range(VERIFIED_SAMPLES)]
