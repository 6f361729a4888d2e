"""How a solution is written: one storage of weights a file, one visible table.

Storage and activations are independent. A storage rebuilds a weight's codes (or its float values) from what the file
holds; the codes of a layer with integer activations go into DequantizeLinear, those of any other, cast to float, into Mul. In
both cases onnxruntime folds the storage's own operators at load, and the kernels that run are the same for all storages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_lwdf.emit import dense, folded, packed, qdq, sparse, sparse_initializer
from onnx_lwdf.emit.stored import Held, Rounded, Runs, Store, Stored, Values, stored_bytes
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import (
    WEIGHTED,
    Bits,
    Layer,
    find_layers,
    output_axis,
    output_channels,
    run_shape,
    set_bias,
    vectors_of,
)
from onnx_lwdf.ranges import ActivationGrid
from onnx_lwdf.sites import Site

INTEGER, FLOAT = "integer", "float"
FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class Format:
    """A storage, what it can store, and the oldest operator sets that have what it writes."""

    store: Store
    weights: tuple[str, ...]
    activations: tuple[str, ...]
    opset: int  # with weights of 8 bits or float
    opset_packed: int  # with weights below 8 bits


FORMATS: Mapping[str, Format] = {
    "qdq": Format(dense.store, (INTEGER,), (INTEGER,), 13, 13),
    "folded": Format(dense.store, (INTEGER,), (FLOAT,), 9, 9),
    "packed": Format(packed.store, (INTEGER,), (INTEGER, FLOAT), 9, 18),
    "sparse": Format(sparse.store, (INTEGER, FLOAT), (INTEGER, FLOAT), 11, 18),
    "sparse-initializer": Format(sparse_initializer.store, (INTEGER, FLOAT), (FLOAT,), 11, 11),
    "dense": Format(dense.store, (FLOAT,), (FLOAT,), 1, 1),
}
QDQ_OPSET = 13  # DequantizeLinear with one scale per channel
INTEGER_OPERATORS = ("Conv", "Gemm", "MatMul")  # that onnxruntime has integer kernels for


def automatic(weights: str, activations: str, zeros: bool, packs: bool) -> str:
    """The format that fits the kinds of weights and activations.

    `zeros`: many weights are zero somewhere; `packs`: fewer bits are to make a smaller file.
    """
    if packs:
        return "packed"
    if activations == INTEGER:
        return "qdq"
    if weights == INTEGER:
        return "folded"
    return "sparse" if zeros else "dense"


def refusal(name: str, weights: str, activations: str) -> str | None:
    """Why the format cannot store these kinds of weights and activations, with what to do; None where it can."""
    form = FORMATS[name]
    if (weights, activations) == (FLOAT, INTEGER):
        return "integer activations need integer weights; give --bits or --weight-bits"
    if activations not in form.activations:
        return f"format {name!r} stores {form.activations[0]} activations; change --format or --activation-bits"
    if weights not in form.weights:
        return f"format {name!r} stores {form.weights[0]} weights; change --format or --weight-bits"
    return None


def oldest_opset(name: str, bits: int, activations: str) -> int:
    """The oldest operator set that can hold the format with weights of at least this many bits."""
    form = FORMATS[name]
    needed = form.opset_packed if bits < 8 else form.opset
    return max(needed, QDQ_OPSET) if activations == INTEGER else needed


def operators(activations: str) -> tuple[str, ...]:
    """The layers that can be stored."""
    return INTEGER_OPERATORS if activations == INTEGER else WEIGHTED


def emit(
    graph: Graph,
    store: Store,
    layers: Sequence[Stored],
    sites: Sequence[Site],
    grids: Mapping[str, ActivationGrid],
    signed: bool,
) -> dict[str, int]:
    """Write the layers' weights and biases, and Q-DQ pairs at every tensor of the sites.

    Answers layer name -> the bytes of data that hold its weight, its own or with others. Without sites, activations stay float.
    """
    here = {id(node) for node in graph.nodes}
    for stored in layers:  # found before the last commit they would be written to nodes that are no part of the file
        assert id(stored.layer.node) in here, stored.layer.name
    sizes: dict[str, int] = {}
    own = [stored for stored in layers if not stored.codes_of]
    found = _held(graph, store, [_values(stored) for stored in own])
    held = {stored.layer.name: values for stored, values in zip(own, found, strict=True)}
    for stored in layers:
        weight = _scaled(graph, held[stored.codes_of or stored.layer.name], stored)
        graph.connect(stored.layer.node, 1, weight.tensor)
        _bias(graph, stored)
        sizes[stored.layer.name] = weight.bytes
    qdq.activations(graph, sites, grids, signed)
    return sizes


def _held(graph: Graph, store: Store, tensors: Sequence[Values]) -> list[Held]:
    """The tensors as the storage writes them: together, as far as memory allows."""
    if graph.scratch is None:
        return store(graph, tensors)
    return [held for values in tensors for held in store(graph, [values])]


def planned_bytes(name: str, activations: str, layer: Layer, shape: tuple[int, ...], bits: Bits) -> int:
    """What `emit` will answer for a layer with a weight of this shape; at most, where zeros shrink it."""
    if bits.weight is None:
        return FLOAT_BITS // 8 * math.prod(shape)
    scratch, rounded = Graph(onnx.ModelProto()), _blank(layer, shape, bits)
    (held,) = FORMATS[name].store(scratch, [_codes("weight", rounded, activations)])
    return _float_weight(scratch, "weight", held, rounded, activations).bytes


def weight_bytes(graph: Graph, name: str, activations: str, layer: Layer, bits: Bits) -> int:
    """What the codes of one more layer like this add to a file, operators included; at most, where zeros shrink it."""
    weight = graph.constant(layer.weight)
    assert weight is not None, layer.name
    codes = _codes(layer.weight, _blank(layer, weight.shape, bits), activations)
    one, two = (stored_bytes(FORMATS[name].store, [codes] * count) for count in (1, 2))
    return two - one


def file_bytes(
    graph: Graph,
    name: str,
    layers: Sequence[Layer],
    plan: Mapping[str, Bits],
    sites: Sequence[Site],
    signed: bool,
    codes: Mapping[str, str],
) -> int:
    """The bytes of the file with these layers at these bits, before anything is solved; at most, where zeros shrink it.

    Codes and grids stand in for the true ones, which have the same size. `codes`: layer name -> the layer whose codes it has.
    """
    twin, names = graph.twin(), {layer.name for layer in layers}
    stored = []
    for layer in find_layers(twin)[0]:
        if layer.name not in names:
            continue
        weight, bits = twin.constant(layer.weight), plan[layer.name]
        assert weight is not None, layer.name
        rounded = _blank(layer, weight.shape, bits)
        grid = None if bits.activation is None else ActivationGrid(1.0, 1, bits.activation)
        stored.append(
            Stored(layer, None, rounded, np.ones(output_channels(twin, layer)), grid, codes.get(layer.name, ""))
        )
    grids = {site.tensors[0]: ActivationGrid(1.0, 1, site.bits) for site in sites}
    emit(twin, FORMATS[name].store, stored, sites, grids, signed)
    twin.commit()
    return twin.model.ByteSize()


def _blank(layer: Layer, shape: tuple[int, ...], bits: Bits) -> Rounded:
    assert bits.weight is not None, layer.name
    axis, runs = output_axis(layer), None
    if (vectors := vectors_of(layer, shape[1 - axis], bits)) is not None:
        runs = Runs(np.ones(run_shape(layer, shape, vectors.size), np.int8), 1 - axis, vectors.size)
    return Rounded(np.ones(shape, np.int8), np.ones(shape[axis], np.float32), axis, bits.weight, runs)


def _values(stored: Stored) -> Values:
    stem, rounded = stored.layer.weight, stored.rounded
    if rounded is None:
        assert stored.values is not None, stem
        return Values(stem, stored.values, FLOAT_BITS, None, onnx.TensorProto.FLOAT)
    return _codes(stem, rounded, FLOAT if stored.grid is None else INTEGER)


def _codes(stem: str, rounded: Rounded, activations: str) -> Values:
    kind = onnx.TensorProto.FLOAT if activations == FLOAT else onnx.TensorProto.INT8
    return Values(stem, rounded.codes, rounded.bits, rounded.axis, int(kind), rounded.runs)


def _scaled(graph: Graph, values: Held, stored: Stored) -> Held:
    if stored.rounded is None:
        return values
    return _float_weight(graph, stored.layer.weight, values, stored.rounded, FLOAT if stored.grid is None else INTEGER)


def _float_weight(graph: Graph, stem: str, codes: Held, rounded: Rounded, activations: str) -> Held:
    return (folded.weight if activations == FLOAT else qdq.weight)(graph, stem, codes, rounded)


def _bias(graph: Graph, stored: Stored) -> None:
    """int32 codes where the layer itself holds a bias beside integers, else float, where there is anything to hold."""
    if stored.layer.bias is None:
        return
    node, index = stored.layer.bias
    if stored.layer.op != "MatMul" and stored.rounded is not None and stored.grid is not None:
        stem = stored.layer.weight
        while len(node.input) <= index:
            node.input.append("")
        graph.connect(node, index, qdq.bias(graph, stem, stored.bias, stored.rounded, stored.grid))
    elif stored.bias.any() or index < len(node.input):
        set_bias(graph, stored.layer, np.asarray(stored.bias))
