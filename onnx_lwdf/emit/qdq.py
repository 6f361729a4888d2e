"""Standard QuantizeLinear / DequantizeLinear pairs that onnxruntime turns into integer kernels.

    x -> Q -> [Clip] -> DQ -> Conv(DQ(codes), DQ(int32 bias)) -> activation -> Q -> [Clip] -> DQ -> ...

The rules are those of onnxruntime's QDQ selectors (read at 1.17 to 1.32): weights int8 with zero point 0 and one scale
per output channel, bias int32 with scale x_scale * w_scale, scalar activation grids. Below 8 bits QuantizeLinear alone
would saturate at 255, so an integer Clip stands behind it (QCDQ): the Conv still fuses with its QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lwdf.emit.stored import Held, Rounded
from onnx_lwdf.graph import Graph, operator
from onnx_lwdf.ranges import ActivationGrid
from onnx_lwdf.sites import Site, clip_bounds, has_kernel


def weight(graph: Graph, stem: str, codes: Held, rounded: Rounded) -> Held:
    """The float weight of an int8 tensor that holds its codes."""
    scale = graph.add_constant(f"{stem}.scale", rounded.scale)
    zero = graph.add_constant(f"{stem}.zero_point", np.zeros(rounded.scale.shape, np.int8))
    name = graph.add("DequantizeLinear", [codes.tensor, scale, zero], f"{stem}.stored", axis=rounded.axis)
    return Held(name, codes.bytes + rounded.scale.nbytes + rounded.scale.size)


def bias(graph: Graph, stem: str, values: npt.NDArray[np.float64], rounded: Rounded, grid: ActivationGrid) -> str:
    """The bias as int32 codes (older onnxruntime does not fuse a float one); its name."""
    scale = (np.float32(grid.scale) * rounded.scale).astype(np.float32)
    codes = np.rint(np.divide(values, scale, out=np.zeros_like(values), where=scale > 0))  # 0: too small for float32
    limit = np.iinfo(np.int32).max
    inputs = [
        graph.add_constant(f"{stem}.bias.codes", np.clip(codes, -limit, limit).astype(np.int32)),
        graph.add_constant(f"{stem}.bias.scale", scale),
        graph.add_constant(f"{stem}.bias.zero_point", np.zeros(scale.shape, np.int32)),
    ]
    return graph.add("DequantizeLinear", inputs, f"{stem}.bias.stored", axis=0)


def activations(graph: Graph, sites: Sequence[Site], grids: Mapping[str, ActivationGrid], signed: bool) -> None:
    """Write Q-DQ pairs at every tensor of the sites."""
    for site in sites:
        grid = grids[site.tensors[0]]
        _free_activation(graph, site.tensors[0], grid)
        for tensor in site.tensors:
            _quantize(graph, tensor, grid, signed)
    for node in [node for node in graph.nodes if not has_kernel(node)]:
        source = graph.producer.get(node.input[0])
        if source is not None and operator(source) == "DequantizeLinear" and node.output[0] not in graph.outputs:
            _keep_float(graph, node.output[0])


def _keep_float(graph: Graph, tensor: str) -> None:
    """Let its maker not be fused with what quantizes it: a Max of one tensor, which optimizers leave, stands between."""
    graph.reroute(list(graph.consumers[tensor]), tensor, graph.add("Max", [tensor], f"{tensor}.float"))


def _free_activation(graph: Graph, tensor: str, grid: ActivationGrid) -> None:
    """Below 8 bits: a Clip that the integer Clip makes redundant becomes a Relu, which onnxruntime fuses.

    QuantizeLinear saturates at code 255, beyond the Clip's own bound, so onnxruntime would keep the float Clip apart.
    """
    node = graph.producer.get(tensor)
    if node is None or operator(node) != "Clip" or grid.bits == 8 or grid.zero_point != 0:
        return
    low, high = clip_bounds(graph, node) or (None, None)
    if low == 0 and high is not None and grid.scale * grid.levels <= high:
        name, source, doc = node.name, node.input[0], node.doc_string
        node.Clear()
        node.CopyFrom(onnx.helper.make_node("Relu", [source], [tensor], name=name, doc_string=doc))


def _quantize(graph: Graph, tensor: str, grid: ActivationGrid, signed: bool) -> None:
    """All readers of the tensor read it through Q, Clip below 8 bits, and DQ; so does the output it may be."""
    readers = list(graph.consumers[tensor])
    source = tensor
    if tensor in graph.outputs and tensor in graph.producer:  # an input that is an output too stays what it is
        source = graph.move_output(tensor)
    offset = 2 ** (grid.bits - 1) if signed else 0
    kind = np.int8 if signed else np.uint8
    scale = graph.add_constant(f"{tensor}.scale", np.float32(grid.scale))
    zero = graph.add_constant(f"{tensor}.zero_point", kind(grid.zero_point - offset))
    codes = graph.add("QuantizeLinear", [source, scale, zero], f"{tensor}.codes")
    if grid.bits < 8:
        least = graph.add_constant(f"{tensor}.least", kind(-offset))
        most = graph.add_constant(f"{tensor}.most", kind(grid.levels - offset))
        codes = graph.add("Clip", [codes, least, most], f"{tensor}.clipped")
    stored = graph.add("DequantizeLinear", [codes, scale, zero], f"{tensor}.stored")
    if source != tensor:
        stored = graph.rename(stored, tensor)
    for reader in readers:
        for index, name in enumerate(reader.input):
            if name == tensor:
                graph.connect(reader, index, stored)
