"""Transforms of channel groups that make layers easier to quantize, taken where the predicted error falls.

For a group with values t, covariance S = E[t t^T] and reading weights W, the transformed tensor is A t and the readers
become W A^-1; the network's function stays. With G = W^T W the error of a grid on t, at the layers' outputs, is
proportional to the range of A t squared times tr(A^-T G A^-1). Where the gradients of the model's outputs are known, G is
their second moment at t instead, and errors count as they show there. For random directions the error is least at

    A = R M^(1/2),    M = S^-1 #_(1/2) G    (the geometric mean of S^-1 and G),    R a rotation (rotation.py),

and the error of rounding W depends on the evenness of W A^-1 instead, which M = G serves best; the geodesic

    M_t = G^(1/2) (G^(-1/2) S^-1 G^(-1/2))^t G^(1/2),    0 <= t <= 1/2

joins the two. Where a Relu stands in between, A must be a positive diagonal: the same with the diagonals of S and G
(cross-layer equalization: Nagel et al., arXiv 1906.04721). The mean of a linear group moves into the biases.

Behind a Clip(0, c), a channel is multiplied by

    c / min(c, beta + 12 |gamma|, u)

so that the Clip stands where the channel's own range ends, and all channels fill one grid; u is what no image exceeds,
known behind the first layer. This step alone changes the float function, by values beyond 12 deviations: one in 20 million of
Laplace's distribution.

Beside a gate (h-swish, SiLU) one grid holds all channels best where each fills it, a = 1 / reach, of what beta +- 12 |gamma|
allow and the gate tells apart; its error is counted through the slope of the gate.

Each candidate is tried on the samples: activations on the grid of least error, weights by second-order rounding, both
errors counted at the outputs of the layers that read the group. The identity is always among the candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from onnx_lwdf.activations.taps import Moments, Samples
from onnx_lwdf.gates import Span, scale_input, scale_output
from onnx_lwdf.gradients import Sensitivities, strengths
from onnx_lwdf.graph import Graph, attribute
from onnx_lwdf.grid import nearest, search_weight_grid
from onnx_lwdf.layers import Bits, Layer, bias_of, set_bias, set_weight, weight_of
from onnx_lwdf.precondition.bounds import Range, highest
from onnx_lwdf.precondition.channels import ChannelGroup, Place
from onnx_lwdf.precondition.norms import change_norm_input, change_norm_output
from onnx_lwdf.precondition.readers import Gated, beside_gates, by_channel, output_power
from onnx_lwdf.precondition.rotation import spreading
from onnx_lwdf.ranges import ActivationGrid, grid_for, search_grid
from onnx_lwdf.sites import JOIN_BITS
from onnx_lwdf.solvers.gptq import conditional_variances
from onnx_lwdf.solvers.problem import F64
from onnx_lwdf.statistics import ChannelStatistics, Statistics

GEODESIC = (0.0, 0.25, 0.5)
BELOW = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # what a grid beside a gate has below 0, to what it has above
RIDGE = 1e-3  # of the largest eigenvalue: directions that hardly occur are not stretched without end
WEAKEST = 1e-8  # of the strongest channel's power: a normalization makes such a channel as strong as the others
MOST_ROWS = 64  # of a weight, for the prediction
MOST_STRETCHED = 256.0  # a weaker channel has less than one code in 8 bits: it is dead, and stays so
CLEAR_GAIN = 0.97  # a transform must lower the predicted error by more than the prediction's own noise
MOST_CHANNELS = 1024  # of a matrix transform: it costs channels^3


@dataclass(frozen=True, slots=True)
class Transform:
    """t -> A (t - shift); `matrix` is diagonal where it stands behind a Relu."""

    matrix: F64  # [channels, channels]
    inverse: F64
    shift: Mapping[str, F64]  # tensor -> [channels]; empty where no mean is moved
    ceiling: float | None = None  # where a Clip cuts A t

    def of(self, place: Place) -> Transform:
        """What a diagonal one does to these channels."""
        if isinstance(place, slice):
            return self
        return replace(self, matrix=np.diag(np.diag(self.matrix)[place]), inverse=np.diag(np.diag(self.inverse)[place]))


def _diagonal(factor: F64, shift: Mapping[str, F64] = MappingProxyType({})) -> Transform:
    return Transform(np.diag(factor), np.diag(1 / factor), shift)


def transform_groups(
    graph: Graph,
    groups: Sequence[ChannelGroup],
    plan: Mapping[str, Bits],
    samples: Samples,
    statistics: Statistics,
    gradients: Sensitivities = MappingProxyType({}),
    pixels: Mapping[str, Range] = MappingProxyType({}),
) -> tuple[Samples, Statistics, Sensitivities]:
    """Transform every channel group where that lowers the predicted error; the samples, statistics and gradients with it.

    `pixels`: tensors that carry the pixels of images -> their range.
    """
    gated = beside_gates(graph, groups, samples, statistics)
    for group in groups:
        if any(plan[layer.name].activation is None for layer in _gridded(group)):
            continue
        if not (group.consumers or group.norms_read or any(gate.input in gated.readings for gate in group.read)):
            continue
        candidates = [_identity(group), *_candidates(graph, group, samples, gated, statistics, gradients, pixels)]
        errors = [_predicted(graph, group, plan, samples, gated, gradients, candidate) for candidate in candidates]
        best = int(np.argmin(errors))
        if best and errors[best] < CLEAR_GAIN * errors[0]:
            samples = _apply(graph, group, samples, candidates[best])
            statistics = _transformed_statistics(statistics, group, candidates[best])
            inside = gradients.keys() & set(group.tensors)
            seen = {name: _seen(gradients[name], candidates[best].of(group.place(name))) for name in inside}
            gradients = {**gradients, **seen}
    return samples, statistics, gradients


def _seen(gradient: F64, transform: Transform) -> F64:
    """S of A t."""
    if gradient.ndim == 1:  # of channels that are not mixed
        return np.asarray(gradient * np.diag(transform.inverse) ** 2)
    return np.asarray(transform.inverse.T @ gradient @ transform.inverse)


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


def _gridded(group: ChannelGroup) -> list[Layer]:
    """The layers whose plan says whether the group's tensors have grids: its readers, or its writers where a gate reads."""
    return [*group.consumers, *(group.producers if group.read else ())]


