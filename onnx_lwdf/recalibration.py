"""Every channel of the compressed network gets back the mean and the deviation that it has in the float network.

Layers are solved on their own, on float inputs. Behind many of them errors add up, and the channels' distributions
drift. With real data one would estimate the BatchNormalizations anew; here both networks run on the same samples, each
with its channels normalized behind every layer, so that a layer meets inputs whose means and deviations were put right
already. From the mean m and variance v of what the layer puts out, float (f) and compressed (c),

    y' = a y + m_f - a m_c,    a = sqrt(v_f / v_c)

which moves into the layer: its scales and values times a, its bias a b + m_f - a m_c. Layers that have the same floats
(sharing.py) have one a, the geometric mean of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx
import onnxruntime as ort

from onnx_lwdf.activations.aligned import NO_POWER, batch_statistics, dead_power, normalize
from onnx_lwdf.activations.taps import Feed, tensor_shapes
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import change_weight, find_layers, set_bias
from onnx_lwdf.layerwise import Solved
from onnx_lwdf.runtime import Array, open_session, run
from onnx_lwdf.sharing import readers
from onnx_lwdf.statistics import F64, Statistics

FEWEST_POSITIONS = 4  # of one sample: the deviation of a few values says nothing
MOST_CHANGED = 2.0  # of a deviation, up or down: beyond, the channel is noise
DEAD = 1e-6  # of the mean square: a smaller variance is float32's rounding


@dataclass(frozen=True, slots=True)
class _Pass:
    """One network with the statistics of its layers as outputs."""

    model: onnx.ModelProto
    measured: Mapping[str, tuple[str, str]]  # tensor -> the tensors that hold its mean and variance
    fed: Mapping[str, tuple[str, str]]  # tensor -> the inputs that say what mean and deviation it goes on with


def recalibrate(
    graph: Graph,
    solved: Sequence[Solved],
    statistics: Statistics,
    chunks: Sequence[Feed],
    codes: Mapping[str, str] = MappingProxyType({}),
) -> list[Solved]:
    """The answers with every convolution's channels as they are in the float network. `graph` holds that, unchanged.

    `statistics` are what tensors of the float network are known to have; the others have what they have on the chunks.
    `codes`: layer name -> the layer whose codes or floats it has.
    """
    inner = [answer.layer for answer in solved if answer.layer.window and answer.layer.output not in graph.outputs]
    known = {name: value for name, value in statistics.items() if name not in graph.outputs}
    shapes = tensor_shapes(graph.snapshot(), [*(layer.output for layer in inner), *known], chunks[0])
    chosen = [layer.output for layer in inner if math.prod(shapes[layer.output][2:]) >= FEWEST_POSITIONS]
    if not chosen:
        return list(solved)
    ranks = {name: len(shape) for name, shape in shapes.items()}
    exact = _pass(graph, chosen, ranks, known, fed=False)
    compressed = _pass(_compressed(graph, solved), chosen, ranks, known, fed=True)
    before, after = _totals(exact, compressed, chunks)
    factors = {
        name: _factor(*before[tensor], *after[tensor])
        for name, tensor in ((answer.layer.name, answer.layer.output) for answer in solved)
        if tensor in before
    }
    for same in readers([answer.layer for answer in solved if answer.solution.rounding is None], codes):
        if len(same) > 1:
            own = [factors[layer.name] for layer in same if layer.name in factors]
            common = np.exp(np.mean(np.log(own), axis=0)) if len(own) == len(same) else np.ones(1)
            factors |= dict.fromkeys((layer.name for layer in same if layer.name in factors), common)

    def changed(answer: Solved) -> Solved:
        name, tensor = answer.layer.name, answer.layer.output
        if name not in factors:
            return answer
        (mean, _), (mean_now, _) = before[tensor], after[tensor]
        factor = np.broadcast_to(factors[name], mean.shape)
        return answer.scaled(factor, mean - factor * mean_now)

    return [changed(answer) for answer in solved]


def _compressed(graph: Graph, solved: Sequence[Solved]) -> Graph:
    """A copy of the float network with the solved weights, activations in float."""
    twin = graph.twin()
    twins = {layer.name: layer for layer in find_layers(twin)[0]}
    for answer in solved:
        change_weight(twin, twins[answer.layer.name], answer.solution.of)
        set_bias(twin, twins[answer.layer.name], answer.bias)
    return twin.twin()


def _pass(graph: Graph, chosen: Sequence[str], ranks: Mapping[str, int], known: Statistics, fed: bool) -> _Pass:
    """The network with every chosen or known tensor normalized; where nothing is known, to what `fed` inputs say."""
    probe = graph.twin()
    measured: dict[str, tuple[str, str]] = {}
    inputs: dict[str, tuple[str, str]] = {}
    for tensor in dict.fromkeys([*chosen, *known]):
        readers = list(probe.consumers[tensor])
        mean, variance = batch_statistics(probe, tensor, ranks[tensor])
        if tensor in chosen:
            measured[tensor] = mean, variance
        if tensor in known:
            dead = dead_power(known[tensor])
            shift = probe.add_constant("recalibration.mean", known[tensor].mean.astype(np.float32))
            scale = probe.add_constant("recalibration.deviation", known[tensor].deviation.astype(np.float32))
        elif fed:
            dead = NO_POWER
            shift, scale = inputs[tensor] = probe.unique("recalibration.mean"), probe.unique("recalibration.deviation")
        else:
            continue  # the float network goes on as it is
        probe.reroute(readers, tensor, normalize(probe, tensor, mean, variance, shift, scale, dead))
    model = probe.model
    probe.set_outputs(name for pair in measured.values() for name in pair)
    for pair in inputs.values():
        for name in pair:
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]))
    probe.commit()
    return _Pass(model, measured, inputs)


Totals = Mapping[str, tuple[F64, F64]]  # tensor -> mean and variance [channels], over the chunks


def _totals(exact: _Pass, compressed: _Pass, chunks: Sequence[Feed]) -> tuple[Totals, Totals]:
    """Of both networks, one after the other: two sessions at a time would hold twice the activations."""
    session = open_session(exact.model, arena=False)
    found = [_measure(session, exact, chunk) for chunk in chunks]
    targets = [_targets(compressed, one) for one in found]
    del session
    session = open_session(compressed.model, arena=False)
    feeds = ({**chunk, **target} for chunk, target in zip(chunks, targets, strict=True))
    return _mean(found), _mean([_measure(session, compressed, feed) for feed in feeds])


def _targets(compressed: _Pass, found: Totals) -> dict[str, Array]:
    values: dict[str, Array] = {}
    for tensor, (shift, scale) in compressed.fed.items():
        mean, variance = found[tensor]
        values |= {shift: mean.astype(np.float32), scale: np.sqrt(variance).astype(np.float32)}
    return values


def _mean(parts: Sequence[Totals]) -> Totals:
    return {
        name: (np.mean([part[name][0] for part in parts], axis=0), np.mean([part[name][1] for part in parts], axis=0))
        for name in parts[0]
    }


def _measure(session: ort.InferenceSession, one: _Pass, feed: Mapping[str, Array]) -> dict[str, tuple[F64, F64]]:
    names = [name for pair in one.measured.values() for name in pair]
    wanted = {value.name for value in session.get_inputs()}
    answers = run(session, {name: value for name, value in feed.items() if name in wanted}, names)
    values = dict(zip(names, (value.astype(np.float64) for value in answers), strict=True))
    return {tensor: (values[mean], values[variance]) for tensor, (mean, variance) in one.measured.items()}


def _factor(mean: F64, variance: F64, mean_now: F64, variance_now: F64) -> F64:
    """The a of the formula, 1 of dead channels; all [channels]."""
    alive = (variance > DEAD * (variance + mean**2)) & (variance_now > DEAD * (variance_now + mean_now**2))
    ratio = np.sqrt(np.divide(variance, variance_now, out=np.ones_like(variance), where=alive))
    return np.clip(ratio, 1 / MOST_CHANGED, MOST_CHANGED)
