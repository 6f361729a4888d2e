"""An image is read as the bytes that it was.

A network that takes x_c = (p - mean_c) / std_c of pixels p, channels c apart, rounds them again: no grid of 256 codes holds
256 whole numbers of each channel, if all share it. With

    p = std x + mean,    W x + b = (W / std) p + b - sum W mean / std

computed in float at the input, each pixel is one code, and what the first layer reads is exact. It pads with zeros, which are
pixels of the mean: so the input is padded before, and there alone up to half a pixel is lost. Decoded images are whole numbers;
those that were resized in float are rounded by as much as before. Where one mean serves all channels, they share a grid too:
it holds the pixels, or (127.5) lies between them, where padding would lie then.

Pad, Mul and Add take a hundredth of a small network's time or two, so they are worth it only where weights and activations
have 8 bits: below, a sixteenth of the noise or more comes from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx

from onnx_lwdf.activations.inputs import InputSpec
from onnx_lwdf.activations.normalization import ESTIMATED, Normalization
from onnx_lwdf.config import TARGETS, Config
from onnx_lwdf.graph import Graph, attribute
from onnx_lwdf.layers import Bits, Layer, committed, set_pads
from onnx_lwdf.precondition.bounds import SAME_VALUES
from onnx_lwdf.precondition.transform import change_reader, diagonal

BITS = 8


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
        reader, known = by_node.get(id(_reader(graph, spec))), spec.normalization
        if reader is not None and known is not None and known.apart and known.name != ESTIMATED and _fits(reader, spec):
            exposed[spec.name] = _expose(graph, reader, known)
    if not exposed:
        return layers, inputs
    return committed(graph, layers), tuple(replace(spec, pixels=exposed.get(spec.name)) for spec in inputs)


def _reader(graph: Graph, spec: InputSpec) -> onnx.NodeProto | None:
    """The only node that reads the input's values, channels on axis 1, behind what only moves them; shapes do not count."""
    tensor, axes = spec.name, list(range(len(spec.shape) + 1))
    channels = axes[-1] if spec.channels_last else 1
    while True:
        readers = [node for node in graph.consumers[tensor] if node.op_type != "Shape"]
        if len(readers) != 1 or tensor in graph.outputs or tensor in graph.captured:
            return None
        if readers[0].op_type not in SAME_VALUES:
            return readers[0] if axes[1:2] == [channels] else None
        if readers[0].op_type == "Transpose":
            axes = [axes[axis] for axis in attribute(readers[0], "perm", axes[::-1])]
        tensor = readers[0].output[0]


def _fits(layer: Layer, spec: InputSpec) -> bool:
    """Whether the layer can read bytes."""
    padded = layer.op == "Conv" and layer.window is not None and layer.window.pads is not None
    return padded and layer.bias is not None and spec.dtype.kind == "f"


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
