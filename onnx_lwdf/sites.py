"""Which tensors carry integers when activations are quantized.

onnxruntime turns a layer into an integer kernel where its input and its output pass through QuantizeLinear, so the
inputs of all layers and the outputs of all convolutions are sites, behind the activation where one follows; so are the
results of joins and pools between sites, as long as a layer follows. Behind the last layer they stay float: a detector joins
boxes of hundreds of pixels and scores below one there, which no grid can share. Tensors that an operator only rearranges
share one grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx

from onnx_lwdf.graph import Graph, attribute, operator
from onnx_lwdf.layers import Bits, Layer

REARRANGING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "DepthToSpace")
JOINING = ("Add", "Concat", "AveragePool", "GlobalAveragePool")  # onnxruntime has an integer kernel for each
JOIN_BITS = 8  # of tensors that no layer reads: nothing is gained by fewer


@dataclass(frozen=True, slots=True)
class Site:
    """Tensors that share one grid."""

    tensors: tuple[str, ...]  # the first is where the values are made
    bits: int
    low: float | None  # bounds that the activation behind which it stands guarantees
    high: float | None


def find_sites(graph: Graph, layers: Sequence[Layer], plan: Mapping[str, Bits]) -> list[Site]:
    """The sites of the layers whose activations are quantized, in graph order; each tensor is in one site."""
    quantized = _quantized(layers, plan)
    root, _ = _places(graph, quantized)
    bits: dict[str, int] = {}
    for layer in quantized:
        place = root[layer.input]
        bits[place] = max(bits.get(place, 0), plan[layer.name].activation or 0)
    groups: dict[str, list[str]] = {}
    for tensor, place in root.items():
        groups.setdefault(place, []).append(tensor)
    return [_site(graph, tensors, bits.get(place, JOIN_BITS)) for place, tensors in groups.items()]


def float_tails(graph: Graph, layers: Sequence[Layer], plan: Mapping[str, Bits]) -> list[onnx.NodeProto]:
    """The Concats that stay float because no layer follows."""
    _, tails = _places(graph, _quantized(layers, plan))
    return [node for node in tails if operator(node) == "Concat"]


def _quantized(layers: Sequence[Layer], plan: Mapping[str, Bits]) -> list[Layer]:
    return [layer for layer in layers if plan[layer.name].activation is not None]


def _places(graph: Graph, quantized: Sequence[Layer]) -> tuple[dict[str, str], list[onnx.NodeProto]]:
    """Tensor -> the first one of its site; and the joins of sites that are none, because no layer follows."""
    wanted = {layer.input for layer in quantized}
    before = ahead(graph, wanted)
    wanted |= {behind_activation(graph, layer.node.output[0]) for layer in quantized if layer.op == "Conv"}
    root: dict[str, str] = {}
    tails: list[onnx.NodeProto] = []
    for tensor in [*graph.inputs, *(name for node in graph.nodes for name in node.output if name)]:
        node = graph.producer.get(tensor)
        if node is not None and operator(node) in REARRANGING and tensor == node.output[0] and node.input[0] in root:
            root[tensor] = root[node.input[0]]
        elif tensor in wanted:
            root[tensor] = tensor
        elif node is not None and _joins(graph, node, tensor, root):
            if tensor in before:
                root[tensor] = tensor
            else:
                tails.append(node)
    return root, tails


def ahead(graph: Graph, tensors: Iterable[str]) -> set[str]:
    """These tensors and all that they are computed from."""
    found, waiting = set(tensors), list(tensors)
    while waiting:
        node = graph.producer.get(waiting.pop())
        sources = [] if node is None else [name for name in node.input if name not in found]
        found.update(sources)
        waiting.extend(sources)
    return found


def shares_passed(graph: Graph, layers: Sequence[Layer]) -> dict[str, float]:
    """Tensor -> the share of the layers on the longest way through it that stand before it; 0 where no layer is on its way."""
    counted = {name for layer in layers for name in layer.node.output}
    before: dict[str, int] = dict.fromkeys(graph.inputs, 0)
    behind: dict[str, int] = {}
    for node in graph.nodes:
        steps = max((before.get(name, 0) for name in node.input), default=0)
        for name in node.output:
            before[name] = steps + (name in counted)
    for node in reversed(graph.nodes):
        steps = max(behind.get(name, 0) + (name in counted) for name in node.output)
        for name in node.input:
            behind[name] = max(behind.get(name, 0), steps)
    return {name: steps / max(steps + behind.get(name, 0), 1) for name, steps in before.items()}


def behind_activation(graph: Graph, tensor: str) -> str:
    """The tensor behind the Relu or Clip that alone reads this one, else the tensor itself."""
    reader = graph.sole_consumer(tensor)
    return reader.output[0] if reader is not None and clip_bounds(graph, reader) is not None else tensor


def clip_bounds(graph: Graph, node: onnx.NodeProto) -> tuple[float | None, float | None] | None:
    """Bounds of a Relu or of a Clip with constant bounds; None for any other node."""
    if operator(node) == "Relu":
        return 0.0, None
    if operator(node) != "Clip":
        return None
    if len(node.input) < 2 and node.attribute:  # before opset 11
        values = {item.name: item.f for item in node.attribute}
        return values.get("min"), values.get("max")
    bounds: list[float | None] = [None, None]
    for i, name in enumerate(node.input[1:3]):
        if name:
            value = graph.constant(name)
            if value is None:
                return None
            bounds[i] = float(value.ravel()[0])
    return bounds[0], bounds[1]


def _joins(graph: Graph, node: onnx.NodeProto, tensor: str, root: Mapping[str, str]) -> bool:
    """Whether the tensor is the result, behind its activation, of a join or pool of sites."""
    if clip_bounds(graph, node) is not None and graph.sole_consumer(node.input[0]) is node:
        made_by = graph.producer.get(node.input[0])
    else:
        made_by = node if behind_activation(graph, tensor) == tensor else None
    if made_by is None or operator(made_by) not in JOINING or tensor in graph.outputs:
        return False
    return has_kernel(made_by) and all(name in root for name in made_by.input)


def has_kernel(node: onnx.NodeProto) -> bool:
    """Whether onnxruntime's integer kernel does what the operator does. Up to 1.32 QLinearAveragePool refuses dilations, and
    where it rounds the number of windows up and counts the padding, it divides by what lies within the padded image.
    """
    if operator(node) != "AveragePool":
        return True
    dilated = any(step > 1 for step in attribute(node, "dilations", []))
    return not dilated and not (attribute(node, "ceil_mode", 0) and attribute(node, "count_include_pad", 0))


def _site(graph: Graph, tensors: list[str], bits: int) -> Site:
    node = graph.producer.get(tensors[0])
    bounds = clip_bounds(graph, node) if node is not None else None
    low, high = bounds or (None, None)
    return Site(tuple(tensors), bits, low, high)