def _identity(group: ChannelGroup) -> Transform:
    return Transform(np.eye(group.channels), np.eye(group.channels), {})


def _candidates(
    graph: Graph,
    group: ChannelGroup,
    samples: Samples,
    gated: Gated,
    statistics: Statistics,
    gradients: Sensitivities,
    pixels: Mapping[str, Range],
) -> list[Transform]:
    if group.written or group.read:
        return _equalized(group, gated)
    if group.ceiling is not None:
        (writer,) = group.producers
        return _stretched(group, group.ceiling, samples, statistics.get(writer.output), highest(graph, writer, pixels))
    if not group.plain:
        return _evened(graph, group, samples, gradients, _with_gradients(group, samples, gradients))
    matrix = group.linear and group.channels <= MOST_CHANNELS and all(layer.groups == 1 for layer in _layers(group))
    shift = _shifts(graph, group, samples) if group.linear else {}
    covariance, sensitivity = _moments(graph, group, samples, shift)
    if known := _with_gradients(group, samples, gradients):
        whole = [gradients[name] if gradients[name].ndim == 2 else np.diag(gradients[name]) for name in known]
        sensitivity = np.sum(whole, axis=0)
    if not matrix:
        covariance, sensitivity = np.diag(np.diag(covariance)), np.diag(np.diag(sensitivity))
    covariance, sensitivity = _ridged(covariance), _ridged(sensitivity)
    found = []
    for t in GEODESIC:
        root = _power(_geodesic(sensitivity, np.asarray(np.linalg.inv(covariance)), t), 0.5)
        root = root / np.exp(np.linalg.slogdet(root)[1] / group.channels)
        a = spreading(root @ _all_values(group, samples, shift)) @ root if matrix else root
        found.append(Transform(a, np.linalg.inv(a), shift))
    return found


