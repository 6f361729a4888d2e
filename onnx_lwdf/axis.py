"""The batch's axis, of inputs that have none.

A model may take one image as [H, W, C] and give it the axis itself, by an Unsqueeze or a Reshape in front of its first layer.
Statistics are made of batches: such an input gets the axis while the model is compressed, [1, H, W, C], and is without it
again in the file, where an Unsqueeze stands behind it.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

import numpy as np
import onnx

from onnx_lwdf.activations.inputs import find_inputs
from onnx_lwdf.config import Config
from onnx_lwdf.errors import ModelError, OptionError
from onnx_lwdf.graph import Graph, attribute, axes_of, drop_attributes, operator, set_axes
from onnx_lwdf.runtime import Array, copy_of, open_session, run

# What these do to values, they do wherever the axes are.
ELEMENTWISE = {"Add", "Cast", "Clip", "Div", "Identity", "Mul", "Neg", "Sqrt", "Sub"}
TOLERANCE = 1e-5  # of the largest output: nothing is summed in another order


def give_axis(model: onnx.ModelProto) -> tuple[onnx.ModelProto, frozenset[str]]:
    """The model with an axis of size 1 in front of its inputs that lack one, and their names.

    The model itself where none does.
    """
    graph = Graph(model)
    ways = {name: way for name in graph.inputs if (way := _way(graph, name)) is not None}
    if not ways:
        return model, frozenset()
    changed = Graph(copy_of(model))
    for name, way in ways.items():
        dims = _shape(changed.model, name).dim
        for index in way:
            _change(changed, changed.nodes[index], len(dims))
        sizes = [onnx.TensorShapeProto.Dimension(dim_value=1), *dims]
        del dims[:]
        dims.extend(sizes)
    del changed.model.graph.value_info[:]  # of inner tensors, whose sizes are others now
    changed.commit()
    return (changed.model, frozenset(ways)) if _same(model, changed.model, ways.keys()) else (model, frozenset())


def with_axis(config: Config, model: onnx.ModelProto, names: Set[str]) -> Config:
    """The options where shapes of these inputs of the model, as it is with the axis, were given without it."""
    ranks = {name: len(_shape(model, name).dim) for name in names}
    given = {
        name: (1, *shape) if name in names and len(shape) < ranks[name] else shape
        for name, shape in config.input_shape.items()
    }
    return replace(config, input_shape=given)


def take_axis(graph: Graph, names: Set[str]) -> None:
    """Let these inputs be without the axis again."""
    for name in sorted(names):
        readers = list(graph.consumers[name])
        batch = graph.add("Unsqueeze", [name], f"{name}.batch")
        set_axes(graph, graph.producer[batch], [0])
        graph.reroute(readers, name, batch)
        del _shape(graph.model, name).dim[0]
    graph.commit()


def _way(graph: Graph, name: str) -> list[int] | None:
    """The nodes that are others with the axis, from the input to where it is given.

    None where the input has the axis, or may not get it: something in the way depends on where the others are.
    """
    rank = len(_shape(graph.model, name).dim)
    found: list[int] = []
    bare, given = {name}, False  # tensors without the axis
    for index, node in enumerate(graph.nodes):
        if bare.isdisjoint(node.input):
            continue
        op, others = operator(node), [other for other in node.input if other and other not in bare]
        gives = _gives(graph, node, rank)
        stays = op in ELEMENTWISE and all(_is_small(graph, other, rank) for other in others)
        if not (gives or stays or op == "Transpose"):
            return None
        if op in ("Unsqueeze", "Transpose"):
            found.append(index)
        given = given or gives
        bare.update(() if gives else node.output)
    free = bare.isdisjoint(graph.outputs) and bare.isdisjoint(graph.captured)
    return found if rank and given and free else None


def _gives(graph: Graph, node: onnx.NodeProto, rank: int) -> bool:
    """Whether the node puts an axis of size 1 in front of a tensor of this rank, perhaps with others behind it."""
    if operator(node) == "Unsqueeze":
        axes = axes_of(graph, node)
        return 0 in axes and min(axes) == 0
    target = graph.constant(node.input[1]) if operator(node) == "Reshape" else None
    return target is not None and target.size > rank and bool(target[0] == 1)


def _change(graph: Graph, node: onnx.NodeProto, rank: int) -> None:
    """With the axis an Unsqueeze adds only the other ones, and a Transpose leaves it where it is."""
    if node.op_type == "Transpose":
        order = attribute(node, "perm", [*reversed(range(rank))])
        drop_attributes(node, "perm")
        node.attribute.append(onnx.helper.make_attribute("perm", [0, *(axis + 1 for axis in order)]))
        return
    others = sorted(axes_of(graph, node))[1:]
    if others:
        set_axes(graph, node, others)
    else:
        node.op_type = "Identity"
        drop_attributes(node, "axes")
        del node.input[1:]


def _shape(model: onnx.ModelProto, name: str) -> onnx.TensorShapeProto:
    return next(info.type.tensor_type.shape for info in model.graph.input if info.name == name)


def _is_small(graph: Graph, name: str, rank: int) -> bool:
    """Whether it is a constant that adds no axis to a tensor of this rank."""
    value = graph.constant(name)
    return value is not None and value.ndim <= rank


def _same(model: onnx.ModelProto, changed: onnx.ModelProto, names: Set[str]) -> bool:
    """Whether both make the same of a sample."""
    rng = np.random.default_rng(0)
    try:
        feed = {spec.name: spec.draw(spec.batch or 1, rng) for spec in find_inputs(Graph(changed), Config())}
        single = {name: value[0] if name in names else value for name, value in feed.items()}
        pairs = zip(run(open_session(model), single), run(open_session(changed), feed), strict=True)
        return all(_close(*pair) for pair in pairs)
    except (ModelError, OptionError):
        return False


def _close(first: Array, second: Array) -> bool:
    if first.shape != second.shape or first.dtype.kind != "f":
        return bool(np.array_equal(first, second))
    return np.allclose(first, second, rtol=0, atol=TOLERANCE * float(np.abs(first).max(initial=0)), equal_nan=True)
