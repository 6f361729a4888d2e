"""Mixed precision: how many bits each weight gets, so that the file fits a size, or holds a fidelity, at the least cost.

    noise at the outputs = noise of the activations' grids + sum_l influence_l e_l(bits_l)

To first order the noises of independent layers add up. e_l(b) is the relative error of layer l's output with its own weight
at b bits, by the method itself on a sample of its output channels and on its own synthetic inputs; `influence` is
measured once. The bits are the exact solution of a knapsack: least noise within a size, or least size within a noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_lwdf.activations.moments import Moments
from onnx_lwdf.activations.taps import Feed, Samples
from onnx_lwdf.calibration import grid_noise
from onnx_lwdf.config import BITS, Config
from onnx_lwdf.emit import file_bytes, weight_bytes
from onnx_lwdf.graph import Graph
from onnx_lwdf.influence import influences, relative_loss
from onnx_lwdf.knapsack import knapsack
from onnx_lwdf.layers import Bits, Layer, Pruning, vectors_of
from onnx_lwdf.layerwise import Task, patch_moments, pose
from onnx_lwdf.ranges import ActivationGrid
from onnx_lwdf.sharing import readers
from onnx_lwdf.sites import Site
from onnx_lwdf.solvers import SOLVERS
from onnx_lwdf.solvers.problem import LayerProblem, channel_loss
from onnx_lwdf.workers import workers

MOST_ROWS = 64  # output channels of a layer, for its curve
FRONT = 12  # points of the trade-off that are reported
NEARLY = {"descent": "gptq"}  # where descent begins: a fourth of the time, and layers and bits compare the same
MIDDLE = 5  # bits that the preconditioning expects where no size says how many there will be

LEAST_NOISE = 1e-30  # that a number of decibels is given for

Plan = Mapping[str, Bits]


@dataclass(frozen=True, slots=True)
class Point:
    """A file that could be written."""

    bytes: int
    predicted_db: float  # SQNR at the outputs, the lowest where there are several
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a plan's file takes, before anything is solved."""

    graph: Graph
    layers: Sequence[Layer]
    sites: Sequence[Site]
    form: str
    activations: str
    signed: bool
    extra: int  # bytes of the provenance
    codes: Mapping[str, str]  # layer name -> the layer whose codes it has

    def of_file(self, plan: Plan) -> int:
        """Bytes of the file."""
        return self.extra + file_bytes(self.graph, self.form, self.layers, plan, self.sites, self.signed, self.codes)

    def of_weight(self, layer: Layer, bits: Bits) -> int:
        """Bytes that the layer's codes add to it."""
        return weight_bytes(self.graph, self.form, self.activations, layer, bits)


def expected(plan: Plan, sizes: Sizes, most: int | None) -> Plan:
    """The plan with as many bits for all the free layers alike as the size allows."""
    if most is None:
        return _level(plan, MIDDLE)
    fitting = (bits for bits in reversed(BITS) if sizes.of_file(_level(plan, bits)) <= most)
    return _level(plan, next(fitting, BITS.start))


def _level(plan: Plan, bits: int) -> Plan:
    return {name: replace(of, weight=bits) if of.free else of for name, of in plan.items()}


def choose_bits(
    graph: Graph,
    layers: Sequence[Layer],
    plan: Plan,
    pruning: Mapping[str, Pruning],
    grids: Mapping[str, ActivationGrid],
    samples: Samples,
    feed: Feed,
    sizes: Sizes,
    config: Config,
    most: int | None,
) -> tuple[Plan, tuple[Point, ...]]:
    """The plan with the weights' bits chosen, and the trade-off around it, sizes rising.

    `feed` holds samples of the model's inputs, `most` is the file's limit in bytes; without it the file is the smallest
    that is predicted to hold `fail_under`. What cannot be reached is approached: the smallest file, or the best.
    """
    influence = influences(graph, layers, samples.moments, feed)
    if not any(influence.values()):  # no output is a real number, or nothing reaches one
        influence = dict.fromkeys(influence, 1.0)
    floor, share = grid_noise(graph, layers, plan, sizes.sites, grids, samples, [feed], config)
    sets = readers(layers, sizes.codes)
    bits = [list(BITS) if plan[first.name].free else [plan[first.name].weight or BITS.stop] for first, *_ in sets]

    def curve(layer: Layer, row: Sequence[int]) -> list[float]:
        task = pose(
            graph, layer, replace(plan[layer.name], weight=max(row)), pruning[layer.name], grids, samples, config
        )
        return [influence[layer.name] * error for error in _errors(task, row, samples.moments[layer.name])]

    with workers(config.jobs) as pool:
        curves = [[pool.submit(curve, layer, row) for layer in same] for same, row in zip(sets, bits, strict=True)]
        noises = [np.sum([found.result() for found in of], axis=0).tolist() for of in curves]
    choices = _Choices(plan, sizes, sets, bits, noises, floor, share)
    answer = choices.within(most) if most is not None else choices.holding(config.fail_under or 0.0)
    return choices.plan_of(answer), choices.front(answer)