def _evened(
    graph: Graph, group: ChannelGroup, samples: Samples, gradients: Sensitivities, sites: Sequence[str]
) -> list[Transform]:
    """The same, of a diagonal, for channels of which tensors hold some each; sites: the group's tensors with a grid."""
    shift = _shifts(graph, group, samples) if sites and group.centred else {}
    power, sensitivity, count = (np.zeros(group.channels) for _ in range(3))
    for name in sites:
        values = samples.values[name].astype(np.float64)
        values = values - shift.get(name, np.zeros(len(values)))[:, None]
        power += group.spread(name, (values**2).mean(1))
        sensitivity += group.spread(name, strengths(gradients[name]))
        count += group.spread(name, np.ones(len(values)))
    if not power.any() or not sensitivity.any():
        return []
    power = power / np.maximum(count, 1)
    power, sensitivity = np.maximum(power, WEAKEST * power.max()), sensitivity + RIDGE * sensitivity.max()
    factors = [(sensitivity ** (1 - t) / power**t) ** 0.5 for t in GEODESIC]
    return [_diagonal(factor / np.exp(np.log(factor).mean()), shift) for factor in factors]


def _stretched(
    group: ChannelGroup, ceiling: float, samples: Samples, known: ChannelStatistics | None, bound: F64
) -> list[Transform]:
    """Every channel fills the range up to the Clip's ceiling; what the samples hold is never cut.

    bound [channels]: what no channel exceeds, whatever the image.

    Nothing where BatchNormalization is not stored: samples of rare activations end far below these.
    """
    if known is None or known.far is None:
        return []
    seen = np.max([samples.values[reader.input].max(1) for reader in group.consumers], axis=0)
    reach = np.maximum(np.minimum(known.mean + known.far, bound), seen)
    alive = reach > ceiling / MOST_STRETCHED
    factor = ceiling / np.where(alive, np.minimum(reach, ceiling), ceiling)
    return [Transform(np.diag(factor), np.diag(1 / factor), {}, ceiling)]


def _equalized(group: ChannelGroup, gated: Gated) -> list[Transform]:
    """Beside gates every channel fills the grid: a = 1 / reach, the least error of one grid for all channels."""
    names = [gate.input for gate in group.read if gate.input in gated.readings]
    low, high = np.full(group.channels, -np.inf), np.full(group.channels, -np.inf)
    for name in (*names, *(layer.input for layer in group.consumers)):
        np.maximum.at(low, group.numbers(name), -gated.spans[name].low)
        np.maximum.at(high, group.numbers(name), gated.spans[name].high)
    found = []
    for below in BELOW:
        wide = np.maximum(high, low / below)
        wide = np.maximum(wide, max(wide.max() / MOST_STRETCHED, np.finfo(np.float64).tiny))
        factor = np.exp(np.log(wide).mean()) / wide
        found.append(_diagonal(factor))
    return found


def _all_values(group: ChannelGroup, samples: Samples, shift: Mapping[str, F64]) -> F64:
    """Values of a linear group's tensors behind the shift, [channels, values]."""
    zero = np.zeros(group.channels)
    names = dict.fromkeys([*(layer.input for layer in group.consumers), *(layer.output for layer in group.producers)])
    return np.concatenate([samples.values[name] - shift.get(name, zero)[:, None] for name in names], axis=1)


def _layers(group: ChannelGroup) -> list[Layer]:
    return [*group.producers, *group.consumers]


