"""Channels taken out of a graph, and out of the samples that were seen of it.

A full layer loses rows, and columns whose part the others take over; a depthwise layer loses filters; what holds one
value per channel is cut. The graph's nodes stay, none is added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnx_lwdf.activations.moments import Indices, Moments
from onnx_lwdf.activations.taps import Samples
from onnx_lwdf.channels.elimination import left_over, refit, restore
from onnx_lwdf.channels.ties import CHANNEL_AXIS, Ties
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Layer, bias_of, from_canonical, is_depthwise, output_axis, set_bias, weight_of
from onnx_lwdf.solvers.problem import F64

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class CutLayer:
    """A layer as it is now."""

    layer: Layer
    moments: Moments
    removed: int  # of its output channels
    sqnr_db: float | None  # of the re-fitted layer on its samples, as predicted; None where its inputs all stay


def cut(
    graph: Graph,
    layers: Sequence[Layer],
    samples: Samples,
    ties: Ties,
    spreads: Mapping[str, F64],
    kept: Mapping[str, Mask],
) -> tuple[list[CutLayer], Samples]:
    """Leave of every layer, constant and sample the channels that are `kept`, [channels] of every tensor.

    `spreads` holds for every full layer's name how its input varies, [in, in].
    """
    done = [_cut_layer(graph, layer, samples.moments[layer.name], spreads, kept) for layer in layers]
    take_constants(graph, layers, ties, {name: np.flatnonzero(mask) for name, mask in kept.items() if not mask.all()})
    for node, tensor in ties.targets:
        target = graph.constant(node.input[1])
        assert target is not None, node.input[1]
        changed = target.copy()
        changed[CHANNEL_AXIS] = kept[tensor].sum()
        graph.set_input(node, 1, changed, node.input[1])
    correct_shapes(graph, {name: int(mask.sum()) for name, mask in kept.items()})
    moments = {item.layer.name: item.moments for item in done}
    cut_tensors = {name for name, mask in kept.items() if not mask.all()}  # of the others axis 1 may hold no channels
    values = {name: value[kept[name]] if name in cut_tensors else value for name, value in samples.values.items()}
    return done, replace(samples, moments={**samples.moments, **moments}, values=values)


def take_constants(graph: Graph, layers: Sequence[Layer], ties: Ties, places: Mapping[str, Indices]) -> None:
    """Leave of every constant with one value per channel those at these places, tensor -> [channels]; biases stay."""
    biased = {id(layer.bias[0]) for layer in layers if layer.bias is not None}
    for one in ties.cuts:
        if id(one.node) not in biased and one.tensor in places:
            name = one.node.input[one.index]
            value = graph.constant(name)
            assert value is not None, name
            graph.set_input(one.node, one.index, value.take(places[one.tensor], one.axis), name)


def _cut_layer(
    graph: Graph, layer: Layer, moments: Moments, spreads: Mapping[str, F64], kept: Mapping[str, Mask]
) -> CutLayer:
    read, written = (kept.get(name) for name in (layer.input, layer.node.output[0]))
    if read is None or written is None or (read.all() and written.all()):
        return CutLayer(layer, moments, 0, None)
    removed = int((~written).sum())
    if is_depthwise(graph, layer):
        return CutLayer(_cut_depthwise(graph, layer, read, written), moments.of(read), removed, None)
    if layer.groups > 1:  # its channels all stay
        return CutLayer(layer, moments, 0, None)
    weight, bias = weight_of(graph, layer), bias_of(graph, layer)
    columns = np.tile(read, moments.mean.shape[1] // len(read))
    rows = weight.reshape(-1, len(columns))  # of a ConvTranspose one for each kernel position
    mean, spread = moments.mean[0], spreads[layer.name]
    smaller = restore(rows, refit(rows, spread, columns), spread, columns)
    if layer.bias is not None:
        missed = rows @ mean - smaller @ mean[columns]
        bias = bias + missed.reshape(len(bias), -1).sum(1) / _overlap(layer)
    smaller_weight = smaller.reshape(1, weight.shape[1], -1)[:, written]
    _store(graph, layer, layer, smaller_weight, (int(written.sum()), int(read.sum())))
    if layer.bias is not None and (bias.any() or _has_bias(layer)):
        set_bias(graph, layer, bias[written])
    predicted = None if read.all() else _decibels(rows, smaller, spread, columns)
    return CutLayer(layer, moments.inputs(columns), removed, predicted)


def _cut_depthwise(graph: Graph, layer: Layer, read: Mask, written: Mask) -> Layer:
    smaller = replace(layer, groups=int(read.sum()))
    bias = bias_of(graph, layer)
    _store(graph, layer, smaller, weight_of(graph, layer)[read], (int(written.sum()), 1))
    if _has_bias(layer):
        set_bias(graph, layer, bias[written])
    set_groups(layer, smaller.groups)
    return smaller


def _store(graph: Graph, old: Layer, new: Layer, weight: F64, channels: tuple[int, int]) -> None:
    """Write a canonical weight of other sizes, (outputs, inputs) as the model's weight has them."""
    value = graph.constant(old.weight)
    assert value is not None, old.name
    shape = list(value.shape)
    axis = output_axis(old)
    outputs, inputs = channels
    if old.op == "ConvTranspose" and new.groups > 1:
        outputs, inputs = outputs // new.groups, new.groups
    shape[axis], shape[1 - axis] = outputs, inputs
    graph.set_input(old.node, 1, from_canonical(new, weight, tuple(shape)).astype(value.dtype), old.weight)


def _overlap(layer: Layer) -> int:
    """A transposed convolution's output position meets one in so many of the kernel's positions."""
    return math.prod(layer.window.strides) if layer.op == "ConvTranspose" and layer.window else 1


def _has_bias(layer: Layer) -> bool:
    return (
        layer.bias is not None and len(layer.bias[0].input) > layer.bias[1] and bool(layer.bias[0].input[layer.bias[1]])
    )


def _decibels(rows: F64, smaller: F64, spread: F64, columns: Mask) -> float:
    signal = float(np.einsum("oi,oi->", rows @ spread, rows))
    noise = left_over(rows, smaller, spread, columns)
    return float(10 * np.log10(signal / noise)) if noise > 0 and signal > 0 else float(np.inf)


def set_groups(layer: Layer, groups: int) -> None:
    """Let a grouped layer's node say that it has so many groups."""
    for item in layer.node.attribute:
        if item.name == "group":
            item.i = groups


def correct_shapes(graph: Graph, channels: Mapping[str, int]) -> None:
    """Let what the model says about the shapes of these inner tensors name so many channels."""
    for info in graph.model.graph.value_info:
        dims = info.type.tensor_type.shape.dim
        if info.name in channels and len(dims) > CHANNEL_AXIS and dims[CHANNEL_AXIS].HasField("dim_value"):
            dims[CHANNEL_AXIS].dim_value = channels[info.name]
