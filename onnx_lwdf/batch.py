"""A model that was exported for a fixed number of samples takes any number while it is compressed.

Statistics are made of batches, and the usual export fixes the batch at 1. So the first axis of inputs, outputs and inner
tensors is freed where it has that size, and the first element of the constant shape of a Reshape with it. Whether the
function is still the same, sample by sample, is tried; where it is not, the model keeps its batch and is run as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_lwdf.activations.inputs import InputSpec
from onnx_lwdf.errors import ModelError
from onnx_lwdf.graph import Graph, attribute, operator
from onnx_lwdf.runtime import Array, copy_of, open_session, run

TOLERANCE = (
    1e-3  # of the largest output: float32 sums in another order differ by far less, another function by far more
)


@dataclass(frozen=True, slots=True)
class FixedBatch:
    """What was freed, to be fixed again."""

    size: int
    tensors: frozenset[str]  # whose first axis has this size
    targets: frozenset[str]  # constant shapes whose first element was this size


def free_batch(graph: Graph, inputs: Sequence[InputSpec]) -> FixedBatch | None:
    """Let the graph take any number of samples; None, and the graph as it was, where that is not needed or not possible."""
    sizes = {spec.batch for spec in inputs}
    size = sizes.pop() if len(sizes) == 1 else None
    if not size:
        return None
    original = copy_of(graph.model)
    free = {info.name for info in _infos(graph.model) if _fixed(info, size)}
    fixed = FixedBatch(size, frozenset(free), frozenset(_free_targets(graph, size)))
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
    graph.commit()
    for info in _infos(graph.model):
        if info.name in fixed.tensors and info.type.tensor_type.shape.dim:
            info.type.tensor_type.shape.dim[0].dim_value = fixed.size


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
    if not first.ndim or both.shape != (2 * len(first), *first.shape[1:]):
        return False
    expected = np.concatenate([first, second])
    if expected.dtype.kind != "f":
        return bool((expected == both).all())
    largest = float(np.abs(expected).max(initial=0))
    return bool(np.isfinite(largest)) and np.allclose(expected, both, rtol=0, atol=TOLERANCE * largest)
