"""Layer by layer, independently: from samples of a layer's input to its stored weight and bias.

Each layer is one problem in arrays: its weight W and H = Cov(x) + E[x] E[x]^T / 10 of its float inputs. Layers do not wait
for each other; those that share a weight (sharing.py) are one problem.
The bias takes up the mean error that remains,

    b' = b + E[W x] - E[V q(x)],

V the stored weight and q the grid of the input.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from onnx_lwdf.activations.moments import Moments
from onnx_lwdf.activations.taps import Samples
from onnx_lwdf.config import TARGETS, Config
from onnx_lwdf.graph import Graph
from onnx_lwdf.grid import LARGEST_CODE, storable
from onnx_lwdf.layers import ALL, Bits, Layer, Pruning, bias_of, blocks, is_depthwise, shape_of, vectors_of, weight_of
from onnx_lwdf.ranges import ActivationGrid
from onnx_lwdf.runtime import trim
from onnx_lwdf.sharing import factors, joint, readers
from onnx_lwdf.solvers import SOLVERS
from onnx_lwdf.solvers.bias import mean_correction
from onnx_lwdf.solvers.problem import (
    LayerProblem,
    LayerSolution,
    Rounding,
    apart,
    float_solution,
    solution,
    summed,
    together,
)
from onnx_lwdf.workers import workers

F64 = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

AUTO_METHOD, AUTO_PRUNING, AUTO_BLIND = "descent", "obs", "squant"
# The bias takes up the mean error of rounding. A tenth stays in H: other images have other means, and padding has none.
MEAN_SHARE = 0.1
PAIR_LIMIT = 128  # 255 * 128 = 32640 < 32767, the sum of two products in vpmaddubsw
LEAST_SCALE = 1e-30  # of a channel that a reader silences: times any code, nothing
LARGEST_BIAS = 2.0**30  # codes of an int32 bias, with room for rounding


@dataclass(frozen=True, slots=True)
class Solved:
    """A layer's answer."""

    layer: Layer
    bits: Bits
    method: str
    solution: LayerSolution
    bias: F64  # [out of all groups], for float inputs
    drift: F64  # [out of all groups], mean of what the grid of the input adds to the output
    grid: ActivationGrid | None  # of its input

    @property
    def stored_bias(self) -> F64:
        """The bias, [out of all groups], that takes up the mean error of the weight and of the input's grid."""
        return self.bias - self.drift

    def scaled(self, factor: F64, shift: F64) -> Solved:
        """The answer whose outputs are factor y + shift; both [out of all groups]."""
        solution, rounding = self.solution, self.solution.rounding
        if rounding is None:
            weight = solution.weight
            changed = replace(solution, values=weight * factor.reshape(*weight.shape[:2], 1))
        else:
            rows = factor.reshape(rounding.scale.shape)
            scale = storable(rounding.scale * rows, np.zeros(rows.shape))
            changed = replace(solution, rounding=replace(rounding, scale=scale))
        return replace(self, solution=changed, bias=factor * self.bias + shift, drift=factor * self.drift)