def _moments(graph: Graph, group: ChannelGroup, samples: Samples, shift: Mapping[str, F64]) -> tuple[F64, F64]:
    """E[t t^T] behind the shift and W^T W, [channels, channels], summed over the readers, each at its output's scale."""
    covariance, sensitivity = np.zeros((group.channels,) * 2), np.zeros((group.channels,) * 2)
    for layer in group.consumers:
        values = samples.values[layer.input].astype(np.float64)
        values = values - shift.get(layer.input, np.zeros(group.channels))[:, None]
        covariance += values @ values.T / values.shape[1]
        weight = by_channel(weight_of(graph, layer), group.channels)  # [rows, channels]
        sensitivity += weight.T @ weight / output_power(graph, layer, samples)
    return covariance / len(group.consumers), sensitivity


def _shifts(graph: Graph, group: ChannelGroup, samples: Samples) -> dict[str, F64]:
    """The mean of every tensor of a group between whose ends nothing bends the values.

    Empty where a reader pads, or a pool counts its padding (a shifted zero would not be zero), or where a reader has no bias
    that could take the mean up.
    """
    for layer in group.consumers:
        if layer.bias is None:
            return {}
        if layer.window is not None and (layer.window.pads is None or any(layer.window.pads)):
            return {}
    made = [*(layer.output for layer in group.producers), *(norm.output for norm in group.norms_written)]
    means = {name: samples.values[name].mean(1, dtype=np.float64) for name in made if name in samples.values}
    for name in group.tensors:
        if name not in means:
            node = graph.producer[name]
            if attribute(node, "count_include_pad", 0):
                return {}
            sources = [source for source in node.input if graph.constant(source) is None]
            if name in made or any(source not in means for source in sources):
                return {}
            parts = [means[source] for source in sources]
            means[name] = np.concatenate(parts) if node.op_type == "Concat" else np.sum(parts, axis=0)
    return means


def _ridged(matrix: F64) -> F64:
    return matrix + RIDGE * float(np.linalg.eigvalsh(matrix)[-1] + np.finfo(np.float64).tiny) * np.eye(len(matrix))


def _power(matrix: F64, exponent: float) -> F64:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.asarray((vectors * np.maximum(values, np.finfo(np.float64).tiny) ** exponent) @ vectors.T)


def _geodesic(start: F64, end: F64, t: float) -> F64:
    root, inverse = _power(start, 0.5), _power(start, -0.5)
    return np.asarray(root @ _power(inverse @ end @ inverse, t) @ root)


def _predicted(
    graph: Graph,
    group: ChannelGroup,
    plan: Mapping[str, Bits],
    samples: Samples,
    gated: Gated,
    gradients: Sensitivities,
    transform: Transform,
) -> float:
    """Error of the readers' grids, their weights, and the writers' weights: relative to the power of the model's outputs
    where gradients are known, of the readers' outputs where they are not.
    """
    if known := _with_gradients(group, samples, gradients):
        return _predicted_at_outputs(graph, group, plan, samples, gradients, known, transform)
    total, seen = 0.0, np.zeros(group.channels)
    for layer in group.consumers:
        power, part = output_power(graph, layer, samples), transform.of(group.place(layer.input))
        weight = _transformed_reader(weight_of(graph, layer), part.inverse)
        moments = _transformed_moments(samples.moments[layer.name], part, layer.input)
        values = _transformed_values(samples.values[layer.input], part, layer.input)
        energy = (by_channel(weight, len(values)) ** 2).sum(0)
        bits = plan[layer.name]
        grid = _grid(values, energy, bits.activation or 8, gated.spans.get(layer.input), part)
        error = ((grid.quantize(values) - values) ** 2).mean(1)
        total += float(error @ energy + _rounding(weight, moments.hessian, bits.weight or 8).sum()) / power
        seen += group.spread(layer.input, energy / power)
    for name in (name for name in group.tensors if name in gated.readings):
        part = transform.of(group.place(name))
        values = part.matrix @ gated.spans[name].clip(samples.values[name])
        energy = gated.readings[name] * np.diag(part.inverse) ** 2
        grid = _grid(values, energy, JOIN_BITS, gated.spans[name], part)
        total += float(((grid.quantize(values) - values) ** 2).mean(1) @ energy)
        seen += group.spread(name, energy)
    for layer in group.producers:
        place = group.place(layer.output)
        weight = _transformed_writer(weight_of(graph, layer), transform.of(place).matrix)
        writer_bits = plan[layer.name].weight or 8
        total += float(seen[place] @ _rounding(weight, samples.moments[layer.name].hessian, writer_bits).ravel())
    return total


