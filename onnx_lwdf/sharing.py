"""Layers that share a weight: theirs are the same, but for a factor of each output channel that changes no sign.

A head that runs over all levels of a pyramid, or a network that looks at two images, reads one weight several times. Where
BatchNormalization differs from reader to reader, folding it leaves

    W_l = diag(d_l) W_1,    d_l >= 0

and scales of output channels hold d_l: such layers are solved together, and a file holds their codes once. Weights that stay
float have no scales, and are held once where all d_l are 1. Layers are found by values, so it does not matter whether an
export wrote the weight once or for each reader.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, Layer, Pruning, blocks, is_depthwise, output_axis, weight_of
from onnx_lwdf.ranges import F64

LEAST_POWER = 1e-30  # of a reader's outputs: where they never vary, it says nothing of its weight's errors
EQUAL = 1e-5  # of the largest weight of an output channel: what float32 rounds where factors are multiplied in


def sharing(graph: Graph, layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers in sets that share a weight, most of them alone; in graph order."""
    alike: dict[tuple[object, ...], list[tuple[F64, list[Layer]]]] = defaultdict(list)
    for layer in layers:
        weight = graph.constant(layer.weight)
        assert weight is not None, layer.name
        sets = alike[layer.op, layer.transposed, layer.groups, weight.shape]
        # One output channel tells nearly all others apart: of large weights no more is read.
        head = np.take(weight, [0], output_axis(layer)).astype(np.float64).reshape(1, 1, -1)
        same = (one for other, one in sets if _proportional(other, head) and _all_proportional(graph, one[0], layer))
        if (found := next(same, None)) is None:
            sets.append((head, [layer]))
        else:
            found.append(layer)
    place = {layer.name: i for i, layer in enumerate(layers)}
    return sorted((one for sets in alike.values() for _, one in sets), key=lambda one: place[one[0].name])


def linked(graph: Graph, layers: Sequence[Layer]) -> Iterator[tuple[Layer, Layer]]:
    """Pairs of layers that must read one set of channels, and write one, to share their weight still.

    Not depthwise ones: they hold next to nothing, blurs look like each other by chance, and those between two others that
    share their weights do so anyway.
    """
    for first, *others in sharing(graph, [layer for layer in layers if not is_depthwise(graph, layer)]):
        yield from ((first, layer) for layer in others)


def codes_of(
    graph: Graph, layers: Sequence[Layer], plan: Mapping[str, Bits], pruning: Mapping[str, Pruning]
) -> dict[str, str]:
    """Layer name -> the layer whose codes or floats it has, where that is another: the first of the same weight and plan."""

    def one_answer(first: Layer, layer: Layer) -> bool:
        same = all(plans[first.name] == plans[layer.name] for plans in (plan, pruning))
        return same and (plan[layer.name].weight is not None or _equal(graph, first, layer))

    found: dict[str, str] = {}
    for alike in sharing(graph, layers):
        firsts: list[Layer] = []
        for layer in alike:
            first = next((one for one in firsts if one_answer(one, layer)), None)
            if first is None:
                firsts.append(layer)
            else:
                found[layer.name] = first.name
    return found


def readers(layers: Sequence[Layer], codes: Mapping[str, str]) -> list[list[Layer]]:
    """The layers that have the same codes, the one whose they are first; in graph order."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(codes.get(layer.name, layer.name), []).append(layer)
    return list(found.values())


def factors(first: F64, weight: F64) -> F64:
    """The d of the formula by least squares, [groups, out], 1 where both are 0; both weights [groups, out, in]."""
    square = np.einsum("goi,goi->go", first, first)
    return np.divide(np.einsum("goi,goi->go", first, weight), square, out=np.ones_like(square), where=square > 0)


def joint(weight: F64, moments: Sequence[F64]) -> F64:
    """Second moments, [groups, in, in], that are to the weight what those of all its readers are together:

        H = sum_l H_l / p_l / sum_l 1 / p_l,    p_l = tr(W H_l W^T)

    so that the relative error of each reader counts the same. weight [groups, out, in], moments [groups, in, in] of each.
    """
    powers = np.array([np.einsum("goi,goi->", weight @ each, weight) for each in moments])
    shares = np.divide(1, powers, out=np.zeros_like(powers), where=powers > LEAST_POWER)
    shares = shares / shares.sum() if shares.any() else np.full(len(powers), 1 / len(powers))
    return np.asarray(sum(share * each for share, each in zip(shares, moments, strict=True)))


def _equal(graph: Graph, first: Layer, layer: Layer) -> bool:
    return all(np.array_equal(*pair) for pair in _pairs(graph, first, layer))


def _all_proportional(graph: Graph, first: Layer, layer: Layer) -> bool:
    """Channels that one reader's BatchNormalization silences may be fewer than half: layers of zeros would fit to all."""
    if not all(_proportional(*pair) for pair in _pairs(graph, first, layer)):
        return False
    silent = np.concatenate([first.any(-1) & ~weight.any(-1) for first, weight in _pairs(graph, first, layer)], axis=1)
    return bool(silent.mean() < 0.5)


def _pairs(graph: Graph, first: Layer, layer: Layer) -> Iterator[tuple[F64, F64]]:
    """Both weights, some output channels of each group at a time."""
    for rows in blocks(graph, first):
        yield weight_of(graph, first, rows), weight_of(graph, layer, rows)


def _proportional(first: F64, weight: F64) -> bool:
    if np.array_equal(first, weight):
        return True
    if weight.shape[-1] == 1:  # single numbers always are, and say nothing
        return False
    by = factors(first, weight)
    most = np.abs(weight).max(-1)
    return bool((by >= 0).all() and (np.abs(weight - by[..., None] * first).max(-1) <= EQUAL * most).all())