def solve_layers(
    graph: Graph,
    layers: Sequence[Layer],
    plan: Mapping[str, Bits],
    pruning: Mapping[str, Pruning],
    grids: Mapping[str, ActivationGrid],
    samples: Samples,
    config: Config,
    codes: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Solved]:
    """Every layer's answer. Layers run in parallel, each on one thread: the bytes do not depend on the jobs.

    `codes`: layer name -> the layer whose codes it has. Answers come in the order of the layers, but that these follow those.
    """

    def answers_of(same: Sequence[Layer], rows: slice) -> list[Solved]:
        # Posed and solved in one go: what a problem holds lives no longer than it must.
        tasks = [
            pose(graph, layer, plan[layer.name], pruning[layer.name], grids, samples, config, rows) for layer in same
        ]
        if len(tasks) == 1:
            return [_settle(tasks[0], _solve(tasks[0]))]
        by = [_factors(tasks[0], task) for task in tasks]
        found = _solve(replace(tasks[0], problem=_joint(tasks, by)))
        return [_settle(task, _times(found, factor, task)) for task, factor in zip(tasks, by, strict=True)]

    sets = readers(layers, codes)
    # Which weights go is chosen among all of a layer.
    parts = [[ALL] if pruning[first.name].asked else blocks(graph, first) for first, *_ in sets]
    pieces = [(same, rows) for same, blocks_of in zip(sets, parts, strict=True) for rows in blocks_of]
    with workers(config.jobs) as pool:
        try:
            answers = pool.map(lambda piece: answers_of(*piece), pieces)
            for blocks_of in parts:
                for found in zip(*itertools.islice(answers, len(blocks_of)), strict=True):
                    yield _joined(graph, found)
                if graph.scratch is not None:  # what the C library keeps of every layer adds up to twice what one needs
                    trim()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass(frozen=True, slots=True)
class Task:
    """A layer's problem and what its bias needs."""

    layer: Layer
    bits: Bits
    method: str
    grid: ActivationGrid | None
    problem: LayerProblem
    bias: F64  # [groups * out]
    mean: F64  # [groups * blocks, in / blocks], of the float input
    stored_mean: F64  # the same of the quantized input