def _predicted_at_outputs(
    graph: Graph,
    group: ChannelGroup,
    plan: Mapping[str, Bits],
    samples: Samples,
    gradients: Sensitivities,
    sites: Sequence[str],
    transform: Transform,
) -> float:
    """The same through the gradients; `sites`: the group's tensors that have a grid."""
    readers = {layer.input: plan[layer.name].activation for layer in group.consumers}
    total = 0.0
    for name in sites:
        part = transform.of(group.place(name))
        energy = strengths(_seen(gradients[name], part))
        values = _transformed_values(samples.values[name], part, name)
        grid = _grid(values, energy, readers.get(name) or JOIN_BITS, None, part)
        total += float(((grid.quantize(values) - values) ** 2).mean(1) @ energy)
    for layer in group.consumers:
        part = transform.of(group.place(layer.input))
        weight = _transformed_reader(weight_of(graph, layer), part.inverse)
        hessian = _transformed_moments(samples.moments[layer.name], part, layer.input).hessian
        error = _rounding(weight, hessian, plan[layer.name].weight or 8).ravel()
        total += float(error @ strengths(gradients[layer.output]))
    for layer in group.producers:
        part = transform.of(group.place(layer.output))
        weight = _transformed_writer(weight_of(graph, layer), part.matrix)
        error = _rounding(weight, samples.moments[layer.name].hessian, plan[layer.name].weight or 8).ravel()
        total += float(error @ strengths(_seen(gradients[layer.output], part)))
    return total


def _grid(values: F64, energy: F64, bits: int, span: Span | None, transform: Transform) -> ActivationGrid:
    """The grid over what the transformed channels may reach, else that of the least error on these values."""
    if span is None or bits < 8:
        return search_grid(values.ravel(), np.repeat(energy, values.shape[1]), bits)
    factor = np.diag(transform.matrix)
    return grid_for(float((factor * span.low).min()), float((factor * span.high).max()), bits)