class _Choices:
    """What bits layers may have, what they cost and what they take; a solution is one index for those that share codes."""

    def __init__(
        self,
        plan: Plan,
        sizes: Sizes,
        sets: Sequence[Sequence[Layer]],
        bits: Sequence[Sequence[int]],
        noises: Sequence[Sequence[float]],
        floor: float,
        share: float,
    ) -> None:
        """bits, noises [sets][choices]; floor: the noise that is there in any case; share: of power in dB's terms."""
        self._plan, self._sizes, self._sets, self._bits, self._noises = plan, sizes, sets, bits, noises
        self._floor, self._share = floor, share
        self._widths = [
            [sizes.of_weight(first, replace(plan[first.name], weight=width)) for width in row]
            for (first, *_), row in zip(sets, bits, strict=True)
        ]
        self._rest: dict[frozenset[int], int] = {}  # bits that there are -> bytes beside the codes

    def plan_of(self, chosen: Sequence[int]) -> Plan:
        sets = zip(self._sets, self._bits, chosen, strict=True)
        widths = {layer.name: row[i] for same, row, i in sets for layer in same}
        return {**self._plan, **{name: replace(self._plan[name], weight=width) for name, width in widths.items()}}

    def within(self, most: int) -> list[int]:
        """The least noise whose file fits; the smallest file where none does."""
        return self._within(most, self._size)

    def _within(self, most: int, size: Callable[[Sequence[int]], int]) -> list[int]:
        """Files also hold constants that layers share, so that sizes do not quite add up: what is over comes off the limit."""
        smallest = _least(self._widths, self._noises)
        limit = int(_total(self._widths, smallest)) + most - self._about(smallest)
        while (found := knapsack(self._noises, self._widths, limit)) is not None:
            over = size(found) - most
            if over <= 0:
                return found
            limit -= over
        return smallest

    def holding(self, decibels: float) -> list[int]:
        """The smallest file that is predicted to hold them; the least noise where none does."""
        found = knapsack(self._widths, self._noises, 10 ** (-decibels / 10) / self._share - self._floor)
        return _least(self._noises, self._widths) if found is None else found

    def front(self, answer: Sequence[int]) -> tuple[Point, ...]:
        """The best files between the smallest and the best of all, and the answer, sizes rising."""
        ends = [self._about(_least(*tables)) for tables in ((self._widths, self._noises), (self._noises, self._widths))]
        around = [self._within(round(most), self._about) for most in np.linspace(ends[0], ends[1], FRONT)]
        points = [*(self._point(chosen, self._about(chosen), False) for chosen in around)]
        points.append(self._point(answer, self._size(answer), True))
        kept: list[Point] = []
        for point in sorted(points, key=lambda point: (point.bytes, -point.predicted_db, not point.chosen)):
            if point.chosen or not kept or point.predicted_db > kept[-1].predicted_db:
                kept.append(point)
        return tuple(kept)

    def _size(self, chosen: Sequence[int]) -> int:
        return self._sizes.of_file(self.plan_of(chosen))

    def _about(self, chosen: Sequence[int]) -> int:
        """The size to a few hundred bytes: what layers share is measured once for each set of bits."""
        there = frozenset(row[index] for row, index in zip(self._bits, chosen, strict=True))
        codes = int(_total(self._widths, chosen))
        if there not in self._rest:
            self._rest[there] = self._size(chosen) - codes
        return self._rest[there] + codes

    def _point(self, chosen: Sequence[int], size: int, answer: bool) -> Point:
        noise = self._share * (self._floor + _total(self._noises, chosen))
        return Point(size, -10 * math.log10(max(noise, LEAST_NOISE)), answer)


def _least(table: Sequence[Sequence[float]], then: Sequence[Sequence[float]]) -> list[int]:
    """The least entry of every row, of equal ones that with the least in the other table."""
    return [int(np.lexsort((other, row))[0]) for row, other in zip(table, then, strict=True)]


def _total(table: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    return sum(row[index] for row, index in zip(table, chosen, strict=True))


def _errors(task: Task, row: Sequence[int], moments: Moments) -> list[float]:
    """The relative errors of the layer's output, its mean corrected, with the weights that the task's method finds, or nearly.

    row: bits, the task's own the most of them. Only there can sums of codes saturate: fewer bits need no pair limit.
    """
    most = task.problem.thinned(MOST_ROWS)
    covariance = patch_moments(task.layer, moments, mean_share=0.0)[1]
    channels = most.weight.shape[-1] * most.blocks // task.layer.kernel_size

    def at(bits: int) -> LayerProblem:
        if bits == most.bits:
            return most
        vectors = vectors_of(task.layer, channels, replace(task.bits, weight=bits))
        return replace(most, bits=bits, pair_limit=None, vectors=vectors)

    problems = map(at, row)
    solve = SOLVERS[NEARLY.get(task.method, task.method)].solve
    stored = (solve(problem).weight for problem in problems)
    losses = (float(channel_loss(most.weight, weight, covariance).sum()) for weight in stored)
    return [relative_loss(loss, most.weight, covariance) for loss in losses]
