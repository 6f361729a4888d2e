"""How strongly the model's outputs answer to a small error of any inner tensor.

For a tensor t, with v drawn from N(0, I) at the outputs, each output in units of its own power,

    S = E[sum over positions of g g^T],    g = J^T v,    J the derivative of the outputs by t,

[channels, channels] is the mean over images; of tensors whose channels are not mixed its diagonal is enough. An error of t
that is white over positions, with covariance D over channels, shows at the outputs as tr(S D), in units of their power (the
output side of K-FAC: Martens and Grosse, arXiv 1503.05671).

The backward pass is an ONNX graph of its own (`backward.py`), with a rule for each operator (`derivatives.py`). In front of
an operator without one (LSTM), its input counts as an output. Where a form of an operator is not known, what stands in front
of it has no S, and callers fall back on what they know of the next layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence, Set

import numpy as np
import onnx

from onnx_lwdf.activations.taps import Align, Feed, samples_in
from onnx_lwdf.backward import Backward
from onnx_lwdf.derivatives import RULES
from onnx_lwdf.errors import ModelError
from onnx_lwdf.graph import Graph
from onnx_lwdf.runtime import copy_of, open_session, run, trim
from onnx_lwdf.statistics import F64, Statistics

IMAGES, CHUNK = 64, 8  # in all, and at a time: gradients of all layers are alive at once

Sensitivities = Mapping[str, F64]  # tensor -> S, [channels, channels], or its diagonal, [channels]

log = logging.getLogger(__name__)


def sensitivities(
    model: onnx.ModelProto,
    tensors: Iterable[str],
    mixed: Set[str],
    rows: Set[str],
    chunks: Sequence[Feed],
    rng: np.random.Generator,
    statistics: Statistics,
    align: Align | None,
) -> dict[str, F64]:
    """Tensor -> S, of those of these tensors of which it is known.

    mixed: tensors of which all of S is wanted, not the diagonal. rows: those whose channels run along the last axis.
    `statistics`, `align`: as for the samples; the slopes are taken where the samples are.
    """
    feeds = _feeds(chunks)
    try:
        backward = Backward(Graph(copy_of(model)), feeds[0], statistics, align, RULES)
        wanted = backward.finish(tensors, mixed, rows)
        session = open_session(backward.graph.model, arena=False)
        inputs = {value.name for value in session.get_inputs()}
        names = list(wanted.values())
        sums: dict[str, F64] = {}
        for feed in feeds if names else ():
            given = {**feed, **backward.draw(rng)}
            answers = run(session, {name: value for name, value in given.items() if name in inputs}, names)
            for tensor, answer in zip(wanted, answers, strict=True):
                sums[tensor] = sums.get(tensor, 0.0) + answer.astype(np.float64)
        sums = {tensor: total if tensor in mixed else total.ravel() for tensor, total in sums.items()}
    except ModelError as error:  # an unusual graph: what follows does without
        log.debug("no gradients: %s", error)
        return {}
    trim()
    count = sum(samples_in(feed) for feed in feeds)
    return {tensor: total / count for tensor, total in sums.items() if np.isfinite(total).all() and total.any()}


def strengths(sensitivity: F64) -> F64:
    """The diagonal of S, [channels]."""
    return sensitivity if sensitivity.ndim == 1 else np.diagonal(sensitivity)


def _feeds(chunks: Sequence[Feed]) -> list[Feed]:
    """The first images, in chunks of one small size."""
    size = min(CHUNK, samples_in(chunks[0]))
    parts: list[Feed] = [
        {name: value[start : start + size] if value.ndim else value for name, value in chunk.items()}
        for chunk in chunks
        for start in range(0, samples_in(chunk) - size + 1, size)
    ]
    return parts[: max(1, IMAGES // size)]
