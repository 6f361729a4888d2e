"""Transforms of a channel group that may make its layers easier to quantize.

For a group with values t, covariance C = E[t t^T] and S, how strongly what follows answers to errors of t (readers.py), the
error of a grid on t is proportional to the range of A t squared times tr(A^-T S A^-1). For random directions it is least at

    A = R M^(1/2),    M = C^-1 #_(1/2) S    (the geometric mean of C^-1 and S),    R a rotation (rotation.py),

and the error of rounding the readers' weights depends on their evenness instead, which M = S serves best; the geodesic

    M_t = S^(1/2) (S^(-1/2) C^-1 S^(-1/2))^t S^(1/2),    0 <= t <= 1/2

joins the two. Where a Relu stands in between, A must be a positive diagonal: the same with the diagonals of C and S
(cross-layer equalization: Nagel et al., arXiv 1906.04721). The mean of a linear group moves into the biases.

Behind a Clip(0, c), a channel is multiplied by

    c / min(c, beta + 12 |gamma|, u)

so that the Clip stands where the channel's own range ends, and all channels fill one grid; u is what no image exceeds,
known behind the first layer. This alone changes the float function, by values beyond 12 deviations: one in 20 million of
Laplace's distribution.

Beside a gate (h-swish, SiLU) one grid holds all channels best where each fills it, a = 1 / reach, of what beta +- 12 |gamma|
allow and the gate tells apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnx_lwdf.activations.taps import Samples
from onnx_lwdf.gates import Span
from onnx_lwdf.graph import Graph, attribute, operator
from onnx_lwdf.precondition.bounds import Range, highest
from onnx_lwdf.precondition.channels import ChannelGroup
from onnx_lwdf.precondition.readers import Answers
from onnx_lwdf.precondition.rotation import spreading
from onnx_lwdf.precondition.transform import Transform, diagonal
from onnx_lwdf.solvers.problem import F64
from onnx_lwdf.statistics import ChannelStatistics, Statistics

GEODESIC = (0.0, 0.25, 0.5)
BELOW = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # what a grid beside a gate has below 0, to what it has above
RIDGE = 1e-3  # of the largest eigenvalue: directions that hardly occur are not stretched without end
WEAKEST = 1e-8  # of the strongest channel's power: a normalization makes such a channel as strong as the others
MOST_STRETCHED = 256.0  # a weaker channel has less than one code in 8 bits: it is dead, and stays so


def candidates(
    graph: Graph,
    group: ChannelGroup,
    samples: Samples,
    answers: Answers,
    spans: Mapping[str, Span],
    statistics: Statistics,
    pixels: Mapping[str, Range],
) -> list[Transform]:
    """What may be tried in place of the identity.

    spans: tensors beside gates -> what they may reach. pixels: tensors that carry the pixels of images -> their range.
    """
    if group.written or group.read:
        return _filled(group, spans)
    if group.ceiling is not None:
        reaches = [_reach(statistics.get(one.output), highest(graph, one, pixels)) for one in group.producers]
        return _stretched(group, group.ceiling, samples, [reach for reach in reaches if reach is not None])
    if not group.plain:
        return _scaled(graph, group, samples, answers)
    return _even(graph, group, samples, answers)


def _even(graph: Graph, group: ChannelGroup, samples: Samples, answers: Answers) -> list[Transform]:
    """Along the geodesic: all channels of one size and one importance."""
    shift = _shifts(graph, group, samples) if group.linear else {}
    if group.mixed:
        return _mixed(group, samples, answers, shift)
    parts = [_centred(samples, layer.input, shift) for layer in group.consumers]
    power = np.mean([(part**2).mean(1) for part in parts], axis=0)
    sensitivity = np.sum([site.strength for site in answers.sites], axis=0)
    if _silent(power, sensitivity):
        return []
    return _diagonals(_ridged(power), _ridged(sensitivity), shift)


def _mixed(group: ChannelGroup, samples: Samples, answers: Answers, shift: Mapping[str, F64]) -> list[Transform]:
    """Any invertible matrices."""
    covariance = np.zeros((group.channels,) * 2)
    for layer in group.consumers:
        part = _centred(samples, layer.input, shift)
        covariance += part @ part.T / part.shape[1]
    sensitivity = np.sum([site.matrix for site in answers.sites], axis=0)
    if _silent(covariance, sensitivity):
        return []
    covariance, sensitivity = _ridged(covariance / len(group.consumers)), _ridged(sensitivity)
    names = dict.fromkeys([*(layer.input for layer in group.consumers), *(layer.output for layer in group.producers)])
    values = np.concatenate([_centred(samples, name, shift) for name in names], axis=1)
    found = []
    for t in GEODESIC:
        root = _power(_geodesic(sensitivity, np.asarray(np.linalg.inv(covariance)), t), 0.5)
        root = root / np.exp(np.linalg.slogdet(root)[1] / group.channels)
        matrix = spreading(root @ values) @ root
        found.append(Transform(matrix, np.linalg.inv(matrix), shift))
    return found


def _scaled(graph: Graph, group: ChannelGroup, samples: Samples, answers: Answers) -> list[Transform]:
    """The same, of a diagonal, for channels of which tensors hold some each."""
    shift = _shifts(graph, group, samples) if group.centred else {}
    power, sensitivity, count = (np.zeros(group.channels) for _ in range(3))
    for site in answers.sites if answers.at_outputs else ():
        part = _centred(samples, site.tensor, shift)
        power += group.spread(site.tensor, (part**2).mean(1))
        sensitivity += group.spread(site.tensor, site.strength)
        count += group.spread(site.tensor, np.ones(len(part)))
    if _silent(power, sensitivity):
        return []
    power = power / np.maximum(count, 1)
    return _diagonals(np.maximum(power, WEAKEST * power.max()), sensitivity + RIDGE * sensitivity.max(), shift)


def _diagonals(power: F64, sensitivity: F64, shift: Mapping[str, F64]) -> list[Transform]:
    factors = [(sensitivity ** (1 - t) / power**t) ** 0.5 for t in GEODESIC]
    return [diagonal(factor / np.exp(np.log(factor).mean()), shift) for factor in factors]


def _reach(known: ChannelStatistics | None, bound: F64) -> F64 | None:
    """Where the channels of a producer end, [channels]; None where BatchNormalization is not stored.

    bound [channels]: what no channel exceeds, whatever the image.
    """
    return None if known is None or known.far is None else np.minimum(known.mean + known.far, bound)


def _stretched(group: ChannelGroup, ceiling: float, samples: Samples, reaches: Sequence[F64]) -> list[Transform]:
    """Every channel fills the range up to the Clip's ceiling; what the samples hold is never cut.

    Nothing where a producer's reach is not known: samples of rare activations end far below these.
    """
    if len(reaches) < len(group.producers):
        return []
    seen = [samples.values[reader.input].max(1) for reader in group.consumers]
    reach = np.max([*reaches, *seen], axis=0)
    alive = reach > ceiling / MOST_STRETCHED
    factor = ceiling / np.where(alive, np.minimum(reach, ceiling), ceiling)
    return [diagonal(factor, ceiling=ceiling)]


def _filled(group: ChannelGroup, spans: Mapping[str, Span]) -> list[Transform]:
    """Beside gates every channel fills the grid: a = 1 / reach, the least error of one grid for all channels."""
    names = [gate.input for gate in group.read if gate.input in spans]
    low, high = np.full(group.channels, -np.inf), np.full(group.channels, -np.inf)
    for name in (*names, *(layer.input for layer in group.consumers)):
        np.maximum.at(low, group.numbers(name), -spans[name].low)
        np.maximum.at(high, group.numbers(name), spans[name].high)
    found = []
    for below in BELOW:
        wide = np.maximum(high, low / below)
        wide = np.maximum(wide, max(wide.max() / MOST_STRETCHED, np.finfo(np.float64).tiny))
        factor = np.exp(np.log(wide).mean()) / wide
        found.append(diagonal(factor))
    return found


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
            means[name] = np.concatenate(parts) if operator(node) == "Concat" else np.sum(parts, axis=0)
    return means


def _silent(power: F64, sensitivity: F64) -> bool:
    """Whether nothing is known that a transform could even out: the channels are dead, or what reads them is."""
    return not (power.any() and sensitivity.any())


def _centred(samples: Samples, tensor: str, shift: Mapping[str, F64]) -> F64:
    """The tensor's values behind the shift, [channels, values]."""
    values = samples.values[tensor].astype(np.float64)
    return values - shift[tensor][:, None] if tensor in shift else values


def _ridged(matrix: F64) -> F64:
    """The matrix, or the diagonal of one, and a share of its largest eigenvalue on its diagonal."""
    if matrix.ndim == 1:
        return matrix + RIDGE * float(matrix.max())
    return matrix + RIDGE * float(np.linalg.eigvalsh(matrix)[-1]) * np.eye(len(matrix))


def _power(matrix: F64, exponent: float) -> F64:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return np.asarray((vectors * np.maximum(values, np.finfo(np.float64).tiny) ** exponent) @ vectors.T)


def _geodesic(start: F64, end: F64, t: float) -> F64:
    root, inverse = _power(start, 0.5), _power(start, -0.5)
    return np.asarray(root @ _power(inverse @ end @ inverse, t) @ root)
