"""What stands around a layer is folded into it, its statistics are kept.

    BN(W x + b) = (gamma / sqrt(v + epsilon)) (W x + b - mu) + beta

is one layer with the rows of W scaled by gamma / sqrt(v + epsilon). Constant Adds and Muls behind a convolution fold the
same way, and a Pad of zeros before it joins its own pads. The function of the network does not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnx_lwdf.errors import ModelError
from onnx_lwdf.graph import Graph, attribute, drop_attributes, node_name, operator
from onnx_lwdf.layers import Layer, bias_of, blocks, change_weight, find_layers, set_bias, set_pads, weight_of
from onnx_lwdf.statistics import F64, ChannelStatistics


@dataclass(frozen=True, slots=True)
class Affine:
    """y = scale * x + shift per channel."""

    scale: F64  # [channels]
    shift: F64  # [channels]


def fold(graph: Graph) -> dict[str, ChannelStatistics]:
    """Fold BatchNormalization, constant Add and Mul, and Pad into the layers.

    Returns the statistics of every tensor that a BatchNormalization puts out, folded or not.
    Raises ModelError where a stored variance is negative or anything stored is not finite.
    """
    graph.commit()  # a node that leads to no output must not count as a reader
    stored = {node.output[0]: _stored(graph, node) for node in graph.nodes if is_batchnorm(node)}
    statistics = {name: known for name, known in stored.items() if known is not None}
    for node in graph.nodes:
        _fold_factors(graph, node)
    layers, _ = find_layers(graph)
    for layer in layers:
        _check_finite(graph, layer)
        _fold_pad(graph, layer)
        while layer.op != "MatMul" and (follower := graph.sole_consumer(layer.node.output[0])) is not None:
            affine = _affine(graph, layer, follower)
            if affine is None:
                break
            _apply(graph, layer, affine)
            before = statistics.pop(layer.node.output[0], None)
            graph.merge_into(layer.node, follower)
            if before is not None and not is_batchnorm(follower):
                statistics[layer.node.output[0]] = before.through(affine.scale, affine.shift)
    graph.commit()
    return {name: known for name, known in statistics.items() if name in graph.producer}  # the others led nowhere


def _fold_factors(graph: Graph, node: onnx.NodeProto) -> None:
    """A Gemm's alpha goes into its constant weight, its beta into its constant bias."""
    factors = {1: attribute(node, "alpha", 1.0), 2: attribute(node, "beta", 1.0)}
    if operator(node) != "Gemm" or set(factors.values()) == {1.0}:
        return
    names = {index: name for index, name in enumerate(node.input) if name and index in factors}
    values = {index: graph.constant(name) for index, name in names.items()}
    known = {index: value for index, value in values.items() if value is not None}
    if len(known) < len(names):
        return
    for index, value in known.items():
        graph.set_input(node, index, np.asarray(value * factors[index], value.dtype), names[index])
    drop_attributes(node, "alpha", "beta")


def _apply(graph: Graph, layer: Layer, affine: Affine) -> None:
    scale = affine.scale.reshape(layer.groups, -1, 1)
    bias = bias_of(graph, layer)
    change_weight(graph, layer, lambda rows: weight_of(graph, layer, rows) * scale[:, rows])  # [groups, out, in]
    set_bias(graph, layer, bias * affine.scale + affine.shift)


def _affine(graph: Graph, layer: Layer, node: onnx.NodeProto) -> Affine | None:
    """The follower as y = scale x + shift per output channel of the layer, None where it is not that."""
    channels = bias_of(graph, layer).size
    if is_batchnorm(node) and node.input[0] == layer.node.output[0]:
        known = parameters(graph, node)
        if known is None:
            return None
        gamma, beta, mean, variance = known
        scale = gamma / np.sqrt(variance + _epsilon(node))
        return Affine(scale, beta - scale * mean)
    if operator(node) not in ("Add", "Mul") or layer.window is None or len(node.input) != 2:
        return None
    constant = graph.constant(node.input[1 - list(node.input).index(layer.node.output[0])])
    values = None if constant is None else per_channel(constant, channels, 2 + len(layer.window.kernel), 1)
    if values is None:
        return None
    if operator(node) == "Add":
        return Affine(np.ones(channels), values)
    return Affine(values, np.zeros(channels))


