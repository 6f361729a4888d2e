"""Which layers are pruned, and how much of each: what the user fixed, and shares of one budget.

The share of a layer costs its relative output error, measured by the method itself on a sample of its output channels,
times its influence on the model's outputs.
N:M is the same everywhere, so there the layers that cost most for each of their weights are spared, up to a tenth of all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_lwdf.activations.moments import Moments
from onnx_lwdf.activations.taps import Feed, Samples
from onnx_lwdf.allocate import SPARSITIES, Curve, allocate, summed
from onnx_lwdf.config import Config
from onnx_lwdf.errors import ModelError
from onnx_lwdf.graph import Graph
from onnx_lwdf.influence import influences, relative_loss
from onnx_lwdf.layers import Bits, Layer, Pruning, Skipped, input_blocks, is_depthwise, matches, shape_of, weight_of
from onnx_lwdf.layerwise import method_of, patch_moments
from onnx_lwdf.plan import check_patterns, first_and_last
from onnx_lwdf.sharing import sharing
from onnx_lwdf.solvers import SOLVERS, Losses
from onnx_lwdf.solvers.problem import F64, LayerProblem, apart
from onnx_lwdf.workers import workers

SPARED = 0.1  # of the weights that N:M could prune: the narrow layers at the front hold few and cost most
MOST_ROWS = 64  # output channels of a layer, for its curve


def plan_pruning(
    graph: Graph, layers: Sequence[Layer], skipped: Sequence[Skipped], config: Config
) -> dict[str, Pruning]:
    """Layer name -> how it is pruned; a layer that shares the budget has its mean for now.

    Raises OptionError where a pattern of `sparsity_for` names no layer, ModelError where there is nothing to prune.
    """
    check_patterns("sparsity-for", config.sparsity_for, [*layers, *skipped])
    first = first_and_last(graph)[0]
    plan = {layer.name: _planned(graph, layer, layer.node.output[0] in first, config) for layer in layers}
    if config.prunes and not any(pruning.asked for pruning in plan.values()):
        reasons = "; ".join(dict.fromkeys(pruning.note for pruning in plan.values() if pruning.note))
        raise ModelError(f"nothing to prune: {reasons or 'every layer is fixed at 0'}; name layers by --sparsity-for")
    return plan


def _planned(graph: Graph, layer: Layer, first: bool, config: Config) -> Pruning:
    fixed = [share for pattern, share in config.sparsity_for.items() if matches(pattern, layer.name, layer.op)]
    if fixed:
        return Pruning(fixed[-1], note="" if fixed[-1] else "dense: fixed at 0")
    if not (config.sparsity or config.nm):
        return Pruning(note="dense: not named" if config.prunes else "")
    if is_depthwise(graph, layer):
        return Pruning(note="dense: depthwise")
    if first:
        return Pruning(note="dense: the first layer")
    channels = shape_of(graph, layer)[2] // layer.kernel_size
    width = channels // input_blocks(graph, layer)
    if config.nm is not None and width % config.nm[1]:
        part = "" if width == channels else f" in blocks of {width}"
        return Pruning(note=f"dense: {channels} input channels{part}, not a multiple of {config.nm[1]}")
    return Pruning(config.sparsity, config.nm, shared=config.nm is None)


def share_budget(
    graph: Graph,
    layers: Sequence[Layer],
    plan: Mapping[str, Pruning],
    samples: Samples,
    feed: Feed,
    config: Config,
) -> dict[str, Pruning]:
    """The plan with a sparsity of its own for every layer that shares the budget; `feed` are samples of the inputs."""
    if config.nm is not None:
        return _spare(graph, layers, plan, samples, feed, config)
    asked = [layer for layer in layers if plan[layer.name].shared]
    if not asked:
        return dict(plan)
    influence = influences(graph, asked, samples.moments, feed)
    losses = SOLVERS[method_of(config, Bits(config.weight_bits, None), pruned=True)].losses
    assert losses is not None, config.method
    with workers(config.jobs) as pool:
        found = pool.map(
            lambda layer: _curve(
                losses, layer, weight_of(graph, layer), samples.moments[layer.name], influence[layer.name]
            ),
            asked,
        )
        curves = dict(zip((layer.name for layer in asked), found, strict=True))
    sets = sharing(graph, asked)
    chosen = allocate([summed([curves[layer.name] for layer in same]) for same in sets], config.sparsity)
    shares = {layer.name: share for same, share in zip(sets, chosen, strict=True) for layer in same}
    return {**plan, **{name: replace(plan[name], sparsity=share) for name, share in shares.items()}}


def _spare(
    graph: Graph,
    layers: Sequence[Layer],
    plan: Mapping[str, Pruning],
    samples: Samples,
    feed: Feed,
    config: Config,
) -> dict[str, Pruning]:
    """The plan without N:M where it costs most for each weight."""
    asked = [layer for layer in layers if plan[layer.name].nm is not None]
    influence = influences(graph, asked, samples.moments, feed)
    solve = SOLVERS[method_of(config, Bits(None, None), pruned=True)].solve

    def cost(layer: Layer) -> float:
        problem = _sampled(layer, weight_of(graph, layer), samples.moments[layer.name], config.nm)
        return influence[layer.name] * relative_loss(solve(problem).loss, problem.weight, problem.hessian)

    with workers(config.jobs) as pool:
        costs = dict(zip((layer.name for layer in asked), pool.map(cost, asked), strict=True))
    sets = sharing(graph, asked)
    sizes = [len(same) * math.prod(shape_of(graph, same[0])) for same in sets]
    dear = [sum(costs[layer.name] for layer in same) / size for same, size in zip(sets, sizes, strict=True)]
    left = SPARED * sum(sizes)
    spared: list[str] = []
    for i in sorted(range(len(sets)), key=lambda i: -dear[i]):
        if sizes[i] <= left:
            spared.extend(layer.name for layer in sets[i])
            left -= sizes[i]
    return {**plan, **{name: Pruning(note="dense: costs most for its weights") for name in spared}}


def _sampled(layer: Layer, weight: F64, moments: Moments, nm: tuple[int, int] | None = None) -> LayerProblem:
    """The layer's problem in float, on some of its output channels."""
    _, covariance = patch_moments(layer, moments, mean_share=0.0)
    weight = apart(weight, moments.blocks)
    floor = np.zeros(weight.shape[:2])
    whole = LayerProblem(weight, covariance, None, floor, layer.kernel_size, nm=nm, blocks=moments.blocks)
    return whole.thinned(MOST_ROWS)


def _curve(losses: Losses, layer: Layer, weight: F64, moments: Moments, influence: float) -> Curve:
    problem = _sampled(layer, weight, moments)
    found = losses(problem, SPARSITIES)
    costs = [influence * relative_loss(loss, problem.weight, problem.hessian) for loss in found]
    return Curve(weight.size, tuple(costs), influence)
