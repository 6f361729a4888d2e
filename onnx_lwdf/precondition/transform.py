"""An invertible map of a channel group, t -> A (t - shift), and what it makes of all that holds or reads the channels.

Layers that write the group become A W, layers that read it W A^-1; the shift goes into the biases, and the function stays. A is
a matrix where the channels may be mixed, else a positive diagonal. Behind a Clip(0, c) channels are cut at c as before; that
alone changes the function, by values beyond what was allowed for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from onnx_lwdf.activations.moments import Moments
from onnx_lwdf.activations.taps import Samples
from onnx_lwdf.gates import scale_input, scale_output
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import ALL, Layer, bias_of, set_bias, set_weight, weight_of
from onnx_lwdf.precondition.channels import ChannelGroup, Place
from onnx_lwdf.precondition.norms import change_norm_input, change_norm_output
from onnx_lwdf.solvers.problem import F64
from onnx_lwdf.statistics import Statistics


@dataclass(frozen=True, slots=True)
class Transform:
    """t -> A (t - shift)."""

    matrix: F64  # A, [channels, channels], or its diagonal, [channels]
    inverse: F64  # of A, as A is
    shift: Mapping[str, F64]  # tensor -> [channels]; empty where no mean is moved
    ceiling: float | None = None  # where a Clip cuts A t

    def of(self, place: Place) -> Transform:
        """What a diagonal one does to these channels."""
        if isinstance(place, slice):
            return self
        return replace(self, matrix=self.matrix[place], inverse=self.inverse[place])

    def values(self, values: np.ndarray, tensor: str) -> F64:
        """What becomes of a tensor's values, [channels, values]."""
        exact = values.astype(np.float64)
        if tensor in self.shift:
            exact -= self.shift[tensor][:, None]
        changed = _left(self.matrix, exact)
        return changed if self.ceiling is None else np.minimum(changed, self.ceiling)

    def gradient(self, gradient: F64) -> F64:
        """What becomes of S, the second moment of gradients at t, or of its diagonal."""
        if gradient.ndim == 1:  # of channels that are not mixed
            return np.asarray(gradient * (self.inverse if self.inverse.ndim == 1 else np.diag(self.inverse)) ** 2)
        return _right(_left(self.inverse.T, gradient), self.inverse)

    def reader(self, weight: F64) -> F64:
        """[groups, out, in] -> W A^-1 at every kernel position."""
        groups, out, _ = weight.shape
        split = weight.reshape(groups, out, -1, len(self.inverse) // groups)  # [groups, out, kernel, channels / groups]
        if self.inverse.ndim == 1:
            return (split * self.inverse.reshape(groups, 1, 1, -1)).reshape(weight.shape)
        return (split @ self.inverse).reshape(weight.shape)

    def writer(self, weight: F64, rows: slice = ALL) -> F64:
        """[groups, out, in] -> these rows of A W. Where channels are not mixed, the same rows of W are enough."""
        if self.matrix.ndim == 1:
            return weight * self.matrix.reshape(len(weight), -1, 1)[:, rows]
        return (self.matrix[rows] @ weight[0])[None]

    def moments(self, moments: Moments, tensor: str) -> Moments:
        """Those of a tensor's patches."""
        groups, inputs = moments.mean.shape
        channels = len(self.matrix) // groups
        kernel = inputs // channels

        def of_patches(values: F64) -> F64:
            """[channels] -> [groups, in]: the same at all kernel positions."""
            return np.tile(values.reshape(groups, 1, channels), (1, kernel, 1)).reshape(groups, inputs)

        mean, hessian = moments.mean, moments.hessian
        if tensor in self.shift:
            shift = of_patches(self.shift[tensor])
            hessian = hessian - _outer(shift, mean) - _outer(mean, shift) + _outer(shift, shift)
            mean = mean - shift
        if self.matrix.ndim == 1:
            factor = of_patches(self.matrix)
            return Moments(
                mean * factor, hessian * factor[:, :, None] * factor[:, None, :], moments.doubt, moments.blocks
            )
        full = np.kron(np.eye(kernel), self.matrix)
        return Moments((full @ mean[0])[None], full @ hessian @ full.T, moments.doubt)

    def statistics(self, statistics: Statistics, group: ChannelGroup) -> Statistics:
        """A diagonal one scales them; of mixed channels the deviations are not known."""
        inside = statistics.keys() & set(group.tensors)
        others = {name: value for name, value in statistics.items() if name not in inside}
        if self.matrix.ndim > 1:
            return others
        scales = {name: self.matrix[group.place(name)] for name in inside}
        shifts = {name: -scale * self.shift.get(name, np.zeros(len(scale))) for name, scale in scales.items()}
        return others | {name: statistics[name].through(scales[name], shifts[name]) for name in inside}


def diagonal(factor: F64, shift: Mapping[str, F64] = MappingProxyType({}), ceiling: float | None = None) -> Transform:
    """Each channel multiplied by its factor, [channels]."""
    return Transform(factor, 1 / factor, shift, ceiling)


def apply(graph: Graph, group: ChannelGroup, samples: Samples, transform: Transform) -> Samples:
    """Write the transform into the weights and biases, and into the samples."""
    shift, matrix = transform.shift, transform.matrix  # beside gates and normalizations a diagonal
    for layer in group.producers:
        part, bias = transform.of(group.place(layer.output)), bias_of(graph, layer)
        set_weight(graph, layer, part.writer(weight_of(graph, layer)))
        set_bias(graph, layer, _left(part.matrix, bias - shift.get(layer.output, 0.0)))
    for gate in group.written:
        scale_output(graph, gate, matrix[group.place(gate.output)])
    for gate in group.read:
        scale_input(graph, gate, matrix[group.place(gate.input)])
    for norm in group.norms_written:
        change_norm_output(graph, norm, matrix[group.place(norm.output)], shift.get(norm.output))
    for norm in group.norms_read:
        change_norm_input(graph, norm, matrix[group.place(norm.input)], shift.get(norm.input))
    moments = dict(samples.moments)
    for layer in group.consumers:
        part = transform.of(group.place(layer.input))
        change_reader(graph, layer, part)
        moments[layer.name] = part.moments(moments[layer.name], layer.input)
    changed = {
        name: transform.of(group.place(name)).values(samples.values[name], name).astype(np.float32)
        for name in group.tensors
        if name in samples.values
    }
    return replace(samples, moments=moments, values={**samples.values, **changed})


def change_reader(graph: Graph, layer: Layer, transform: Transform) -> None:
    """Let the layer read what becomes of its input."""
    weight = weight_of(graph, layer)
    if layer.input in transform.shift:
        split = weight.reshape(*weight.shape[:2], layer.kernel_size, -1)  # [groups, out, kernel, channels / groups]
        taken = np.einsum("gokc,gc->go", split, transform.shift[layer.input].reshape(layer.groups, -1))
        set_bias(graph, layer, bias_of(graph, layer) + taken.ravel())
    set_weight(graph, layer, transform.reader(weight))


def _outer(a: F64, b: F64) -> F64:
    """[groups, in] each -> [groups, in, in]."""
    return a[:, :, None] * b[:, None, :]


def _left(matrix: F64, values: F64) -> F64:
    """A t, of values [channels] or [channels, values]."""
    return np.asarray((matrix * values.T).T if matrix.ndim == 1 else matrix @ values)


def _right(values: F64, matrix: F64) -> F64:
    """Of values [values, channels]: each row times A."""
    return np.asarray(values * matrix if matrix.ndim == 1 else values @ matrix)
