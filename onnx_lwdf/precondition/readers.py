"""How strongly what reads a channel group answers to an error of each channel.

Where the gradients of the model's outputs are known (gradients.py), with their second moment S. Elsewhere a layer answers with
its squared weights, S = W^T W in units of its output's power; a gate with the squared slope of its f, times the squared weights
of the layers behind; where f is flat, as h-swish is below -3, it does not answer at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lwdf.activations.taps import Samples
from onnx_lwdf.gates import Span, reach, response
from onnx_lwdf.gradients import Sensitivities, strengths
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, Layer, output_channels, weight_of
from onnx_lwdf.precondition.channels import ChannelGroup, excited
from onnx_lwdf.ranges import F64
from onnx_lwdf.sites import JOIN_BITS
from onnx_lwdf.solvers.problem import apart
from onnx_lwdf.statistics import Statistics

LEAST_POWER = 1e-30  # of outputs, on any scale that a network has
STILL = 1e-12  # of outputs' mean squared is their variance, or less: float32 holds no more digits, they never vary
# An error of a weight is alike from position to position, and the outputs add it up; S knows errors that are independent there.
ALIKE = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    """To errors of one tensor that has a grid."""

    tensor: str
    bits: int  # of the grid
    sensitivity: F64  # S, [channels, channels], or its diagonal, [channels]
    values: np.ndarray  # samples of it, [channels, values]

    @property
    def strength(self) -> F64:
        """The diagonal of S, [channels]."""
        return strengths(self.sensitivity)

    @property
    def matrix(self) -> F64:
        """S, [channels, channels]."""
        return np.diag(self.sensitivity) if self.sensitivity.ndim == 1 else self.sensitivity


@dataclass(frozen=True, slots=True)
class Answers:
    """To all errors that a transform of a channel group may change."""

    sites: tuple[Answer, ...]
    readers: Mapping[str, F64]  # layer that reads the group -> to errors of its weight, [out of all groups]
    writers: Mapping[str, F64]  # layer that writes it -> to errors of its weight, S or its diagonal at its output
    at_outputs: bool  # of the model, by gradients; else of the readers


@dataclass(frozen=True, slots=True)
class Gated:
    """What is known of the tensors beside gates."""

    readings: Mapping[str, F64]  # tensor -> [channels]: what an error adds to the outputs of the layers behind its gate
    spans: Mapping[str, Span]  # tensor -> what its channels may reach, as far as its gate tells it apart


def answers_to(
    graph: Graph,
    group: ChannelGroup,
    plan: Mapping[str, Bits],
    samples: Samples,
    gated: Gated,
    gradients: Sensitivities,
) -> Answers:
    """By the gradients, where all that the group's errors need are known."""
    if known := _with_gradients(group, samples, gradients):
        bits = {layer.input: plan[layer.name].activation for layer in group.consumers}
        return Answers(
            tuple(Answer(name, bits.get(name) or JOIN_BITS, gradients[name], samples.values[name]) for name in known),
            {layer.name: ALIKE * strengths(gradients[layer.output]) for layer in group.consumers},
            {layer.name: ALIKE * gradients[layer.output] for layer in group.producers},
            at_outputs=True,
        )
    sites, readers = [], {}
    total = np.zeros((group.channels,) * 2 if group.mixed else group.channels)
    for layer in group.consumers:
        energy = inverse_power(graph, layer, samples)
        if group.mixed:
            weight = by_channel(weight_of(graph, layer), group.channels)  # [rows, channels]
            sensitivity = weight.T @ weight * energy
            total += sensitivity
        else:
            sensitivity = _squared_weights(graph, layer, samples) * energy
            total += group.spread(layer.input, sensitivity)
        sites.append(Answer(layer.input, plan[layer.name].activation or 8, sensitivity, samples.values[layer.input]))
        readers[layer.name] = np.full(output_channels(graph, layer), energy)
    for name in (name for name in group.tensors if name in gated.readings):
        sites.append(Answer(name, JOIN_BITS, gated.readings[name], gated.spans[name].clip(samples.values[name])))
        total += group.spread(name, gated.readings[name])
    writers = {layer.name: total[group.place(layer.output)] for layer in group.producers}
    return Answers(tuple(sites), readers, writers, at_outputs=False)


def _with_gradients(group: ChannelGroup, samples: Samples, gradients: Sensitivities) -> list[str]:
    """The group's tensors that have a grid, where all gradients that its errors need are known; else none."""
    inputs = [layer.input for layer in group.consumers]
    needed = [*inputs, *(layer.output for layer in (*group.consumers, *group.producers))]
    if group.written or group.read or any(name not in gradients for name in needed):
        return []
    known = [name for name in group.tensors if name in gradients]
    if any(len(gradients[name]) != len(group.numbers(name)) for name in known):
        return []
    sampled = [name for name in known if name in samples.values]
    return sampled if group.linear or not group.plain else list(dict.fromkeys(inputs))


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
        energy = np.full(len(answer.slope), 1 / max(answer.power, LEAST_POWER))
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
        energy = _squared_weights(graph, layer, samples) * inverse_power(graph, layer, samples)
        total += group.spread(layer.input, energy)
    return total


def _squared_weights(graph: Graph, layer: Layer, samples: Samples) -> F64:
    """That read each channel of the layer's input, summed, [channels]."""
    weight = by_channel(weight_of(graph, layer), len(samples.values[layer.input]))
    return np.asarray((weight**2).sum(0))


def by_channel(weight: F64, channels: int) -> F64:
    """A canonical weight [groups, out, in] as [rows, channels]: one column per input channel; groups are disjoint."""
    groups, out, _ = weight.shape
    split = weight.reshape(groups, out, -1, channels // groups)  # [groups, out, kernel, channels / groups]
    if groups == 1:
        return split.reshape(-1, channels)
    return split.transpose(1, 2, 0, 3).reshape(-1, channels)


def inverse_power(graph: Graph, layer: Layer, samples: Samples) -> float:
    """1 / E |W x|^2 of the layer around its mean, to weigh layers against each other; 0 of one whose outputs never vary."""
    moments = samples.moments[layer.name]
    weight = apart(weight_of(graph, layer), moments.blocks)
    centered = moments.hessian - moments.mean[:, :, None] * moments.mean[:, None, :]
    power = float(np.einsum("goi,goi->", weight @ centered, weight))
    constant = float(((weight @ moments.mean[:, :, None]) ** 2).sum())
    return 1 / power if power > max(STILL * constant, LEAST_POWER) else 0.0
