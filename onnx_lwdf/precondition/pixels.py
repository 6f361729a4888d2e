"""An image is read as the bytes that it was.

A network that takes x_c = (p - mean_c) / std_c of pixels p, channels c apart, rounds them again: no grid of 256 codes holds
256 whole numbers of each channel, if all share it. With

    p = std x + mean,    W x + b = (W / std) p + b - sum W mean / std

computed in float in front of it, each pixel is one code, and what the first layer reads is exact. It pads with zeros, which are
pixels of the mean: so the input is padded before, and there alone up to half a pixel is lost. Decoded images are whole numbers;
those that were resized in float are rounded by as much as before. Where one mean serves all channels, they share a grid too:
it holds the pixels, or (127.5) lies between them, where padding would lie then. Whether the caller normalizes, or the model
itself in front of its first layer, is all the same.

Pad, Mul and Add take a hundredth of a small network's time or two, so they are worth it only where weights and activations
have 8 bits: below, a sixteenth of the noise or more comes from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx

from onnx_lwdf.activations.inputs import InputSpec
from onnx_lwdf.activations.normalization import AS_BYTES, Normalization
from onnx_lwdf.config import TARGETS, Config
from onnx_lwdf.graph import Graph, attribute, operator
from onnx_lwdf.layers import Bits, Layer, committed, set_pads
from onnx_lwdf.precondition.fold import Affine, per_channel
from onnx_lwdf.precondition.transform import change_reader, diagonal

BITS = 8
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)  # which hold 256 pixels exactly


def read_pixels(
    graph: Graph, layers: list[Layer], plan: Mapping[str, Bits], inputs: tuple[InputSpec, ...], config: Config
) -> tuple[list[Layer], tuple[InputSpec, ...]]:
    """The layers and the inputs of the changed graph; an input that is read as bytes now says where these are."""
    exact = all(bits.weight == bits.activation == BITS and not bits.free for bits in plan.values())
    if not exact or TARGETS[config.target].symmetric_activations:
        return layers, inputs
    by_node = {id(layer.node): layer for layer in layers}
    exposed = {}
    for spec in inputs:
        node, known = first_reader(graph, spec)
        layer = by_node.get(id(node))
        if layer is not None and known is not None and known.apart and _fits(layer) and not spec.vague:
            exposed[spec.name] = _expose(graph, layer, known)
    if not exposed:
        return layers, inputs
    return committed(graph, layers), tuple(replace(spec, pixels=exposed.get(spec.name)) for spec in inputs)


def first_reader(graph: Graph, spec: InputSpec) -> tuple[onnx.NodeProto | None, Normalization | None]:
    """The only node that computes with the input's values, channels on axis 1, and how what it reads is normalized.

    What moves values, or normalizes them, is passed; shapes do not count. None, None where there is no such node.
    """
    known = spec.normalization
    if known is None or not spec.shape:
        return None, None
    if spec.dtype.kind != "f" and (known.apart or known.range != AS_BYTES.range):  # rounded once they were normalized
        return None, None
    tensor, axes = spec.name, list(range(len(spec.shape) + 1))
    axis = axes[-1] if spec.channels_last else 1
    channels = spec.shape[axis - 1]
    mean, std = np.broadcast_to(known.mean, channels), np.broadcast_to(known.std, channels)
    while True:
        readers = [node for node in graph.consumers[tensor] if operator(node) != "Shape"]
        if len(readers) != 1 or tensor in graph.outputs or tensor in graph.captured:
            return None, None
        node = readers[0]
        if operator(node) == "Transpose":
            axes = [axes[moved] for moved in attribute(node, "perm", axes[::-1])]
        else:
            step = _step(graph, node, tensor, channels, len(axes), axes.index(axis))
            if step is None:
                found = Normalization(known.name, tuple(mean.tolist()), tuple(std.tolist()))
                return (node, found) if axes.index(axis) == 1 else (None, None)
            mean, std = mean - step.shift * std / step.scale, std / step.scale
        tensor = node.output[0]


def _step(graph: Graph, node: onnx.NodeProto, tensor: str, channels: int, rank: int, axis: int) -> Affine | None:
    """What the node makes of the tensor's channels, None where that is more than a scale and a shift of each."""
    one, zero = np.ones(channels), np.zeros(channels)
    if operator(node) == "Identity" or (operator(node) == "Cast" and attribute(node, "to", 0) in FLOATS):
        return Affine(one, zero)
    if operator(node) not in ("Add", "Sub", "Mul", "Div") or node.input[0] == node.input[1]:
        return None
    first = node.input[0] == tensor
    constant = graph.constant(node.input[1 if first else 0])
    values = None if constant is None else per_channel(constant, channels, rank, axis)
    if values is None:
        return None
    if operator(node) == "Add":
        return Affine(one, values)
    if operator(node) == "Sub":
        return Affine(one, -values) if first else Affine(-one, values)
    if not values.all() or (operator(node) == "Div" and not first):
        return None
    return Affine(values if operator(node) == "Mul" else 1 / values, zero)


def _fits(layer: Layer) -> bool:
    """Whether the layer can read bytes."""
    padded = layer.op == "Conv" and layer.window is not None and layer.window.pads is not None
    return padded and layer.bias is not None


def _expose(graph: Graph, layer: Layer, normalization: Normalization) -> str:
    """Let the layer read pixels; the tensor that holds them."""
    assert layer.window is not None
    assert layer.window.pads is not None
    std, mean = np.array(normalization.std), np.array(normalization.mean)
    rank = len(layer.window.kernel)
    change_reader(graph, layer, diagonal(std, {layer.input: -mean / std}))
    stem, tensor = f"{layer.input}.pixels", layer.input
    if any(layer.window.pads):
        begins, ends = layer.window.pads[:rank], layer.window.pads[rank:]
        widths = graph.shared_constant(np.array([0, 0, *begins, 0, 0, *ends], np.int64))
        tensor = graph.add("Pad", [tensor, widths], stem)
        set_pads(layer.node, [0] * 2 * rank)
    for op, values in (("Mul", std), ("Add", mean)):
        shaped = values.astype(np.float32).reshape(1, -1, *[1] * rank)
        tensor = graph.add(op, [tensor, graph.add_constant(f"{stem}.{op.lower()}", shaped)], stem)
    graph.connect(layer.node, 0, tensor)
    return tensor
