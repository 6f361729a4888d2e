"""Reading: a model becomes a float graph with BatchNormalization folded, its layers, and a plan for each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from types import MappingProxyType

import onnx

from onnx_lwdf.activations.inputs import InputSpec, find_inputs, read_inputs, unfeedable
from onnx_lwdf.activations.recovered import recover
from onnx_lwdf.activations.sampler import draw_chunks
from onnx_lwdf.activations.taps import CHUNK
from onnx_lwdf.batch import FixedBatch, free_batch
from onnx_lwdf.config import Config
from onnx_lwdf.emit import oldest_opset, operators
from onnx_lwdf.errors import ModelError
from onnx_lwdf.graph import Graph, node_name, operator
from onnx_lwdf.layers import WEIGHTED, Bits, Layer, Pruning, Skipped, find_layers, shape_of, sources
from onnx_lwdf.mapped import Scratch
from onnx_lwdf.model_io import fix_initializers, inline_functions, raise_opset
from onnx_lwdf.plan import plan_bits
from onnx_lwdf.precondition.fold import fold
from onnx_lwdf.precondition.pixels import read_pixels
from onnx_lwdf.precondition.residual import split_inputs
from onnx_lwdf.pruning import plan_pruning
from onnx_lwdf.runtime import copy_of, unloadable
from onnx_lwdf.sharing import codes_of
from onnx_lwdf.sites import float_tails
from onnx_lwdf.statistics import Statistics, origin

FOLDED = (
    "BatchNormalization was folded into the weights when the model was exported: its statistics are recovered in part, "
    "and the other layers know their inputs from synthetic images alone; export it with BatchNormalization kept"
)
UNNORMALIZED = (
    "the model has no normalization: if the export folded BatchNormalization into the weights, its statistics are lost, "
    "and layers know their inputs from synthetic images alone; export it with BatchNormalization kept"
)
CROSSED = "a convolution reads the same tensor along its channels, and this layer along another axis"
REPEATED = (
    "weights that several layers share are written more than once, since these layers differ in what follows them, in bits or "
    "in what is pruned: the file holds some {:.0%} more values of weights than the model"
)
MOST_REPEATED = 0.05  # of all values of weights, that goes without saying
UNSEEN = "{}; so weights alone were rounded, each on its own, and nothing was verified: try the file where it will run"
SINGLE = (
    "input {!r} takes one sample at a time, and the graph no more at once: layers know the statistics of single samples alone, "
    "and are compressed worse; export it with an open batch"
)
TAIL = "joins what different layers put out, and no layer follows: stays float"
ORIGINS = {"data": "data", "none": "weights-only"}  # source -> the statistics of every layer; else each has its own


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that was read and preconditioned: float still, ready to be compressed."""

    config: Config  # what can be done of what was asked
    unseen: str | None  # why the model cannot be run
    graph: Graph
    layers: Sequence[Layer]
    skipped: Sequence[Skipped]
    statistics: Statistics
    plan: Mapping[str, Bits]
    pruning: Mapping[str, Pruning]
    origins: Mapping[str, str]  # layer name -> where the statistics of its input come from
    sources: Mapping[str, Set[str]]  # layer name -> the layers from which it reads
    behind: Mapping[str, Set[str]]  # output -> the layers from which it comes
    inputs: Sequence[InputSpec]
    fixed: FixedBatch | None  # the batch that the model was exported for, free until it is written
    warnings: tuple[str, ...]


