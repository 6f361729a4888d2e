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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx

from onnx_lwdf.activations.inputs import InputSpec
from onnx_lwdf.activations.normalization import ESTIMATED, Normalization
from onnx_lwdf.config import TARGETS, Config
from onnx_lwdf.graph import Graph, attribute
from onnx_lwdf.layers import Bits, Layer, committed, input_channels, set_pads
from onnx_lwdf.precondition.bounds import SAME_VALUES
from onnx_lwdf.precondition.transform import change_reader, diagonal

BITS = 8


def read_pixels(
    graph: Graph, layers: Sequence[Layer], plan: Mapping[str, Bits], inputs: Iterable[InputSpec], config: Config
) -> tuple[list[Layer], tuple[InputSpec, ...]]:
    """The layers and the inputs of the changed graph; an input that is read as bytes now says where these are."""
    by_node = {id(layer.node): layer for layer in layers}
    exact = all(bits.weight == bits.activation == BITS and not bits.free for bits in plan.values())
    changed = []
    for spec in inputs:
        reader = by_node.get(id(_reader(graph, spec)))
        if exact and reader is not None and not TARGETS[config.target].symmetric_activations and _fits(reader, spec):
            assert spec.normalization is not None
            spec = replace(spec, pixels=_expose(graph, reader, spec.normalization))
        changed.append(spec)
    return committed(graph, layers), tuple(changed)


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
    """Whether the layer can read bytes, and channels could not share a grid of them."""
    if layer.op != "Conv" or layer.window is None or layer.window.pads is None or layer.bias is None:
        return False
    known = spec.normalization
    return spec.dtype.kind == "f" and known is not None and known.apart and known.name != ESTIMATED


def _expose(graph: Graph, layer: Layer, normalization: Normalization) -> str:
    """Let the layer read pixels; the tensor that holds them."""
    assert layer.window is not None
    assert layer.window.pads is not None
    std, mean = np.array(normalization.std), np.array(normalization.mean)
    channels, rank = input_channels(graph, layer), len(layer.window.kernel)
    shift = {layer.input: np.broadcast_to(-mean / std, channels)}
    change_reader(graph, layer, diagonal(np.broadcast_to(std, channels), shift), layer.input)
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
