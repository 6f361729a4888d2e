"""Clipping: grids that end earlier than the least squared error on samples says.

Large values often stand where the outputs do not look: a Clip behind them is full, or so many channels are there that one
more or less says nothing. An error that is squared and weighted channel by channel does not know that; a run does. So each
grid alone is set into the float network, with what it adds in the mean taken away, as biases will,

    noise = |f(q(t) - E[q(t) - t]) - f(t)|^2 / |f(t)|^2,

and made narrower by steps as long as each takes a tenth of the noise. Wider grids are not tried: how far real images reach
synthetic ones cannot say (see `calibration.py`). Only what stands behind a tensor runs again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort

from onnx_lwdf.activations.taps import Feed, Samples, samples_in, tensor_shapes
from onnx_lwdf.errors import ModelError
from onnx_lwdf.graph import Graph, before_softmax
from onnx_lwdf.influence import TINY, numbers
from onnx_lwdf.layers import Layer
from onnx_lwdf.ranges import F64, ActivationGrid, widened
from onnx_lwdf.runtime import Array, open_session, run
from onnx_lwdf.sites import Site

STEP = 2**-0.25  # of a range; finer steps take noise away by less than a tenth
GAIN = 0.9  # of the noise may be left by a step: less is what 16 images show by chance
VALUES = 2**25  # of all tensors together, kept for a few images: five of MobileNetV2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Clipped:
    """What was found."""

    grids: Mapping[str, ActivationGrid]  # of all tensors
    noises: Mapping[
        str, float
    ]  # that each grid alone leaves at the outputs, each in units of its power, where that was seen


@dataclass(frozen=True, slots=True)
class _Tail:
    """What stands behind a tensor, as a model of its own."""

    session: ort.InferenceSession
    value: Array  # the tensor, exact
    given: str  # its name as an input
    beside: Feed  # what else it reads
    exact: Sequence[F64]  # the outputs
    ends: Sequence[str]
    axis: int  # of the channels

    def noise(self, grid: ActivationGrid, samples: F64) -> float:
        """Of this grid; `samples`, [channels, values], say what it adds in the mean."""
        mean = (grid.quantize(samples) - samples).mean(1)
        shape = [1] * self.value.ndim
        shape[self.axis] = len(mean)
        stored = grid.quantize(self.value.astype(np.float64)) - mean.reshape(shape)
        answer = run(self.session, {**self.beside, self.given: stored.astype(self.value.dtype)}, self.ends)
        pairs = zip(self.exact, numbers(answer), strict=True)
        return sum(float(((a - b) ** 2).sum()) / max(float((a**2).sum()), TINY) for a, b in pairs)


def clipped(
    graph: Graph,
    layers: Sequence[Layer],
    sites: Sequence[Site],
    grids: Mapping[str, ActivationGrid],
    samples: Samples,
    feed: Feed,
    symmetric: bool = False,
) -> Clipped:
    """The grids, those of these sites narrower where the outputs gain by it. `feed` holds samples of the model's inputs.

    Where parts of the model are graphs in nodes (If, Loop), or cannot be run alone, grids stay as they are.
    """
    found, noises = dict(grids), dict[str, float]()
    sites = [site for site in sites if site.tensors[0] in samples.values and site.tensors[0] in graph.producer]
    if graph.captured or not sites:
        return Clipped(found, noises)
    ends = list(dict.fromkeys(before_softmax(graph, name) for name in graph.outputs))
    behind = {site.tensors[0]: _behind(graph, site.tensors[0]) for site in sites}
    borders = {name: _border(graph, name, nodes) for name, nodes in behind.items()}
    rows = {layer.input for layer in layers if layer.window is None}
    try:
        values = _values(graph, [*ends, *borders, *(name for border in borders.values() for name in border)], feed)
        for site in sites:
            name = site.tensors[0]
            reached = [end for end in ends if any(end in node.output for node in behind[name])]
            tail = _tail(graph, name, borders[name], reached, values, -1 if name in rows else 1)
            known = samples.values[name].astype(np.float64)
            if tail is not None and tail.value.ndim > 1 and tail.value.shape[tail.axis] == len(known):
                grid, noises[name] = _narrowed(tail, grids[name], known, site, symmetric)
                found.update(dict.fromkeys(site.tensors, grid))
    except ModelError as error:  # an unusual graph: what follows does without
        log.debug("grids are not clipped further: %s", error)
    return Clipped(found, noises)


def _narrowed(
    tail: _Tail, grid: ActivationGrid, samples: F64, site: Site, symmetric: bool
) -> tuple[ActivationGrid, float]:
    """The grid, narrower as long as that pays, and its noise."""
    noise = tail.noise(grid, samples)
    while noise > 0:
        narrower = widened(grid, STEP, site.low, site.high, symmetric)
        left = tail.noise(narrower, samples)
        if not left < GAIN * noise:
            break
        grid, noise = narrower, left
    return grid, noise


def _behind(graph: Graph, tensor: str) -> list[onnx.NodeProto]:
    """All nodes that read what is computed from the tensor."""
    found: dict[int, onnx.NodeProto] = {}
    waiting = [tensor]
    while waiting:
        for node in graph.consumers.get(waiting.pop(), []):
            if id(node) not in found:
                found[id(node)] = node
                waiting.extend(name for name in node.output if name)
    return list(found.values())


def _border(graph: Graph, tensor: str, nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """What these nodes read that neither they make nor the file holds, but for the tensor."""
    made = {tensor, *(name for node in nodes for name in node.output)}
    read = dict.fromkeys(name for node in nodes for name in node.input if name and name not in made)
    return [name for name in read if graph.constant(name) is None]


def _values(graph: Graph, names: Sequence[str], feed: Feed) -> dict[str, Array]:
    """The tensors' values for as many samples of the feed as memory allows, inputs among them."""
    names = list(dict.fromkeys(names))
    size = sum(math.prod(shape) for shape in tensor_shapes(graph.snapshot(), names, feed).values())
    few = int(np.clip(VALUES // max(size, 1), 1, samples_in(feed)))
    feed = {name: value[:few] if value.ndim else value for name, value in feed.items()}
    made = [name for name in names if name not in feed]
    twin = graph.twin()
    twin.set_outputs(made)
    twin.commit()
    return {**feed, **dict(zip(made, run(open_session(twin.model, arena=False), feed, made), strict=True))}


def _tail(
    graph: Graph, tensor: str, border: Sequence[str], ends: Sequence[str], values: Mapping[str, Array], axis: int
) -> _Tail | None:
    """None where something that it reads or puts out is no array of numbers."""
    if not ends or any(values[name].dtype.kind not in "fiub" for name in (tensor, *border, *ends)):
        return None
    twin = graph.twin()
    inputs: dict[str, str] = {}
    for name in (tensor, *border):
        value = values[name]
        # Indices and sizes stay constants: some operators take nothing else.
        variable = value.dtype.kind == "f"
        other = twin.unique("tail") if variable else twin.add_constant("tail", value)
        if variable:
            inputs[name] = other
        twin.reroute(list(twin.consumers[name]), name, other)
    twin.inputs = list(inputs.values())
    del twin.model.graph.input[:]
    del twin.model.graph.value_info[:]
    for name, other in inputs.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(values[name].dtype)
        twin.model.graph.input.append(onnx.helper.make_tensor_value_info(other, kind, [None] * values[name].ndim))
    twin.set_outputs(ends)
    twin.commit()
    beside = {other: values[name] for name, other in inputs.items() if name != tensor}
    exact = numbers([values[name] for name in ends])
    return _Tail(open_session(twin.model, arena=False), values[tensor], inputs[tensor], beside, exact, ends, axis)
