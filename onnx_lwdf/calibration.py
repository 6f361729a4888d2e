"""Calibration: the grid of every activation.

A range is searched on synthetic samples for the least sum of error^2, and ends earlier where the outputs gain by it
(`clipping.py`). Real images hold objects, synthetic ones do not, and
what answers to objects is deep in a network: where a share t of the layers on the way to the outputs is passed, ranges are

    1 + t^2 / 2

times as wide. That is what Fashion-MNIST's training images ask for. With 8 bits, where clipping is most of the noise, it is
always taken; below, where rounding is, if all grids together leave no more noise at the outputs on synthetic images by it,
weights in float and means corrected, than chance may show: else wider grids cost more than they may bring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from onnx_lwdf.activations.inputs import InputSpec
from onnx_lwdf.activations.taps import Feed, Samples
from onnx_lwdf.clipping import clipped
from onnx_lwdf.config import TARGETS, Config
from onnx_lwdf.emit import qdq
from onnx_lwdf.gates import Span
from onnx_lwdf.gradients import Sensitivities, strengths
from onnx_lwdf.graph import Graph, operator
from onnx_lwdf.influence import TINY, numbers, power_share, relative_error
from onnx_lwdf.joins import share_steps
from onnx_lwdf.layers import Bits, Layer, blocks, find_layers, set_bias, shape_of, weight_of
from onnx_lwdf.layerwise import bias_behind_grid
from onnx_lwdf.precondition.bounds import Range
from onnx_lwdf.precondition.norms import mean_shifts, take_up
from onnx_lwdf.ranges import F64, ActivationGrid, grid_for, search_grid, widened
from onnx_lwdf.runtime import open_session, run
from onnx_lwdf.sites import Site, behind_activation, clip_bounds, shares_passed

# Times what synthetic images show, at the end of a network; Fashion-MNIST's training images reach 1.1 to 1.8 times as far.
REACH = 1.5
JUDGES = 4  # chunks of synthetic images whose noise decides
# Times as much noise, 0.3 dB, that is no evidence: so much the answer of these images moves from seed to seed, and it errs
# against the wider grids, for real images clip more.
CHANCE = 1.07


@dataclass(frozen=True, slots=True)
class Calibration:
    """What activations are stored in."""

    grids: Mapping[str, ActivationGrid]  # by tensor; all tensors of a site share one
    noises: Mapping[
        str, float
    ]  # that a tensor's grid alone leaves at the outputs, in units of their power, where it was seen


def calibrate(
    graph: Graph,
    layers: Sequence[Layer],
    plan: Mapping[str, Bits],
    sites: Sequence[Site],
    samples: Samples,
    inputs: Sequence[InputSpec],
    feeds: Sequence[Feed],
    config: Config,
    spans: Mapping[str, Span] = MappingProxyType({}),
    gradients: Sensitivities = MappingProxyType({}),
) -> Calibration:
    """The grids of all sites. `feeds` hold samples of the model's inputs."""
    ranges = {name: bounds for spec in inputs for name, bounds in spec.ranges.items()}
    searched = _grids(graph, layers, sites, samples, ranges, config, spans, gradients)
    fixed = {
        site.tensors[0] for site in sites if site.tensors[0] in ranges or _given(site, spans) or _pooled(graph, site)
    }
    free = [site for site in sites if site.tensors[0] not in fixed]
    symmetric = TARGETS[config.target].symmetric_activations
    tight = clipped(graph, layers, free, searched, samples, feeds[0], symmetric)
    wider = _reaching(graph, layers, sites, tight.grids, spans, config)
    found, wider = (share_steps(graph, sites, grids, gradients, ranges.keys()) for grids in (tight.grids, wider))
    if wider != found and any(site.bits < 8 for site in sites):
        few = feeds[:JUDGES]
        noises = [grid_noise(graph, layers, plan, sites, grids, samples, few, config)[0] for grids in (found, wider)]
        wider = wider if noises[1] < CHANCE * noises[0] else found
    # What is rounded to wider steps is noisier by their square; what is cut off by less.
    grown = {name: (wider[name].scale / tight.grids[name].scale) ** 2 for name in tight.noises}
    return Calibration(wider, {name: noise * grown[name] for name, noise in tight.noises.items()})


def _reaching(
    graph: Graph,
    layers: Sequence[Layer],
    sites: Sequence[Site],
    grids: Mapping[str, ActivationGrid],
    spans: Mapping[str, Span],
    config: Config,
) -> dict[str, ActivationGrid]:
    """The grids as far as real images reach, but those that were not searched."""
    symmetric, passed = TARGETS[config.target].symmetric_activations, shares_passed(graph, layers)
    wider = dict(grids)
    for site in sites:
        factor = 1 + (_reach(config) - 1) * passed[site.tensors[0]] ** 2
        if factor > 1 and not _given(site, spans) and not _pooled(graph, site):
            grid = widened(grids[site.tensors[0]], factor, site.low, site.high, symmetric)
            wider.update(dict.fromkeys(site.tensors, grid))
    return wider


