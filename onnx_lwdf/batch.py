"""A model that was exported for a fixed number of samples takes any number while it is compressed.

Statistics are made of batches, and the usual export fixes the batch at 1. So the first axis of inputs, outputs and inner
tensors is freed where it has that size, and the first element of the constant shape of a Reshape with it. A batch of one
that is dropped (a Squeeze of the first axis, a Gather of its only element) stays meanwhile. Whether the function is still
the same, sample by sample, is tried; where it is not, the model keeps its batch and is run as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_lwdf.activations.inputs import InputSpec
from onnx_lwdf.errors import ModelError
from onnx_lwdf.graph import Graph, attribute, axes_of, operator, set_axes
from onnx_lwdf.runtime import Array, copy_of, open_session, run

TOLERANCE = (
    1e-3  # of the largest output: float32 sums in another order differ by far less, another function by far more
)


@dataclass(frozen=True, slots=True, eq=False)
class Dropped:
    """A node that drops the batch's axis, or gives it back, as it was."""

    node: onnx.NodeProto
    constant: Array | None  # its second input


@dataclass(frozen=True, slots=True, eq=False)
class FixedBatch:
    """What was freed, to be fixed again."""

    size: int
    tensors: frozenset[str]  # whose first axis has this size
    targets: frozenset[str]  # constant shapes whose first element was this size
    dropped: Mapping[str, Dropped]  # by the name that the node has meanwhile
    declared: Sequence[onnx.ValueInfoProto]  # sizes of outputs and inner tensors, unknown while the batch's axis stays


def free_batch(graph: Graph, inputs: Sequence[InputSpec]) -> FixedBatch | None:
    """Let the graph take any number of samples; None, and the graph as it was, where that is not needed or not possible."""
    sizes = {spec.batch for spec in inputs}
    size = sizes.pop() if len(sizes) == 1 else None
    if not size:
        return None
    ways = (False, True) if size == 1 else (False,)
    return next(filter(None, (_freed(graph, inputs, size, keep_axis) for keep_axis in ways)), None)


def _freed(graph: Graph, inputs: Sequence[InputSpec], size: int, keep_axis: bool) -> FixedBatch | None:
    """One way to free it; the graph as it was where that is another function."""
    original = copy_of(graph.model)
    dropped = _keep_axis(graph) if keep_axis else {}
    if keep_axis and not dropped:
        return None
    declared = [*original.graph.output, *original.graph.value_info] if dropped else []
    _forget({info.name for info in declared}, graph.model)
    free = {info.name for info in _infos(graph.model) if _fixed(info, size)}
    fixed = FixedBatch(size, frozenset(free), frozenset(_free_targets(graph, size)), dropped, declared)
    graph.commit()
    for info in _infos(graph.model):
        if info.name in free:
            info.type.tensor_type.shape.dim[0].Clear()
    if _same(original, graph.model, size, inputs):
        return fixed
    graph.restore(original)
    return None


def fix_batch(graph: Graph, fixed: FixedBatch) -> None:
    """Give the graph back the batch that it had."""
    for name in fixed.targets & set(graph.initializers):
        value = np.array(graph.constant(name))
        value[0] = fixed.size
        graph.overwrite(name, value)
    for node in graph.nodes:
        if node.name in fixed.dropped:
            _restore(graph, node, fixed.dropped[node.name])
    graph.commit()
    declared = {info.name: info for info in fixed.declared}
    for info in _infos(graph.model):
        if info.name in declared:
            info.CopyFrom(declared[info.name])
    for info in _infos(graph.model):
        if info.name in fixed.tensors and info.type.tensor_type.shape.dim:
            info.type.tensor_type.shape.dim[0].dim_value = fixed.size


