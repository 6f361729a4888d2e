"""Structured pruning of a graph: find what can go, choose what goes, take it out and re-fit what remains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_lwdf.activations.taps import Feed, Samples
from onnx_lwdf.channels.allocation import Curve, allocate, most_removed
from onnx_lwdf.channels.elimination import Elimination, Reader, eliminate
from onnx_lwdf.channels.groups import Group, find_groups
from onnx_lwdf.channels.sensitivity import sensitivities
from onnx_lwdf.channels.spread import pooled_sources, spread
from onnx_lwdf.channels.surgery import CutLayer, Mask, cut
from onnx_lwdf.channels.ties import Ties, ties_of
from onnx_lwdf.errors import ModelError
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Layer, output_channels, weight_of
from onnx_lwdf.sharing import joint, sharing
from onnx_lwdf.solvers.problem import F64
from onnx_lwdf.statistics import ChannelStatistics, Statistics
from onnx_lwdf.workers import workers


@dataclass(frozen=True, slots=True)
class Pruned:
    """What remains; the graph was edited in place."""

    layers: Sequence[Layer]
    samples: Samples
    statistics: Statistics
    kept: Mapping[str, Mask]  # tensor -> [channels] as they were, which of them remain
    notes: Mapping[str, str]  # layer name -> what happened to its channels, or why nothing did


def prune_channels(
    graph: Graph,
    layers: Sequence[Layer],
    samples: Samples,
    statistics: Statistics,
    feed: Feed,
    share: float,
    jobs: int | None = None,
) -> Pruned:
    """Remove this share of all channels that can go, those of least predicted error.

    A channel that runs through depthwise layers, sums and concatenations counts once. The feed is one the model runs on.
    Raises ModelError where no channel can go.
    """
    ties = ties_of(graph, layers, feed)
    groups = find_groups(graph, layers, ties)
    free = [group for group in groups if not group.reason]
    if not free:
        reasons = "; ".join(dict.fromkeys(group.reason for group in groups))
        raise ModelError(f"no channels can be removed: {reasons or 'no layer has any'}; leave --channels out")
    total = sum(len(group.units) for group in free)
    budget = int(share * total)
    sources = pooled_sources(graph, layers)
    full = [layer for layer in layers if layer.groups == 1]
    spreads = _joint(graph, full, {layer.name: spread(layer, samples, sources) for layer in full})
    paths = _eliminate_all(graph, free, spreads, budget, jobs)
    means = {name: samples.moments[name].mean[0] for name in spreads}
    effects = sensitivities(graph, free, paths, means, spreads, feed)
    curves = [
        Curve(effect * path.errors, len(group.units), np.sqrt(group.weights))
        for group, path, effect in zip(free, paths, effects, strict=True)
    ]
    counts = allocate(curves, budget)
    if not any(counts):
        raise ModelError(
            f"channels {share:g}: of {total} channels that can go this is less than one step; ask for more"
        )
    gone = [group.units[path.order[:n]] for group, path, n in zip(free, paths, counts, strict=True)]
    before = {layer.name: output_channels(graph, layer) for layer in layers}
    remaining = {name: ~np.isin(units, np.concatenate(gone)) for name, units in ties.units.items()}
    done, smaller = cut(graph, layers, samples, ties, spreads, remaining)
    stay = {int(unit): group.reason for group in groups if group.reason for unit in group.units}
    notes = {item.layer.name: _note(item, before[item.layer.name], _reason(item.layer, ties, stay)) for item in done}
    known = {name: _only(value, remaining.get(name)) for name, value in statistics.items()}
    return Pruned([item.layer for item in done], smaller, known, remaining, notes)


def _joint(graph: Graph, layers: Sequence[Layer], spreads: Mapping[str, F64]) -> dict[str, F64]:
    """The same for all layers that share a weight, so that they share it when they are re-fitted."""
    found = dict(spreads)
    for same in sharing(graph, layers):
        if len(same) > 1:
            rows = weight_of(graph, same[0]).reshape(1, -1, len(spreads[same[0].name]))
            found |= dict.fromkeys(
                (one.name for one in same), joint(rows, [spreads[one.name][None] for one in same])[0]
            )
    return found


def _only(value: ChannelStatistics, kept: Mask | None) -> ChannelStatistics:
    return value if kept is None or kept.all() else value.of(kept)


def _eliminate_all(
    graph: Graph, groups: Sequence[Group], spreads: Mapping[str, F64], budget: int, jobs: int | None
) -> list[Elimination]:
    """Groups run in parallel, each on one thread: the bytes do not depend on the jobs."""
    with workers(jobs) as pool:
        return list(pool.map(lambda group: _eliminate(graph, group, spreads, budget), groups))


def _eliminate(graph: Graph, group: Group, spreads: Mapping[str, F64], budget: int) -> Elimination:
    readers = []
    for layer in group.readers:
        covariance = spreads[layer.name]
        rows = weight_of(graph, layer).reshape(-1, len(covariance))
        power = float(np.einsum("oi,oi->", rows @ covariance, rows))
        scale = 1 / np.sqrt(max(power, np.finfo(np.float64).tiny))
        readers.append(Reader(scale * rows, covariance, group.columns[layer.name]))
    return eliminate(readers, min(budget, most_removed(len(group.units))))


def _reason(layer: Layer, ties: Ties, stay: Mapping[int, str]) -> str:
    """Why the layer's output channels stay, the first reason where there are several."""
    units = ties.units.get(layer.node.output[0], ())
    return next((stay[int(unit)] for unit in units if int(unit) in stay), "")


def _note(item: CutLayer, outputs: int, reason: str) -> str:
    parts = [f"{item.removed} of {outputs} channels removed"] if item.removed else []
    parts += [f"channels kept: {reason}"] if reason and not item.removed else []
    parts += [f"re-fitted at {item.sqnr_db:.1f} dB"] if item.sqnr_db is not None else []
    return "; ".join(parts)
