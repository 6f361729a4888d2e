"""How strongly what reads a channel group answers to an error of each channel.

A layer answers with its squared weights. A gate answers with the squared slope of its f, times the squared weights of the
layers behind; where f is flat, as h-swish is below -3, it does not answer at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lwdf.activations.taps import Samples
from onnx_lwdf.gates import Span, reach, response
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Layer, weight_of
from onnx_lwdf.precondition.channels import ChannelGroup, excited
from onnx_lwdf.ranges import F64
from onnx_lwdf.statistics import Statistics

TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, slots=True)
class Gated:
    """What is known of the tensors beside gates."""

    readings: Mapping[str, F64]  # tensor -> [channels]: what an error adds to the outputs of the layers behind its gate
    spans: Mapping[str, Span]  # tensor -> what its channels may reach, as far as its gate tells it apart


def beside_gates(graph: Graph, groups: Sequence[ChannelGroup], samples: Samples, statistics: Statistics) -> Gated:
    """Of all tensors in groups beside gates that were sampled; those with a grid are."""
    behind = {gate.output: group for group in groups for gate in group.written}
    readings: dict[str, F64] = {}
    spans: dict[str, Span] = {}
    for group in groups:
        for name in group.tensors if group.written or group.read else ():
            if name in samples.values:
                spans[name] = reach(samples.values[name], statistics.get(name))
    for gate in (gate for group in groups for gate in group.read if gate.input in samples.values):
        answer = response(graph, gate, samples.values[gate.input], statistics.get(gate.input))
        readers = behind.get(gate.output)
        known = readers is not None and readers.consumers
        energy = np.full(len(answer.slope), 1 / max(answer.power, TINY))
        if readers is not None and known:
            energy = read_energy(graph, readers, samples)[readers.place(gate.output)]
        readings[gate.input] = answer.slope * energy
        spans[gate.input] = answer.input
        if gate.output in spans:
            spans[gate.output] = answer.output
        # What excites a channel is a Sigmoid or its like, at most 1; synthetic images excite less than real ones.
        excited_by = [node.output[0] for node in graph.consumers[gate.output] if excited(graph, node) == gate.output]
        spans.update({name: spans[name].joined(answer.output) for name in excited_by if name in spans})
    return Gated(readings, spans)


def read_energy(graph: Graph, group: ChannelGroup, samples: Samples) -> F64:
    """[channels]: what an error adds to the outputs of the layers that read the group, to their power, summed over them."""
    total = np.zeros(group.channels)
    for layer in group.consumers:
        weight = by_channel(weight_of(graph, layer), len(samples.values[layer.input]))
        total += group.spread(layer.input, (weight**2).sum(0) / output_power(graph, layer, samples))
    return total


def by_channel(weight: F64, channels: int) -> F64:
    """A canonical weight [groups, out, in] as [rows, channels]: one column per input channel; groups are disjoint."""
    groups, out, _ = weight.shape
    split = weight.reshape(groups, out, -1, channels // groups)  # [groups, out, kernel, channels / groups]
    if groups == 1:
        return split.reshape(-1, channels)
    return split.transpose(1, 2, 0, 3).reshape(-1, channels)


def output_power(graph: Graph, layer: Layer, samples: Samples) -> float:
    """E |W x|^2 of the layer around its mean, to weigh layers against each other."""
    moments, weight = samples.moments[layer.name], weight_of(graph, layer)
    centered = moments.hessian - moments.mean[:, :, None] * moments.mean[:, None, :]
    return float(max(np.einsum("goi,goi->", weight @ centered, weight), TINY))