def _rounding(weight: F64, hessian: F64, bits: int | None) -> F64:
    """Predicted loss of every output channel, [groups, out], by second-order rounding.

    Rows are sampled where there are many, and their mean stands for the others.
    """
    if bits is None:
        return np.zeros(weight.shape[:2])
    rows = weight[:, :: max(1, -(-weight.shape[1] // MOST_ROWS))]
    importance = conditional_variances(hessian)
    grid = search_weight_grid(rows, importance, bits, None, np.zeros(rows.shape[:2]))
    error = np.einsum("goi,gi->go", (nearest(rows, grid) * grid.scale[..., None] - rows) ** 2, importance)
    if rows.shape[1] == weight.shape[1]:
        return error
    return np.broadcast_to(error.mean(1, keepdims=True), weight.shape[:2])


def _transformed_reader(weight: F64, inverse: F64) -> F64:
    """[groups, out, in] -> W A^-1 at every kernel position."""
    groups, out, _ = weight.shape
    channels = len(inverse) // groups
    split = weight.reshape(groups, out, -1, channels)
    if groups == 1:
        return (split @ inverse).reshape(weight.shape)
    return (split * np.diag(inverse).reshape(groups, 1, 1, channels)).reshape(weight.shape)


def _transformed_writer(weight: F64, matrix: F64) -> F64:
    """[groups, out, in] -> A W."""
    if weight.shape[0] == 1:
        return (matrix @ weight[0])[None]
    return weight * np.diag(matrix).reshape(weight.shape[0], -1, 1)


def _transformed_values(values: np.ndarray, transform: Transform, tensor: str) -> F64:
    shift = transform.shift.get(tensor, np.zeros(len(transform.matrix)))
    changed = transform.matrix @ (values.astype(np.float64) - shift[:, None])
    return changed if transform.ceiling is None else np.minimum(changed, transform.ceiling)


def _transformed_moments(moments: Moments, transform: Transform, tensor: str) -> Moments:
    """Moments of the patches whose channels are A (t - shift)."""
    groups, inputs = moments.mean.shape
    channels = len(transform.matrix) // groups
    kernel = inputs // channels
    if groups > 1:  # diagonal, and without a shift: such a reader pads or stands behind a Relu
        factor = np.tile(np.diag(transform.matrix).reshape(groups, 1, channels), (1, kernel, 1)).reshape(groups, inputs)
        hessian = moments.hessian * factor[:, :, None] * factor[:, None, :]
        return Moments(moments.mean * factor, hessian, moments.doubt)
    shift = np.tile(transform.shift.get(tensor, np.zeros(channels)), kernel)  # [in]
    mean, hessian = moments.mean[0], moments.hessian[0]
    centered = hessian - np.outer(shift, mean) - np.outer(mean, shift) + np.outer(shift, shift)
    full = np.kron(np.eye(kernel), transform.matrix)
    return Moments((full @ (mean - shift))[None], (full @ centered @ full.T)[None], moments.doubt)


def _transformed_statistics(statistics: Statistics, group: ChannelGroup, transform: Transform) -> Statistics:
    """A diagonal transform scales them; of mixed channels the deviations are not known."""
    factor = np.diag(transform.matrix)
    inside = statistics.keys() & set(group.tensors)
    others = {name: value for name, value in statistics.items() if name not in inside}
    if np.count_nonzero(transform.matrix) > len(factor):
        return others
    scales = {name: factor[group.place(name)] for name in inside}
    shifts = {name: -scale * transform.shift.get(name, np.zeros(len(scale))) for name, scale in scales.items()}
    return others | {name: statistics[name].through(scales[name], shifts[name]) for name in inside}


def _apply(graph: Graph, group: ChannelGroup, samples: Samples, transform: Transform) -> Samples:
    """Write the transform into the weights and biases, and into the samples."""
    shift, factor = transform.shift, np.diag(transform.matrix)

    def part(name: str) -> Transform:  # made when needed: of all tensors at once they would be many matrices
        return transform.of(group.place(name))

    for layer in group.producers:
        a, bias = part(layer.output).matrix, bias_of(graph, layer)
        set_weight(graph, layer, _transformed_writer(weight_of(graph, layer), a))
        set_bias(graph, layer, a @ (bias - shift.get(layer.output, np.zeros(len(bias)))))
    for gate in group.written:
        scale_output(graph, gate, factor[group.place(gate.output)])
    for gate in group.read:
        scale_input(graph, gate, factor[group.place(gate.input)])
    for norm in group.norms_written:
        change_norm_output(graph, norm, factor[group.place(norm.output)], shift.get(norm.output))
    for norm in group.norms_read:
        change_norm_input(graph, norm, factor[group.place(norm.input)], shift.get(norm.input))
    moments = dict(samples.moments)
    for layer in group.consumers:
        weight = weight_of(graph, layer)
        if layer.input in shift:
            split = weight.reshape(*weight.shape[:2], layer.kernel_size, -1)  # [groups, out, kernel, channels / groups]
            taken = np.einsum("gokc,gc->go", split, shift[layer.input].reshape(layer.groups, -1))
            set_bias(graph, layer, bias_of(graph, layer) + taken.ravel())
        set_weight(graph, layer, _transformed_reader(weight, part(layer.input).inverse))
        moments[layer.name] = _transformed_moments(moments[layer.name], part(layer.input), layer.input)
    seen = set(group.tensors) & samples.values.keys()
    changed = {name: _transformed_values(samples.values[name], part(name), name).astype(np.float32) for name in seen}
    return replace(samples, moments=moments, values={**samples.values, **changed})