def per_channel(
    constant: np.ndarray[tuple[int, ...], np.dtype[Any]], channels: int, rank: int, axis: int
) -> F64 | None:
    """A constant operand of a tensor of this rank, as one value per channel along the axis, [channels].

    None where it differs along another axis, or adds one, or is not finite.
    """
    if constant.ndim > rank or not np.isfinite(constant).all():
        return None
    shape = (1,) * (rank - constant.ndim) + constant.shape
    if shape[axis] not in (1, channels) or constant.size != shape[axis]:
        return None
    return np.broadcast_to(constant.astype(np.float64).ravel(), (channels,)).copy()


def is_batchnorm(node: onnx.NodeProto) -> bool:
    """An inference-mode BatchNormalization: one output, no training mode."""
    outputs = [name for name in node.output if name]
    return operator(node) == "BatchNormalization" and len(outputs) == 1 and not attribute(node, "training_mode", 0)


def _epsilon(node: onnx.NodeProto) -> float:
    return float(attribute(node, "epsilon", 1e-5))


def parameters(graph: Graph, node: onnx.NodeProto) -> list[F64] | None:
    """gamma, beta, mean, variance of a BatchNormalization in float64, None where one is not constant.

    Raises ModelError where one is not finite, or a variance is negative.
    """
    values = [graph.constant(name) for name in node.input[1:5]]
    if any(value is None for value in values):
        return None
    arrays = [np.asarray(value, np.float64) for value in values]
    for word, array in zip(("scale", "bias", "mean", "variance"), arrays, strict=True):
        if not np.isfinite(array).all():
            raise ModelError(f"BatchNormalization {node_name(node)!r} has a NaN or infinite {word}; repair the model")
    if (arrays[3] < 0).any():
        raise ModelError(f"BatchNormalization {node_name(node)!r} has a negative variance; repair the model")
    return arrays


def _stored(graph: Graph, node: onnx.NodeProto) -> ChannelStatistics | None:
    known = parameters(graph, node)
    if known is None:
        return None
    gamma, beta, _, variance = known
    gain = np.abs(gamma)
    return ChannelStatistics(beta, gain * np.sqrt(variance / (variance + _epsilon(node))), gain)


def _check_finite(graph: Graph, layer: Layer) -> None:
    finite = all(np.isfinite(weight_of(graph, layer, rows)).all() for rows in blocks(graph, layer))
    if not (finite and np.isfinite(bias_of(graph, layer)).all()):
        raise ModelError(f"layer {layer.name!r} has NaN or infinite weights; repair the model")


def _fold_pad(graph: Graph, layer: Layer) -> None:
    """A Pad of zeros along the spatial axes before a Conv becomes the Conv's own pads."""
    window, pad = layer.window, graph.producer.get(layer.input)
    if layer.op != "Conv" or window is None or window.pads is None or pad is None or operator(pad) != "Pad":
        return
    widths = _pad_widths(graph, pad)
    if widths is None or graph.sole_consumer(pad.output[0]) is not layer.node:
        return
    rank = len(window.kernel)
    begins, ends = widths[2 : 2 + rank], widths[4 + rank :]
    if any(widths[:2]) or any(widths[2 + rank : 4 + rank]) or min(*begins, *ends) < 0:
        return
    total = [a + b for a, b in zip((*begins, *ends), window.pads, strict=True)]
    set_pads(layer.node, total)
    graph.connect(layer.node, 0, pad.input[0])
    graph.remove(pad)


def _pad_widths(graph: Graph, pad: onnx.NodeProto) -> list[int] | None:
    """Begins, then ends of every axis, None where the Pad is not one of constant zeros on all axes."""
    if attribute(pad, "mode", "constant") != "constant":
        return None
    if len(pad.input) < 2:  # before opset 11 the widths are an attribute
        value = attribute(pad, "value", 0.0)
        return None if value else list(attribute(pad, "pads", []))
    widths = graph.constant(pad.input[1])
    fill = graph.constant(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(1)
    axes = len(pad.input) > 3 and pad.input[3]
    if widths is None or fill is None or fill.any() or axes:
        return None
    return [int(width) for width in widths]