def prepare(
    model: onnx.ModelProto,
    config: Config,
    scratch: Scratch | None = None,
    spared: Mapping[str, str] = MappingProxyType({}),
) -> Prepared:
    """Read and precondition: layers found, BatchNormalization folded, bits planned.

    `spared`: layer name -> why it stays float, whatever the options say.
    """
    config, unseen = possible(model, config)
    form = config.stored_format
    opset = oldest_opset(form, config.lowest_weight_bits, config.activations)
    model, note = raise_opset(inline_functions(copy_of(model)), opset, form)
    notes = [note, fix_initializers(model)]
    graph = Graph(model, scratch)
    held = _held(graph)
    statistics = fold(graph)
    fixed = None if unseen else free_batch(graph, find_inputs(graph, config))
    layers, skipped = find_layers(graph, config.exclude)
    fit = operators(config.activations)
    skipped += [_unfit(graph, layer, form) for layer in layers if layer.op not in fit]
    skipped += [_left(graph, layer, spared[layer.name]) for layer in layers if layer.name in spared]
    layers = [layer for layer in layers if layer.op in fit and layer.name not in spared]
    windowed = {layer.input for layer in layers if layer.window}
    crossed = [layer for layer in layers if layer.window is None and layer.input in windowed]
    skipped += [_left(graph, layer, CROSSED) for layer in crossed]
    layers = [layer for layer in layers if layer not in crossed]
    if not layers:
        reasons = "; ".join(dict.fromkeys(layer.reason for layer in skipped))
        raise ModelError(f"nothing to compress: {reasons or 'the model has no Conv, ConvTranspose, Gemm or MatMul'}")
    plan = plan_bits(graph, layers, skipped, config)
    pruning = plan_pruning(graph, layers, skipped, config)
    touched = {name for name in plan if config.channels or plan[name].weight is not None or pruning[name].asked}
    idle = [layer for layer in layers if layer.name not in touched]
    skipped += [_left(graph, layer, pruning[layer.name].note) for layer in idle]
    layers = [layer for layer in layers if layer not in idle]
    notes.append(_repeated(held, _held(graph, layers, codes_of(graph, layers, plan, pruning))))
    skipped += [Skipped(node_name(node), operator(node), (), TAIL) for node in float_tails(graph, layers, plan)]
    inputs, warnings = read_inputs(graph, config, statistics) if unseen is None else ((), (UNSEEN.format(unseen),))
    known = [spec.name for spec in inputs if spec.inferred]
    recovered: Statistics = {}
    if config.source == "aligned":  # independent draws at some tensors only would spoil what stands between them
        recovered = recover(graph, layers, statistics, draw_chunks(inputs, replace(config, samples=CHUNK)))
    origins = {
        layer.name: ORIGINS.get(config.source) or origin(graph, layer.input, statistics, recovered, known)
        for layer in layers
    }
    lost = "propagated" in origins.values() and not statistics and not any(map(_normalizes, graph.nodes))
    folded = FOLDED if recovered else UNNORMALIZED if lost else None
    alone = [SINGLE.format(spec.name) for spec in inputs if spec.image and spec.batch == 1]
    warnings = (*filter(None, notes), *warnings, *filter(None, [folded]), *alone)
    layers, inputs = read_pixels(graph, layers, plan, inputs, config)
    layers, inputs = split_inputs(graph, layers, plan, inputs, config)
    found = sources(graph, layers)
    return Prepared(
        config=config,
        unseen=unseen,
        graph=graph,
        layers=layers,
        skipped=skipped,
        statistics={**statistics, **recovered},
        plan=plan,
        pruning=pruning,
        origins=origins,
        sources={layer.name: found.get(layer.input, frozenset()) for layer in layers},
        behind={name: found.get(name, frozenset()) for name in graph.outputs},
        inputs=inputs,
        fixed=fixed,
        warnings=warnings,
    )


def possible(model: onnx.ModelProto, config: Config) -> tuple[Config, str | None]:
    """What can be done of what was asked, and why the model cannot be run where that is less."""
    unseen = unloadable(model) or unfeedable(model)
    return (config if unseen is None else config.blind(unseen)), unseen


def _held(graph: Graph, layers: Sequence[Layer] = (), codes: Mapping[str, str] = MappingProxyType({})) -> int:
    """Values of weights in a file with these layers compressed. `codes`: layer name -> the layer whose codes it has."""
    compressed = {id(layer.node) for layer in layers}
    others = (node for node in graph.nodes if operator(node) in WEIGHTED and id(node) not in compressed)
    names = {node.input[1] for node in others if len(node.input) > 1} & graph.initializers.keys()
    left = sum(math.prod(graph.initializers[name].dims) for name in names)
    return left + sum(math.prod(shape_of(graph, layer)) for layer in layers if layer.name not in codes)


def _repeated(before: int, after: int) -> str | None:
    """What it means for the file where layers no longer share a weight."""
    more = (after - before) / max(before, 1)
    return REPEATED.format(more) if more > MOST_REPEATED else None


def _normalizes(node: onnx.NodeProto) -> bool:
    """GroupNormalization and its like: what they put out needs no stored statistics."""
    return operator(node).endswith("Normalization")


def _unfit(graph: Graph, layer: Layer, name: str) -> Skipped:
    return _left(graph, layer, f"onnxruntime has no integer {layer.op}; format {name} keeps it in float")


def _left(graph: Graph, layer: Layer, reason: str) -> Skipped:
    weight = graph.constant(layer.weight)
    return Skipped(layer.name, layer.op, () if weight is None else weight.shape, reason)
