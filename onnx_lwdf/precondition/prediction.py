"""The error that a transform of a channel group is predicted to leave.

Activations are put on the grid of least error, weights are rounded to second order (gptq.py), and each error is counted by how
strongly what follows answers to it (readers.py):

    sum over tensors with a grid    tr(S A^-1 E[(q(A t) - A t)(q(A t) - A t)^T] A^-T)    of which the diagonals are counted,
    sum over readers of A t         rounding error of W A^-1 on the inputs A t, by output channels,
    sum over writers of A t         rounding error of A W, by channels of the group.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_lwdf.activations.taps import Samples
from onnx_lwdf.gates import Span
from onnx_lwdf.gradients import strengths
from onnx_lwdf.graph import Graph
from onnx_lwdf.grid import nearest, search_weight_grid
from onnx_lwdf.layers import ALL, Bits, Layer, shape_of, vectors_of, weight_of
from onnx_lwdf.precondition.channels import ChannelGroup
from onnx_lwdf.precondition.readers import Answers
from onnx_lwdf.precondition.transform import Transform
from onnx_lwdf.ranges import ActivationGrid, grid_for, search_grid
from onnx_lwdf.solvers.gptq import conditional_variances
from onnx_lwdf.solvers.problem import F64

MOST_ROWS = 64  # of a weight, for the prediction


def predicted_error(
    graph: Graph,
    group: ChannelGroup,
    plan: Mapping[str, Bits],
    samples: Samples,
    answers: Answers,
    spans: Mapping[str, Span],
    importance: Mapping[str, F64],
    transform: Transform,
) -> float:
    """In the units of the answers: of the power of the model's outputs, or of the readers'.

    importance: layer that writes the group -> conditional variances of its inputs, which no transform of its outputs changes.
    """
    total = 0.0
    for site in answers.sites:
        part = transform.of(group.place(site.tensor))
        energy = strengths(part.gradient(site.sensitivity))
        values = part.values(site.values, site.tensor)
        grid = _grid(values, energy, site.bits, spans.get(site.tensor), part)
        total += float(((grid.quantize(values) - values) ** 2).mean(1) @ energy)
    for layer in group.consumers:
        part = transform.of(group.place(layer.input))
        inputs = conditional_variances(part.moments(samples.moments[layer.name], layer.input).hessian)
        some, out = _some(graph, layer)
        rows = part.reader(weight_of(graph, layer, some))
        error = _rounding(layer, rows, out, inputs.reshape(layer.groups, -1), plan[layer.name])
        total += float(error.ravel() @ answers.readers[layer.name])
    for layer in group.producers:
        part = transform.of(group.place(layer.output))
        some, out = _some(graph, layer)
        rows = part.writer(weight_of(graph, layer, ALL if part.matrix.ndim > 1 else some), some)
        error = _rounding(layer, rows, out, importance[layer.name], plan[layer.name])
        total += float(error.ravel() @ strengths(part.gradient(answers.writers[layer.name])))
    return total


def _grid(values: F64, energy: F64, bits: int, span: Span | None, transform: Transform) -> ActivationGrid:
    """The grid over what the transformed channels may reach, else that of the least error on these values."""
    if span is None or bits < 8:
        return search_grid(values.ravel(), np.repeat(energy, values.shape[1]), bits)
    factor = transform.matrix  # a diagonal: beside a gate channels are not mixed
    return grid_for(float((factor * span.low).min()), float((factor * span.high).max()), bits)


def _some(graph: Graph, layer: Layer) -> tuple[slice, int]:
    """Output channels of each group that stand for all, and how many there are."""
    out = shape_of(graph, layer)[1]
    return slice(None, None, max(1, -(-out // MOST_ROWS))), out


def _rounding(layer: Layer, rows: F64, out: int, importance: F64, bits: Bits) -> F64:
    """Predicted loss of every output channel, [groups, out], by second-order rounding; at 8 bits where it stays float.

    rows [groups, some of out, in] of the weight, whose mean stands for the others; importance [groups, in]: the conditional
    variances of what the weight reads.
    """
    runs, floor = vectors_of(layer, rows.shape[-1] // layer.kernel_size, bits), np.zeros(rows.shape[:2])
    grid = search_weight_grid(rows, importance, bits.weight or 8, None, floor, runs)
    error = np.einsum("goi,gi->go", (nearest(rows, grid) * grid.step - rows) ** 2, importance)
    return error if rows.shape[1] == out else np.broadcast_to(error.mean(1, keepdims=True), (len(rows), out))