def _keep_axis(graph: Graph) -> dict[str, Dropped]:
    """Let the batch's axis stay where a node drops it, and be no new one where that is given back; the nodes as they were."""
    dropped: dict[str, Dropped] = {}
    bare: set[str] = set()  # tensors that had no axis of the batch
    sizes: set[str] = set()  # of tensors: what Shape puts out, and what is made of that
    for node in graph.nodes:
        read = {name for name in node.input if name and graph.constant(name) is None}
        if operator(node) == "Shape" or (read and read <= sizes):
            sizes.update(node.output)
            continue
        drops, gives = _drops(graph, node), _gives(graph, node) and node.input[0] in bare
        if drops is None and not gives:
            bare.update(node.output if bare.intersection(node.input) else ())
            continue
        name = graph.unique("batch")
        constant = graph.constant(node.input[1]) if len(node.input) > 1 else None
        dropped[name] = Dropped(onnx.NodeProto.FromString(node.SerializeToString()), constant)
        node.name = name
        if drops:
            set_axes(graph, node, drops)
        else:
            node.op_type = "Identity"
            del node.attribute[:]
            del node.input[1:]
        bare.update(() if gives else node.output)
    return dropped


def _drops(graph: Graph, node: onnx.NodeProto) -> list[int] | None:
    """The other axes that a node drops which drops the first; None where that stays."""
    if graph.constant(node.input[0] if node.input else "") is not None:
        return None
    if operator(node) == "Squeeze":
        axes = axes_of(graph, node)
        return [axis for axis in axes if axis] if 0 in axes else None
    if operator(node) == "Gather" and attribute(node, "axis", 0) == 0:
        index = graph.constant(node.input[1])
        return [] if index is not None and index.ndim == 0 and index == 0 else None
    return None


def _gives(graph: Graph, node: onnx.NodeProto) -> bool:
    return operator(node) == "Unsqueeze" and axes_of(graph, node) == [0]


def _restore(graph: Graph, node: onnx.NodeProto, dropped: Dropped) -> None:
    was = dropped.node
    node.op_type, node.name = was.op_type, was.name
    del node.attribute[:]
    node.attribute.extend(was.attribute)
    del node.input[1:]
    if dropped.constant is not None:
        node.input.append(graph.shared_constant(dropped.constant))


def _forget(names: Iterable[str], model: onnx.ModelProto) -> None:
    """No sizes of these tensors."""
    for info in _infos(model):
        if info.name in names:
            info.type.tensor_type.ClearField("shape")


def _infos(model: onnx.ModelProto) -> Iterator[onnx.ValueInfoProto]:
    yield from model.graph.input
    yield from model.graph.output
    yield from model.graph.value_info


def _fixed(info: onnx.ValueInfoProto, size: int) -> bool:
    dims = info.type.tensor_type.shape.dim
    return len(dims) > 0 and dims[0].dim_value == size


def _free_targets(graph: Graph, size: int) -> Iterator[str]:
    """Free the shapes of Reshapes; their names."""
    for node in graph.nodes:
        if operator(node) != "Reshape" or len(node.input) < 2 or attribute(node, "allowzero", 0):
            continue
        target = graph.constant(node.input[1])
        if target is None or graph.constant(node.input[0]) is not None or target.size < 2 or target[0] != size:
            continue
        value = np.array(target)
        value[0] = 0 if -1 in value else -1  # 0: as the input has
        graph.set_input(node, 1, value, node.input[1])
        yield node.input[1]


def _same(original: onnx.ModelProto, freed: onnx.ModelProto, size: int, inputs: Sequence[InputSpec]) -> bool:
    """Whether two batches one after the other give what they give together."""
    rng = np.random.default_rng(0)
    pair = [{spec.name: spec.draw(size, rng) for spec in inputs} for _ in range(2)]
    try:
        parts = _outputs(original, pair)
        (together,) = _outputs(freed, [{name: np.concatenate([feed[name] for feed in pair]) for name in pair[0]}])
    except ModelError:
        return False
    return all(_close(a, b, both) for a, b, both in zip(*parts, together, strict=True))


def _outputs(model: onnx.ModelProto, feeds: Sequence[Mapping[str, Array]]) -> list[list[Array]]:
    session = open_session(model, arena=False)
    return [run(session, feed) for feed in feeds]


def _close(first: Array, second: Array, both: Array) -> bool:
    if first.ndim and both.shape == (2 * len(first), *first.shape[1:]):
        expected = np.concatenate([first, second])
    elif both.shape == (2, *first.shape):  # the batch's axis was dropped
        expected = np.stack([first, second])
    else:
        return False
    if expected.dtype.kind != "f":
        return bool((expected == both).all())
    largest = float(np.abs(expected).max(initial=0))
    return bool(np.isfinite(largest)) and np.allclose(expected, both, rtol=0, atol=TOLERANCE * largest)
