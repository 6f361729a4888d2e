"""What an error in one group does to the model's outputs, measured by a trial.

The predicted errors of a group are those of the layers that read it. How much of them arrives at the outputs differs by
orders of magnitude between a residual branch and the classifier. So a share of each group alone is taken out for a
trial, its readers are re-fitted, and the model runs: the error measured at the outputs, over the error predicted at the
readers, is the group's sensitivity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_lwdf.activations.taps import Feed
from onnx_lwdf.channels.elimination import Elimination, refit, restore
from onnx_lwdf.channels.groups import Group
from onnx_lwdf.channels.ties import Ints
from onnx_lwdf.graph import Graph
from onnx_lwdf.influence import relative_error
from onnx_lwdf.layers import Layer, bias_of, find_layers, set_bias, set_weight, weight_of
from onnx_lwdf.runtime import open_session, run
from onnx_lwdf.solvers.problem import F64

TRIAL = 0.2  # of a group
NEGLIGIBLE = 1e-6  # of an error's power: below, neither of the two is more than rounding


def sensitivities(
    graph: Graph,
    groups: Sequence[Group],
    paths: Sequence[Elimination],
    means: Mapping[str, F64],
    spreads: Mapping[str, F64],
    feed: Feed,
) -> list[float]:
    """One number for each group. `means` [in] and `spreads` [in, in] are of the readers' inputs, by layer name."""
    trial = graph.twin()
    twins = {layer.name: layer for layer in find_layers(trial)[0]}
    exact = _outputs(trial, feed)
    found = []
    for group, path in zip(groups, paths, strict=True):
        count = int(np.clip(round(TRIAL * len(group.units)), 1, len(path.order)))
        readers = [twins[layer.name] for layer in group.readers]
        before = [(weight_of(trial, layer), bias_of(trial, layer)) for layer in readers]
        for layer in readers:
            muted = group.columns[layer.name][path.order[:count]].ravel()
            _mute(trial, layer, muted, means[layer.name], spreads[layer.name])
        error = relative_error(exact, _outputs(trial, feed))
        for layer, (weight, bias) in zip(readers, before, strict=True):
            set_weight(trial, layer, weight)
            set_bias(trial, layer, bias)
        found.append((error + NEGLIGIBLE) / (float(path.errors[count]) + NEGLIGIBLE))
    return found


def _mute(graph: Graph, layer: Layer, columns: Ints, mean: F64, spread: F64) -> None:
    """Re-fit the layer without these columns, which become zero: nothing changes its shape."""
    weight, bias = weight_of(graph, layer), bias_of(graph, layer)
    kept = np.ones(len(spread), bool)
    kept[columns] = False
    rows = weight.reshape(-1, len(spread))
    muted = np.zeros_like(rows)
    muted[:, kept] = restore(rows, refit(rows, spread, kept), spread, kept)
    set_weight(graph, layer, muted.reshape(weight.shape))
    if layer.bias is not None:
        set_bias(graph, layer, bias + ((rows - muted) @ mean).reshape(len(bias), -1).sum(1))


def _outputs(graph: Graph, feed: Feed) -> list[F64]:
    session = open_session(graph.snapshot(), arena=False)
    return [value.astype(np.float64) for value in run(session, feed, graph.outputs)]
