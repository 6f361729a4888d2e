"""Every channel group gets the transform of the least predicted error, if that is clearly below what it has.

The candidates (candidates.py) are tried on the samples, in graph order; the identity is always among them. What is chosen is
written into weights and biases (transform.py), and the samples, statistics and gradients follow it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from onnx_lwdf.activations.taps import Samples
from onnx_lwdf.gradients import Sensitivities
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, Layer
from onnx_lwdf.precondition.bounds import Range
from onnx_lwdf.precondition.candidates import candidates
from onnx_lwdf.precondition.channels import ChannelGroup
from onnx_lwdf.precondition.prediction import predicted_error
from onnx_lwdf.precondition.readers import answers_to, beside_gates
from onnx_lwdf.precondition.transform import apply, diagonal
from onnx_lwdf.solvers.gptq import conditional_variances
from onnx_lwdf.statistics import Statistics

CLEAR_GAIN = 0.97  # a transform must lower the predicted error by more than the prediction's own noise


def transform_groups(
    graph: Graph,
    groups: Sequence[ChannelGroup],
    plan: Mapping[str, Bits],
    samples: Samples,
    statistics: Statistics,
    gradients: Sensitivities = MappingProxyType({}),
    pixels: Mapping[str, Range] = MappingProxyType({}),
) -> tuple[Samples, Statistics, Sensitivities]:
    """Transform every channel group where that lowers the predicted error; the samples, statistics and gradients with it.

    `pixels`: tensors that carry the pixels of images -> their range.
    """
    gated = beside_gates(graph, groups, samples, statistics)
    for group in groups:
        if any(plan[layer.name].activation is None for layer in _gridded(group)):
            continue
        if not (group.consumers or group.norms_read or any(gate.input in gated.readings for gate in group.read)):
            continue
        answers = answers_to(graph, group, plan, samples, gated, gradients)
        others = candidates(graph, group, samples, answers, gated.spans, statistics, pixels)
        if not others:
            continue
        tried = [diagonal(np.ones(group.channels)), *others]
        importance = {
            layer.name: conditional_variances(samples.moments[layer.name].hessian).reshape(layer.groups, -1)
            for layer in group.producers
        }
        errors = [predicted_error(graph, group, plan, samples, answers, gated.spans, importance, one) for one in tried]
        best = int(np.argmin(errors))
        if best and errors[best] < CLEAR_GAIN * errors[0]:
            chosen = tried[best]
            samples = apply(graph, group, samples, chosen)
            statistics = chosen.statistics(statistics, group)
            inside = gradients.keys() & set(group.tensors)
            seen = {name: chosen.of(group.place(name)).gradient(gradients[name]) for name in inside}
            gradients = {**gradients, **seen}
    return samples, statistics, gradients


def _gridded(group: ChannelGroup) -> list[Layer]:
    """The layers whose plan says whether the group's tensors have grids: its readers, or its writers where a gate reads."""
    return [*group.consumers, *(group.producers if group.read else ())]
