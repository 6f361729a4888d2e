"""How strongly an error in one layer's output shows at the outputs of the model.

Each layer in turn runs with a damaged weight, its smallest weights gone and its bias corrected, all others intact:

    influence = (noise at the outputs / their power around the mean) / (the same ratio at the layer's own output)

To first order noises of different layers add up, so that influence times a layer's relative error is its share of the
noise at the outputs. One onnxruntime session serves all layers: the weights are inputs with a default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from onnx_lwdf.activations.moments import Moments
from onnx_lwdf.activations.taps import Feed
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Layer, bias_of, find_layers, from_canonical, weight_of
from onnx_lwdf.layerwise import patch_moments
from onnx_lwdf.runtime import Array, open_session, run
from onnx_lwdf.solvers.bias import mean_correction
from onnx_lwdf.solvers.mask import largest
from onnx_lwdf.solvers.problem import F64, apart, channel_loss, summed, together

DAMAGE = 0.3  # share of the weights that go
TINY = float(np.finfo(np.float64).tiny)


def influences(graph: Graph, layers: Sequence[Layer], moments: Mapping[str, Moments], feed: Feed) -> dict[str, float]:
    """Layer name -> influence; `feed` holds samples of the model's inputs."""
    probe = graph.twin()
    wanted = {layer.name for layer in layers}
    places = {layer.name: _open(probe, layer) for layer in find_layers(probe)[0] if layer.name in wanted}
    probe.commit()
    for name in (name for place in places.values() for name in place):
        tensor = probe.initializers[name]
        probe.model.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    session = open_session(probe.model, arena=False)
    exact = numbers(run(session, feed))
    found = {}
    for layer in layers:
        damaged, error = _damage(graph, layer, moments[layer.name])
        answer = run(session, {**feed, **dict(zip(places[layer.name], damaged, strict=False))})
        found[layer.name] = relative_error(exact, numbers(answer)) / error if error > TINY else 0.0
    return found


def _open(probe: Graph, layer: Layer) -> list[str]:
    """Give the layer a weight and, where there is a place, a bias of its own; the names of both."""
    value = probe.constant(layer.weight)
    assert value is not None, layer.name
    places = [(layer.node, 1, value)]
    if layer.bias is not None:
        node, index = layer.bias
        while len(node.input) <= index:
            node.input.append("")
        old = probe.constant(node.input[index]) if node.input[index] else None
        bias = bias_of(probe, layer).astype(np.float32)
        places.append((node, index, bias if old is None or old.size != bias.size else bias.reshape(old.shape)))
    names = []
    for node, index, value in places:
        names.append(probe.add_constant("probe", value))
        probe.connect(node, index, names[-1])
    return names


def _damage(graph: Graph, layer: Layer, moments: Moments) -> tuple[list[Array], float]:
    """The damaged weight and bias as the model stores them, and the relative error at the layer's output."""
    weight = apart(weight_of(graph, layer), moments.blocks)
    mean, covariance = patch_moments(layer, moments, mean_share=0.0)
    damaged = np.where(largest(np.abs(weight), DAMAGE, None), weight, 0.0)
    error = relative_loss(float(channel_loss(weight, damaged, covariance).sum()), weight, covariance)
    correction = mean_correction(weight, damaged, mean, mean)  # [groups, out]
    bias = bias_of(graph, layer) + summed(correction, moments.blocks).ravel()
    value = graph.constant(layer.weight)
    assert value is not None, layer.name
    stored = from_canonical(layer, together(damaged, moments.blocks), value.shape)
    return [stored.astype(np.float32), bias.astype(np.float32)], error


def relative_loss(loss: float, weight: F64, covariance: F64) -> float:
    """A loss in units of the power of the layer's output around its mean; 0 where that has none."""
    power = float(channel_loss(weight, np.zeros_like(weight), covariance).sum())
    return loss / power if power > TINY else 0.0


def numbers(outputs: Sequence[Array]) -> list[F64]:
    """The outputs that are real numbers: a class index has no error to measure, nor has an empty output.

    What is endless, such as the logit of a class that is masked, is 0.
    """
    found = [value.astype(np.float64) for value in outputs if value.dtype.kind == "f" and value.size]
    return [np.where(np.isfinite(value), value, 0.0) for value in found]


def power_share(exact: Sequence[F64]) -> float:
    """The outputs' power around the mean over samples, as a share of their power; the largest share of any output."""
    shares = [float((_varying(a) ** 2).sum()) / max(float((a**2).sum()), TINY) for a in exact]
    return max(shares, default=1.0) or 1.0


def relative_error(exact: Sequence[F64], answer: Sequence[F64]) -> float:
    """Noise over the power around the mean over samples, summed over the outputs."""
    total = 0.0
    for a, b in zip(exact, answer, strict=True):
        power = float((_varying(a) ** 2).sum())
        total += float(((a - b) ** 2).sum()) / max(power, TINY)
    return total


def _varying(output: F64) -> F64:
    """The output around its mean over samples; of a single sample around its mean over all, of a single number itself."""
    if output.ndim and len(output) > 1:
        return np.asarray(output - output.mean(0))
    return np.asarray(output - output.mean()) if output.size > 1 else output