def pose(
    graph: Graph,
    layer: Layer,
    bits: Bits,
    pruning: Pruning,
    grids: Mapping[str, ActivationGrid],
    samples: Samples,
    config: Config,
    rows: slice = ALL,
) -> Task:
    """The layer's problem at these bits, or the part of it that is of these output channels of each group."""
    weight, bias = weight_of(graph, layer, rows), bias_of(graph, layer).reshape(layer.groups, -1)[:, rows].ravel()
    grid = grids[layer.input] if bits.activation is not None else None
    kernel, moments = layer.kernel_size, samples.moments[layer.name]
    bits = _bounded(bits, pruning, grid, moments, config)
    mean, hessian = patch_moments(layer, moments, 0.0 if pruning.asked else MEAN_SHARE)
    problem = LayerProblem(
        weight=apart(weight, moments.blocks),
        hessian=hessian,
        bits=bits.weight,
        scale_floor=np.repeat(_scale_floor(weight, bias, grid), moments.blocks, axis=0),
        kernel=kernel,
        pair_limit=_pair_limit(graph, layer, bits.weight, grid, config),
        sparsity=pruning.sparsity,
        nm=pruning.nm,
        vectors=vectors_of(layer, weight.shape[-1] // kernel, bits),
        blocks=moments.blocks,
    )
    stored_mean = mean if grid is None else mean + _mean_shift(grid, samples.values[layer.input], mean.shape, kernel)
    return Task(layer, bits, method_of(config, bits, pruning.asked), grid, problem, bias, mean, stored_mean)


def bias_behind_grid(
    graph: Graph, layer: Layer, bits: Bits, grids: Mapping[str, ActivationGrid], samples: Samples, config: Config
) -> F64:
    """The bias, [out of all groups], that takes up the mean error of the input's grid, with the weight in float."""
    parts = []
    for rows in blocks(graph, layer):
        task = pose(graph, layer, bits, Pruning(), grids, samples, config, rows)
        parts.append(_settle(task, float_solution(task.problem, task.problem.weight)).stored_bias)
    return _rows_joined(layer, parts)


def _joined(graph: Graph, parts: Sequence[Solved]) -> Solved:
    """One answer from those for blocks of output channels."""
    first, layer = parts[0], parts[0].layer
    solutions = [part.solution for part in parts]
    values, rounding = None, None
    if first.solution.rounding is None:
        values = graph.keep(np.concatenate([one.weight for one in solutions], axis=1))
    else:
        found = [one.rounding for one in solutions if one.rounding is not None]
        codes = graph.keep(np.concatenate([one.codes for one in found], axis=1))
        scale = np.concatenate([one.scale for one in found], axis=1)
        multipliers = [one.multiplier for one in found if one.multiplier is not None]
        rounding = Rounding(codes, scale, np.concatenate(multipliers, axis=1) if multipliers else None)
    notes = tuple(dict.fromkeys(note for one in solutions for note in one.notes))
    return replace(
        first,
        solution=LayerSolution(values, rounding, sum(one.loss for one in solutions), notes),
        bias=_rows_joined(layer, [part.bias for part in parts]),
        drift=_rows_joined(layer, [part.drift for part in parts]),
    )


def _rows_joined(layer: Layer, parts: Sequence[F64]) -> F64:
    """Values of all output channels, group by group, from those of blocks of each group's."""
    return np.concatenate([part.reshape(layer.groups, -1) for part in parts], axis=1).ravel()


def _solve(task: Task) -> LayerSolution:
    if not task.method:
        return float_solution(task.problem, task.problem.weight)
    return SOLVERS[task.method].solve(task.problem)


def _factors(first: Task, task: Task) -> F64:
    """[groups * blocks, out]: how many times the first one's rows the task's are."""
    problem, blocks = task.problem, task.problem.blocks
    return np.repeat(factors(together(first.problem.weight, blocks), together(problem.weight, blocks)), blocks, axis=0)


def _joint(tasks: Sequence[Task], by: Sequence[F64]) -> LayerProblem:
    """The problem of the first one's weight on the inputs of all.

    Its scales fit a bias of one reader at least. What others store then is too large by less than 127 floors, whose products
    with any inputs are some 1e-4 of their bias: a channel of which no more than that varies says nothing.
    """
    first = tasks[0].problem
    hessian = joint(first.weight, [one.problem.hessian for one in tasks])
    floors = [
        np.divide(one.problem.scale_floor, factor, out=np.full_like(factor, np.inf), where=factor > 0)
        for one, factor in zip(tasks, by, strict=True)
    ]
    floor = np.min(floors, axis=0)  # the first one's factors are 1
    return replace(first, hessian=hessian, scale_floor=floor)


def _times(found: LayerSolution, factor: F64, task: Task) -> LayerSolution:
    """The joint problem's answer for one of the tasks."""
    if found.rounding is None:
        return replace(float_solution(task.problem, found.weight), notes=found.notes)
    scale = storable(np.maximum(found.rounding.scale * factor, LEAST_SCALE), task.problem.scale_floor)
    return solution(task.problem, replace(found.rounding, scale=scale), found.notes)


def patch_moments(layer: Layer, moments: Moments, mean_share: float) -> tuple[F64, F64]:
    """Mean [groups, in] and second moments [groups, in, in] of what a canonical weight's rows meet; blocks are groups.

    Around the mean, but for this share of its square: the bias takes up the mean error. Without what chance made of the
    correlations: a solver would spend its freedom on them.
    """
    mean, hessian = moments.mean, moments.covariance
    if mean_share > 0:
        hessian += mean_share * mean[:, :, None] * mean[:, None, :]
    kernel = layer.kernel_size
    if layer.op != "ConvTranspose" or kernel == 1:
        return mean, hessian
    # Its patches are single positions; each kernel position meets another one.
    return np.tile(mean, (1, kernel)), np.stack([np.kron(np.eye(kernel), block) for block in hessian])


def _settle(task: Task, solution: LayerSolution) -> Solved:
    problem, stored = task.problem, solution.weight
    correction = summed(mean_correction(problem.weight, stored, task.mean, task.mean), problem.blocks)  # [groups, out]
    drift = summed(-mean_correction(stored, stored, task.mean, task.stored_mean), problem.blocks)
    bias = task.bias + correction.ravel()
    return Solved(task.layer, task.bits, task.method, _whole(solution, problem.blocks), bias, drift.ravel(), task.grid)


def _whole(solution: LayerSolution, blocks: int) -> LayerSolution:
    """The answer with the blocks of each group's inputs joined."""
    values, rounding = solution.values, solution.rounding
    if rounding is not None:
        multiplier = None if rounding.multiplier is None else together(rounding.multiplier, blocks)
        rounding = Rounding(together(rounding.codes, blocks), rounding.scale[::blocks], multiplier)
    return replace(solution, values=None if values is None else together(values, blocks), rounding=rounding)


def _mean_shift(grid: ActivationGrid, values: np.ndarray, shape: tuple[int, ...], kernel: int) -> F64:
    """E[q(x)] - E[x] of each input, [groups, in]; the same at all kernel positions. values [channels, values]."""
    exact = values.astype(np.float64)
    shift = (grid.quantize(exact) - exact).mean(-1).reshape(shape[0], 1, -1)  # [groups, 1, channels / groups]
    return np.broadcast_to(shift, (shape[0], kernel, shift.shape[-1])).reshape(shape)


def method_of(config: Config, bits: Bits, pruned: bool) -> str:
    """The key of SOLVERS that the configuration means for a layer; empty where its weight stays as it is."""
    if bits.weight is None and not pruned:
        return ""
    if config.method != "auto":
        return config.method
    return AUTO_PRUNING if pruned else AUTO_BLIND if config.source == "none" else AUTO_METHOD


def _scale_floor(weight: F64, bias: F64, grid: ActivationGrid | None) -> F64:
    """[groups, out]: below this scale the int32 bias would overflow."""
    groups, out, _ = weight.shape
    if grid is None:
        return np.zeros((groups, out))
    return np.abs(bias).reshape(groups, out) / (grid.scale * LARGEST_BIAS)


def pair_limits(
    graph: Graph, layers: Sequence[Layer], plan: Mapping[str, Bits], grids: Mapping[str, ActivationGrid], config: Config
) -> dict[str, int]:
    """Of the layers, by name, that have one at these bits: what two neighbouring codes may add up to."""
    found = {}
    for layer in layers:
        bits = plan[layer.name]
        grid = grids[layer.input] if bits.activation is not None else None
        if (limit := _pair_limit(graph, layer, bits.weight, grid, config)) is not None:
            found[layer.name] = limit
    return found


def _pair_limit(
    graph: Graph, layer: Layer, bits: int | None, grid: ActivationGrid | None, config: Config
) -> int | None:
    """Only 8-bit codes need it (`largest_code` bounds the products of fewer), and onnxruntime's depthwise kernels do not."""
    depthwise = is_depthwise(graph, layer) and shape_of(graph, layer)[1] == 1
    saturates = bits == 8 and not depthwise and grid is not None and _saturates(grid.bits, config)
    return PAIR_LIMIT if saturates else None


def _bounded(bits: Bits, pruning: Pruning, grid: ActivationGrid | None, moments: Moments, config: Config) -> Bits:
    """The bits with the multipliers that the layer can have.

    What is pruned has none, blocks of inputs hold whole runs, and the input's grid says how large the products may be.
    """
    cut = moments.blocks > 1 and bits.vector_size and moments.mean.shape[-1] % bits.vector_size
    if pruning.asked or cut:
        return replace(bits, vector_size=0)
    return bits if grid is None else replace(bits, largest=largest_code(grid.bits, config))


def largest_code(activation_bits: int | None, config: Config) -> int:
    """That a code times its multiplier may be: two neighbours of it do not saturate."""
    return PAIR_LIMIT // 2 if _saturates(activation_bits, config) else LARGEST_CODE


def _saturates(activation_bits: int | None, config: Config) -> bool:
    """Whether sums of two products of int8 codes with such inputs may be too large for 16 bits."""
    return activation_bits == 8 and TARGETS[config.target].pair_safe