def _grids(
    graph: Graph,
    layers: Sequence[Layer],
    sites: Sequence[Site],
    samples: Samples,
    ranges: Mapping[str, Range],
    config: Config,
    spans: Mapping[str, Span],
    gradients: Sensitivities,
) -> dict[str, ActivationGrid]:
    """The grids of the least sum of error^2; with 8 bits over the whole span, where that is known.

    ranges: inputs that may hold anything between these, whatever the samples hold.
    """
    symmetric = TARGETS[config.target].symmetric_activations
    grids: dict[str, ActivationGrid] = {}
    for site in sites:
        if site.tensors[0] in ranges:
            grid = grid_for(*ranges[site.tensors[0]], site.bits, symmetric)
        elif _given(site, spans):
            span = spans[site.tensors[0]]
            grid = grid_for(float(span.low.min()), float(span.high.max()), site.bits, symmetric)
        else:
            values, weights = _weighted_values(graph, layers, site, samples, gradients)
            grid = search_grid(values, weights, site.bits, site.low, site.high, symmetric)
            if _pooled(graph, site):
                grid = widened(grid, _reach(config), site.low, site.high, symmetric)
        grids.update(dict.fromkeys(site.tensors, grid))
    return grids


def _reach(config: Config) -> float:
    """Data of the user's own reach as far as they reach."""
    return 1.0 if config.source == "data" else REACH


def _given(site: Site, spans: Mapping[str, Span]) -> bool:
    return site.bits == 8 and site.tensors[0] in spans


def _pooled(graph: Graph, site: Site) -> bool:
    """Behind a global pool, with 8 bits: at the end of a network, whatever the noise of the others."""
    node = graph.producer.get(site.tensors[0])
    return site.bits == 8 and node is not None and operator(node) == "GlobalAveragePool"


def _weighted_values(
    graph: Graph, layers: Sequence[Layer], site: Site, samples: Samples, gradients: Sensitivities
) -> tuple[F64, F64]:
    """Samples of the site's values, weighted by how strongly the outputs depend on each channel; where gradients are not
    known, by how strongly the network does two layers ahead.
    """
    exact = samples.values[site.tensors[0]].astype(np.float64)
    known = gradients.get(site.tensors[0])
    if known is not None and len(known) == len(exact):
        return exact.ravel(), np.repeat(strengths(known), exact.shape[1])
    readers = [layer for layer in layers if layer.input in site.tensors]
    if not readers:
        return exact.ravel(), np.ones(exact.size)
    parts, weights = [], []
    for layer in readers:
        values = samples.values[layer.input].astype(np.float64)  # [channels, values]
        energy = input_energy(graph, layer, np.sqrt(_importance(graph, layers, layer, samples)))
        parts.append(values.ravel())
        weights.append(np.repeat(energy if energy.any() else input_energy(graph, layer), values.shape[1]))
    return np.concatenate(parts), np.concatenate(weights)


def _importance(graph: Graph, layers: Sequence[Layer], layer: Layer, samples: Samples) -> F64:
    """[groups, out, 1]: the squared weights that read each output channel, times how often its activation passes a change.

    In units of its mean, so that layers that nothing reads count as the others. A channel's scale, which the transforms
    choose, has no part in W^2 times this but for that unit: what multiplies a row divides the column behind.
    """
    shape = (*shape_of(graph, layer)[:2], 1)
    tensor = behind_activation(graph, layer.output)
    readers = [other for other in layers if other.input == tensor]
    if not readers:
        return np.ones(shape)
    values = samples.values[tensor]  # [channels, values]
    passed = np.ones(len(values))
    if tensor != layer.output:
        low, high = clip_bounds(graph, graph.producer[tensor]) or (None, None)
        inside = (values > (-np.inf if low is None else low)) & (values < (np.inf if high is None else high))
        passed = inside.mean(1, dtype=np.float64)
    read = np.sum([input_energy(graph, other) for other in readers], axis=0)
    strength = read * passed
    return np.asarray(strength / max(float(strength.mean()), TINY)).reshape(shape)


def input_energy(graph: Graph, layer: Layer, factor: F64 | None = None) -> F64:
    """[channels]: the squared weights that an error of each input channel meets, each row times its factor [groups, out, 1]."""
    energy = np.zeros((layer.groups, 1))
    for rows in blocks(graph, layer):
        weight = weight_of(graph, layer, rows)
        energy = energy + ((weight if factor is None else weight * factor[:, rows]) ** 2).sum(1)  # [groups, in]
    return energy.reshape(energy.shape[0], layer.kernel_size, -1).sum(1).ravel()


def grid_noise(
    graph: Graph,
    layers: Sequence[Layer],
    plan: Mapping[str, Bits],
    sites: Sequence[Site],
    grids: Mapping[str, ActivationGrid],
    samples: Samples,
    feeds: Sequence[Feed],
    config: Config,
) -> tuple[float, float]:
    """Noise of the grids alone, in units of the outputs' power around the mean, and the share of that power.

    Weights are float, and biases take up what the grids add in the mean. `feeds` hold samples of the model's inputs.
    """
    biases = {layer.name: bias_behind_grid(graph, layer, plan[layer.name], grids, samples, config) for layer in layers}
    twin = graph.twin()
    floating = open_session(twin.model, arena=False)
    for layer in find_layers(twin)[0]:
        if layer.name in biases:
            set_bias(twin, layer, biases[layer.name])
    take_up(twin, mean_shifts(graph, grids, samples))
    qdq.activations(twin, sites, grids, TARGETS[config.target].signed_activations)
    twin.commit()
    # Optimized, onnxruntime would round the float weights between the grids too.
    session = open_session(twin.model, optimize=False, arena=False)
    noises, shares = [], []
    for feed in feeds:  # in turn: the outputs of all may be large
        exact = numbers(run(floating, feed))
        noises.append(relative_error(exact, numbers(run(session, feed))))
        shares.append(power_share(exact))
    return float(np.mean(noises)), float(np.mean(shares))
