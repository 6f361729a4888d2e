"""Steps that tensors share where an operator joins them.

With the step s_t of its grid, a tensor adds noise of

    W_t s_t^2 / 12

to the outputs, W_t the sum of its channels' squared gradients. What an Add or a Concat puts out adds none where its operands
have its own step: sums of multiples are multiples. So the tensors of a join, and of all joins that these share steps with
already, get the widest of their steps, where that leaves less noise; ranges grow by it, none ends earlier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import onnx

from onnx_lwdf.gradients import Sensitivities, strengths
from onnx_lwdf.graph import Graph, operator
from onnx_lwdf.ranges import F64, ActivationGrid
from onnx_lwdf.sites import Site, behind_activation

JOINS = ("Add", "Concat")


def share_steps(
    graph: Graph,
    sites: Sequence[Site],
    grids: Mapping[str, ActivationGrid],
    gradients: Sensitivities,
    fixed: Set[str] = frozenset(),
) -> dict[str, ActivationGrid]:
    """The grids, tensor name -> grid, with steps shared where that leaves less noise, by the gradients that are known.

    `fixed`: tensors that keep their grid.
    """
    site_of = {name: site for site in sites for name in site.tensors}
    weights = {site.tensors[0]: _weight(gradients[site.tensors[0]]) for site in sites if site.tensors[0] in gradients}
    changed, sets, exact = dict(grids), {site.tensors[0]: [site] for site in sites}, set[str]()

    def noise(members: Sequence[Site], rounded: Set[str], step: float | None = None) -> float:
        steps = {site.tensors[0]: step or changed[site.tensors[0]].scale for site in members}
        return sum(weights[name] * steps[name] ** 2 for name in steps if name not in rounded)

    for node in graph.nodes:
        joined = _joined(graph, node, site_of)
        if not joined or len({site.bits for site in joined}) > 1 or any(s.tensors[0] not in weights for s in joined):
            continue
        out = joined[-1].tensors[0]
        members = list({one.tensors[0]: one for site in joined for one in sets[site.tensors[0]]}.values())
        step = max(changed[site.tensors[0]].scale for site in members)
        if not all(_may_widen(site, changed[site.tensors[0]], step, fixed) for site in members):
            continue
        if noise(members, exact | {out}, step) < noise(members, exact):
            exact.add(out)
            sets |= {site.tensors[0]: members for site in members}
            wider = {name: replace(grids[name], scale=step) for site in members for name in site.tensors}
            changed |= wider
    return changed


def _joined(graph: Graph, node: onnx.NodeProto, site_of: Mapping[str, Site]) -> list[Site]:
    """The sites that a node reads, and then the one that it writes, behind an activation; none where it is no join of sites."""
    if operator(node) not in JOINS:
        return []
    names = [*node.input, behind_activation(graph, node.output[0])]
    return [site_of[name] for name in names] if site_of.keys() >= set(names) else []


def _weight(gradient: F64) -> float:
    """W of a tensor, by the second moment of its gradients."""
    return float(strengths(gradient).sum())


def _may_widen(site: Site, grid: ActivationGrid, step: float, fixed: Set[str]) -> bool:
    """Beyond a Clip's end a grid may not reach: onnxruntime would run the Clip by itself."""
    return grid.scale == step or (site.tensors[0] not in fixed and site.high is None)
