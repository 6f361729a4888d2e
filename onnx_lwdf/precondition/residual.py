"""An input of unknown range is read in two parts, whole steps and what they leave.

Where nothing tells how far an input reaches, its grid must end where no value will be, so that its steps are several times as
wide as those of pixels, and large even areas, black, white or a background, are all off by the same amount. With the step s,

    t = x / s,    c = round(t),    r = K (t - c),    W x = (s W) c + (s W / K) r,

the first layer reads c and r as twice as many channels. Both fit one grid of 8-bit codes with the step 1, that holds c exactly
and r to a K-th of a step; padding is 0 in both, as it was. (Residual quantization, of two stages.) Nothing is lost by a grid
that reaches too far then, so it reaches twice as far as the input is thought to.

Five operators that work on the input, and a first layer of twice as many multiplications: it is done where these are few.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from onnx_lwdf.activations.inputs import InputSpec
from onnx_lwdf.activations.taps import Feed
from onnx_lwdf.config import TARGETS, Config
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, Layer, committed
from onnx_lwdf.precondition.copies import MOST_ADDED, shares
from onnx_lwdf.precondition.pixels import first_reader

FINER = 16  # K: r is then less of a loss than the weights' own rounding, which an r of more codes would meet, too
REACH = 2.0  # times as far as the input is thought to
FEWEST_BITS = 6  # of all activations: below, other grids leave a hundred times as much noise
BITS = 8
MIDDLE = 2 ** (BITS - 1)  # the code of 0


def split_inputs(
    graph: Graph, layers: list[Layer], plan: Mapping[str, Bits], inputs: tuple[InputSpec, ...], config: Config
) -> tuple[list[Layer], tuple[InputSpec, ...]]:
    """The layers and the inputs of the changed graph; an input that is read in parts now says where these are."""
    fewest = min((bits.activation for bits in plan.values() if bits.activation is not None), default=0)
    if fewest < FEWEST_BITS or TARGETS[config.target].symmetric_activations:
        return layers, inputs
    by_node = {id(layer.node): layer for layer in layers}
    found = {}
    for spec in inputs:
        if spec.vague:
            node, known = first_reader(graph, spec)
            layer = by_node.get(id(node))
            if layer is not None and known is not None and _fits(layer, plan[layer.name]):
                found[spec.name] = layer, max(map(abs, known.range))
    if not found:
        return layers, inputs
    price = shares(graph, layers, _feed(inputs))
    parts = {
        name: _split(graph, layer, reach)
        for name, (layer, reach) in found.items()
        if price[layer.name] <= MOST_ADDED and reach > 0
    }
    return committed(graph, layers), tuple(replace(spec, parts=parts.get(spec.name)) for spec in inputs)


def _fits(layer: Layer, bits: Bits) -> bool:
    """Whether the layer can read twice as many channels, of 8 bits."""
    return layer.op == "Conv" and layer.groups == 1 and bits.activation == BITS


def _feed(inputs: tuple[InputSpec, ...]) -> Feed:
    rng = np.random.default_rng(0)
    return {spec.name: spec.draw(1, rng) for spec in inputs}


def _split(graph: Graph, layer: Layer, reach: float) -> str:
    """Let the layer read the two parts of its input, that reaches from -reach to reach; the tensor that holds them."""
    step = np.float32(REACH * reach / (MIDDLE - 1 - FINER / 2))
    stem = f"{layer.input}.parts"
    steps = graph.add("Mul", [layer.input, graph.shared_constant(1 / step)], stem)
    whole = graph.add("Round", [steps], stem)
    left = graph.add("Sub", [steps, whole], stem)
    finer = graph.add("Mul", [left, graph.shared_constant(np.float32(FINER))], stem)
    weight = graph.constant(layer.weight)
    assert weight is not None, layer.name
    graph.set_input(layer.node, 1, np.concatenate([weight * step, weight * (step / FINER)], axis=1), layer.weight)
    tensor = graph.add("Concat", [whole, finer], stem, axis=1)
    graph.connect(layer.node, 0, tensor)
    return tensor
