"""What a model's input looks like: shape, layout, and the normalization of its pixels.

A file does not say how its pixels were normalized, but the first BatchNormalization behind the input does: it stored
the mean and the variance that its channels had in training. Every convention of the table is tried on synthetic images:
they go through the graph up to that point, and the convention whose channel statistics there are nearest to the stored
ones, in Kullback-Leibler divergence of Gaussians averaged over the channels, is the input's. Where no convention fits,
the normalization is estimated: channel means by least squares (the graph up to there is affine), one common deviation.
A folded BatchNormalization can still tell the conventions apart by the bias of a bottleneck; what it says is assumed only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from onnx_lwdf.activations.images import F32, scenes
from onnx_lwdf.activations.normalization import (
    AS_BYTES,
    AS_SIGNED_BYTES,
    ASSUMED,
    ASSUMED_GREY,
    CONVENTIONS,
    ESTIMATED,
    ESTIMATED_REACH,
    GIVEN,
    GIVEN_RANGE,
    SCENES_DEVIATION,
    SCENES_MEAN,
    Normalization,
)
from onnx_lwdf.activations.recovered import bottlenecks, left_over
from onnx_lwdf.config import Config
from onnx_lwdf.errors import OptionError
from onnx_lwdf.graph import Graph, attribute, operator, subgraphs
from onnx_lwdf.layers import WEIGHTED, find_layers, input_channels
from onnx_lwdf.runtime import Array, copy_of, open_session, run
from onnx_lwdf.statistics import F64, ChannelStatistics, Statistics, divergence

_T = onnx.TensorProto
PIXELS = (_T.FLOAT, _T.FLOAT16, _T.DOUBLE, _T.UINT8)  # types that an image may have
WHOLE = (_T.INT8, _T.INT16, _T.INT32, _T.INT64, _T.UINT16, _T.UINT32, _T.UINT64)  # that one of several channels may
DRAWN = (*PIXELS, *WHOLE, _T.BOOL)
BYTES = (np.uint8, np.int8)  # numbers of this size are values; larger ones may be sizes, switches, indices
DEFAULT_SIDE = 224  # pixels, where an image's height or width is dynamic
MOST_VALUES = 2**25  # of an input: sixteen of them fill 2 GiB
PROBES = 32  # images: their brightness differs, and with it the channel means
WORST_DIVERGENCE = 10.0  # a single channel's say is bounded: dead channels diverge without end
# A named convention is believed where it fits well (nats per channel), and else unless the free estimate has a clearly smaller
# divergence. On eight networks whose convention is known it fits well, or better than the estimate, or (one) 1.06 times
# worse; on two whose normalization is in no table the estimate wins by a factor of 20, on one whose input is divided by a
# thousand by one of 7.
GOOD_FIT = 0.1
CLEARLY_BETTER = 1 / 2
# Of the bias's energy, in the mean of the first bottleneck, under the right convention at most: on four networks whose
# convention is known the right one left 0.01 to 0.09, and torchvision's, where it was wrong and did not fit, 0.20 and 0.22.
LEFT_BY_RIGHT = 0.1
UNIT = 3.0  # what deviates by a third to three times as much, around a mean within that, is taken for standard normal


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of the model."""

    name: str
    shape: tuple[int, ...]  # of a single sample, without the batch axis
    batch: int | None  # samples at a time where the model fixes them; 0: a scalar, which has no such axis
    dtype: np.dtype[Any]
    rows: int  # of the table that it picks from, where it holds indices; else 0
    channels_last: bool
    image: bool
    normalization: Normalization | None  # None: standard normal values, any byte or index, ones for other integers
    inferred: bool  # from stored statistics, or given by the user
    pixels: str | None = None  # the tensor that holds it as pixels of 0 to 255, where it is read as such
    parts: str | None = None  # the tensor that holds it as whole steps and a residual, where it is read as such

    @property
    def chw(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        first, second, third = self.shape
        return (third, first, second) if self.channels_last else (first, second, third)

    @property
    def vague(self) -> bool:
        """Whether nothing tells where its values end, of which at least the size is known."""
        known = self.normalization
        return self.dtype.kind == "f" and known is not None and (known.name == ESTIMATED or not self.inferred)

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Of the tensors that hold its values, where the normalization is known."""
        if self.normalization is None:
            return {}
        made = {self.pixels: AS_BYTES.range, self.parts: AS_SIGNED_BYTES.range}
        return {self.name: self.normalization.range, **{name: bounds for name, bounds in made.items() if name}}

    def draw(self, count: int, rng: np.random.Generator) -> Array:
        """Synthetic samples on the model's scale, [count, *shape], as many as the model fixes where it does."""
        count = count if self.batch is None else self.batch
        if self.image and self.normalization is not None:
            return self.place(self.normalization.like_dataset(scenes(count, *self.chw, rng)))
        shape = self.shape if self.batch == 0 else (count, *self.shape)
        if self.normalization is not None:
            low, high = self.normalization.range
            if self.normalization.name != ESTIMATED:
                return self._typed(rng.uniform(low, high, shape))
            drawn = (low + high) / 2 + (high - low) / (2 * ESTIMATED_REACH) * rng.standard_normal(shape)
            return self._typed(drawn)
        if self.dtype.kind == "f":
            return np.asarray(rng.standard_normal(shape)).astype(self.dtype)
        if self.rows:
            return np.asarray(rng.integers(self.rows, size=shape)).astype(self.dtype)
        if self.dtype in BYTES and self.shape:
            limits = np.iinfo(self.dtype)
            return rng.integers(limits.min, limits.max, shape, self.dtype, endpoint=True)
        return np.ones(shape, self.dtype)  # a size or a switch is 1

    def place(self, images: F32) -> Array:
        """Images in [0, 1] [N, C, H, W] on the model's scale and in its layout and type."""
        assert self.normalization is not None
        typed = self._typed(self.normalization.apply(images))
        return np.ascontiguousarray(typed.transpose(0, 2, 3, 1) if self.channels_last else typed)

    def _typed(self, values: Array) -> Array:
        """Values as the input's type holds them: the nearest."""
        if self.dtype.kind not in "iu":
            return np.asarray(values).astype(self.dtype)
        limits = np.iinfo(self.dtype)
        return np.clip(np.rint(values), limits.min, limits.max).astype(self.dtype)


def read_inputs(graph: Graph, config: Config, statistics: Statistics) -> tuple[tuple[InputSpec, ...], tuple[str, ...]]:
    """Every input of the model and warnings about what had to be assumed."""
    specs, warnings = [], []
    for spec in find_inputs(graph, config):
        if spec.image:
            spec = _normalized(graph, spec, config, statistics)
        elif config.input_range is not None and (spec.dtype.kind == "f" or _is_all(graph, spec)):
            spec = _replace(spec, _within(*config.input_range), inferred=True)
        elif spec.dtype.kind == "f" and spec.batch != 0:
            spec = replace(spec, normalization=_spread(graph, spec, statistics))
        if not spec.inferred:
            warnings.append(_assumption(spec, alone=len(graph.inputs) == 1))
        specs.append(spec)
    return tuple(specs), tuple(warnings)


def find_inputs(graph: Graph, config: Config) -> list[InputSpec]:
    """Every input of the model with its sizes; nothing is known of how an image is normalized."""
    unknown = set(config.input_shape) - set(graph.inputs)
    if unknown:
        names = ", ".join(graph.inputs)
        raise OptionError(f"input-shape names {sorted(unknown)[0]!r}, which is no input; the inputs are {names}")
    infos = {value.name: value for value in graph.model.graph.input}
    layers = reversed(find_layers(graph)[0])  # of several readers the first tells
    read = {layer.input: ((1 if layer.window else -1), input_channels(graph, layer)) for layer in layers}
    return [_spec(infos[name], read.get(name), _rows_read(graph, name), config) for name in graph.inputs]


def _is_all(graph: Graph, spec: InputSpec) -> bool:
    """Whether a range that the user gives is meant for this input of integers: it is the only one, and picks no rows."""
    return len(graph.inputs) == 1 and not spec.rows and spec.dtype.kind in "iu"


def unfeedable(model: onnx.ModelProto) -> str | None:
    """Why no values can be made up for an input of the model, None where they can."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for info in model.graph.input:
        kind = info.type.tensor_type.elem_type
        if info.name not in weights and kind not in DRAWN:
            word = onnx.TensorProto.DataType.Name(kind).lower() if kind else "no tensor"
            return f"input {info.name!r} is {word}, for which no values can be made up"
    return None


def _rows_read(graph: Graph, name: str) -> int:
    """How many rows the smallest table has that the input picks from; 0 where it picks from none."""
    rows = []
    for node in graph.consumers[name]:
        table = graph.constant(node.input[0])
        if operator(node) == "Gather" and table is not None and table.ndim:
            rows.append(table.shape[int(attribute(node, "axis", 0))])
    return min(rows, default=0)


def _assumption(spec: InputSpec, alone: bool) -> str:
    if not spec.image:
        hint = "; where it holds others, give --input-range or --activations-from" if alone else ""
        return f"input {spec.name!r} is not an image: {_drawn(spec)} of shape {spec.shape} stand in for it{hint}"
    assert spec.normalization is not None
    return (
        f"input {spec.name!r}: no BatchNormalization near it tells how its pixels are normalized; "
        f"assumed {spec.normalization.name}; give --input-range or --input-mean and --input-std"
    )


def _drawn(spec: InputSpec) -> str:
    """What `draw` gives an input that is no image."""
    if spec.normalization is not None:
        low, high = spec.normalization.range
        return f"values from {low:.3g} to {high:.3g}, by what BatchNormalization stored,"
    if spec.dtype.kind == "f":
        return "standard normal values"
    if spec.rows:
        return "any indices"
    return "random bytes" if spec.dtype in BYTES and spec.shape else "ones"


def _spec(info: onnx.ValueInfoProto, channels: tuple[int, int] | None, rows: int, config: Config) -> InputSpec:
    """`channels`: the axis of the input's channels and their number, where a layer reads it; `rows`: see there."""
    kind = info.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    if kind.HasField("shape") and not kind.shape.dim and info.name not in config.input_shape:
        return InputSpec(info.name, (), 0, dtype, rows, False, False, None, inferred=False)
    known = [max(dim.dim_value, 0) for dim in kind.shape.dim]  # some exporters write -1 for an open size
    if channels is not None and len(known) > channels[0] and known[channels[0]] == 0:
        known[channels[0]] = channels[1]
    shape = _full_shape(info.name, known, config)
    batch = known[0] or None if known else None
    if (batch or 1) * math.prod(shape[1:]) > MOST_VALUES:
        raise OptionError(f"input {info.name!r} of shape {tuple(shape)} is too large to be made up; give --input-shape")
    widths = () if rows else _image_channels(kind.elem_type)
    # Where a layer reads the channels on axis 1, none are on the last.
    behind = () if channels is not None and channels[0] == 1 else widths
    image = len(shape) == 4 and (shape[1] in widths or shape[3] in behind)
    last = image and shape[1] not in widths
    return InputSpec(info.name, tuple(shape[1:]), batch, dtype, rows, last, image, None, inferred=False)


def _image_channels(kind: int) -> tuple[int, ...]:
    """How many channels an image of this type may have."""
    if kind in WHOLE:
        return (3, 4)  # one channel of integers may as well be a mask
    return (1, 3, 4) if kind == _T.UINT8 else (1, 3) if kind in PIXELS else ()


def _full_shape(name: str, known: list[int], config: Config) -> list[int]:
    given = config.input_shape.get(name)
    if given is not None:
        if known and len(given) != len(known):
            raise OptionError(f"input-shape {name} has {len(given)} dimensions; the model's input has {len(known)}")
        return list(given)
    if not known:
        raise OptionError(f"input {name!r} has no shape; give --input-shape {name}:1,3,224,224")
    default = [1, 3, DEFAULT_SIDE, DEFAULT_SIDE] if len(known) == 4 else [1, *[16] * (len(known) - 1)]
    if len(known) == 4 and known[3] in (1, 3) and known[1] not in (1, 3):
        default = [1, DEFAULT_SIDE, DEFAULT_SIDE, 3]
    return [size if size > 0 else fallback for size, fallback in zip(known, default, strict=True)]


def _normalized(graph: Graph, spec: InputSpec, config: Config, statistics: Statistics) -> InputSpec:
    """The image input with its normalization: given, inferred, or assumed."""
    given = _given(config, spec.chw[0])
    if given is None and spec.dtype.kind in "iu":
        given = AS_SIGNED_BYTES if spec.dtype == np.int8 else AS_BYTES
    if given is not None:
        return _replace(spec, given, inferred=True)
    probe = _first_statistics(graph, spec.name, statistics)
    if probe is None:
        return _replace(spec, _assumed(graph, spec), inferred=False)
    return _replace(spec, infer(graph, spec, probe, statistics[probe]), inferred=True)


def _assumed(graph: Graph, spec: InputSpec) -> Normalization:
    """The common convention, unless it does not fit the bias of the first bottleneck and another one does."""
    channels = spec.chw[0]
    common = ASSUMED if channels == 3 else ASSUMED_GREY
    groups = bottlenecks(graph, find_layers(graph)[0], {})
    if not groups or len(graph.inputs) > 1:
        return common
    first = groups[0].producers[0]
    head = _head(graph.model, first.output)
    images = scenes(spec.batch or PROBES, *spec.chw, np.random.default_rng(0))
    left = {}
    for convention in (common, *(c for c in CONVENTIONS if len(c.mean) in (1, channels))):
        mean, _ = _response(head, {spec.name: _replace(spec, convention, False).place(images)})
        left[convention] = left_over(graph, [first], {first.output: mean})
    best = min(left, key=lambda convention: left[convention])
    return best if left[best] <= LEFT_BY_RIGHT < left[common] else common


def _replace(spec: InputSpec, normalization: Normalization, inferred: bool) -> InputSpec:
    return replace(spec, normalization=normalization, inferred=inferred)


def _given(config: Config, channels: int) -> Normalization | None:
    if config.input_mean is not None and config.input_std is not None:
        for word, values in (("mean", config.input_mean), ("std", config.input_std)):
            if len(values) not in (1, channels):
                raise OptionError(f"input-{word} has {len(values)} values; the input has {channels} channels")
        pairs = np.broadcast_arrays(np.array(config.input_mean), np.array(config.input_std))
        return Normalization(GIVEN, tuple(map(float, pairs[0])), tuple(map(float, pairs[1])))
    if config.input_range is not None:
        return _within(*config.input_range)
    return None


def _within(low: float, high: float) -> Normalization:
    std = 255 / (high - low)
    return Normalization(GIVEN_RANGE, (-low * std,), (std,))


def _first_statistics(graph: Graph, name: str, statistics: Statistics) -> str | None:
    """The first tensor with statistics that depends on the input through exactly one layer, and on no other input."""
    depth, others = {name: 0}, set(graph.inputs) - {name}
    for node in graph.nodes:
        if others.intersection(node.input) or [*subgraphs(node)]:
            others.update(node.output)
            continue
        depths = [depth[source] for source in node.input if source in depth]
        if not depths:
            continue
        weighted = max(depths) + (operator(node) in WEIGHTED)
        for output in node.output:
            depth[output] = weighted
            if output in statistics and weighted == 1:
                return output
    return None


def infer(graph: Graph, spec: InputSpec, probe: str, stored: ChannelStatistics) -> Normalization:
    """The normalization under which synthetic images have the stored statistics at the tensor `probe`."""
    head = _head(graph.model, probe)
    images = scenes(spec.batch or PROBES, *spec.chw, np.random.default_rng(0))
    fits = [c for c in CONVENTIONS if len(c.mean) in (1, spec.chw[0])]
    estimate = _estimate(head, spec, stored, images)
    scored = [(_divergence(head, _replace(spec, c, True), stored, images), c) for c in fits]
    best, convention = min(scored, key=lambda pair: pair[0])
    free = _divergence(head, _replace(spec, estimate, True), stored, images)
    return convention if best <= GOOD_FIT or best * CLEARLY_BETTER <= free else estimate


def _spread(graph: Graph, spec: InputSpec, statistics: Statistics) -> Normalization | None:
    """How far the values of an input reach that is no image, where the first BatchNormalization says that it is not 1.

    One mean, by least squares on the stored means, and one deviation, by the median ratio of the deviations: of values that
    are independent, or the same everywhere, whichever must vary more. A grid that is too wide costs bits, one that is
    too narrow costs the answer.
    """
    probe = _first_statistics(graph, spec.name, statistics)
    if probe is None:
        return None
    head, stored, rng = _head(graph.model, probe), statistics[probe], np.random.default_rng(0)
    shape = (spec.batch or PROBES, *spec.shape)

    def response(values: Array) -> tuple[F64, F64]:
        return _response(head, {spec.name: np.broadcast_to(values, shape).astype(spec.dtype)})

    base, step = response(np.zeros(1))[0], response(np.ones(1))[0]
    alive = stored.deviation > 1e-3 * stored.deviation.max(initial=0)
    slope, target = (values[alive] / stored.deviation[alive] for values in (step - base, stored.mean - base))
    center = float(slope @ target / (slope @ slope)) if slope.any() else 0.0
    ratios = []
    for size in (shape, (shape[0], *[1] * len(spec.shape))):
        seen = response(rng.standard_normal(size))[1]
        ratio = stored.deviation[alive & (seen > 0)] / seen[alive & (seen > 0)]
        ratios += [float(np.exp(np.median(np.log(ratio))))] if ratio.size else []
    if not ratios or (abs(center) <= UNIT and 1 / UNIT <= max(ratios) <= UNIT):
        return None
    std = SCENES_DEVIATION / max(ratios)
    return Normalization(ESTIMATED, (SCENES_MEAN - center * std,), (std,))


def _head(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """The part of the model that makes the tensor."""
    head = copy_of(model, [tensor])
    graph = Graph(head)
    graph.commit()
    read = [info for info in head.graph.input if graph.consumers[info.name]]  # onnxruntime wants all that is listed
    kept = [onnx.ValueInfoProto.FromString(info.SerializeToString()) for info in read]
    del head.graph.input[:]
    head.graph.input.extend(kept)
    return head


def _response(head: onnx.ModelProto, feeds: Mapping[str, Array]) -> tuple[F64, F64]:
    """Mean and deviation of each channel (axis 1) of the head's output."""
    value = run(open_session(head), feeds)[0].astype(np.float64)
    axes = (0, *range(2, value.ndim))
    return value.mean(axes), value.std(axes)


def _divergence(head: onnx.ModelProto, spec: InputSpec, stored: ChannelStatistics, images: F32) -> float:
    """Mean over channels of KL(N(stored) || N(seen)), bounded per channel."""
    mean, deviation = _response(head, {spec.name: spec.place(images)})
    alive = stored.deviation > 1e-3 * stored.deviation.max(initial=0)
    if not alive.any():
        return WORST_DIVERGENCE
    seen = np.maximum(deviation[alive], 1e-12)
    found = divergence(stored.mean[alive], stored.deviation[alive], mean[alive], seen)
    return float(np.minimum(found, WORST_DIVERGENCE).mean())


def _estimate(head: onnx.ModelProto, spec: InputSpec, stored: ChannelStatistics, images: F32) -> Normalization:
    """Channel means by least squares on the stored means, one deviation by the median ratio of the deviations."""
    plain = Normalization(ESTIMATED, (0.0,), (255.0,))
    unit = _replace(spec, plain, True)
    channels = images.shape[1]
    base, _ = _response(head, {spec.name: unit.place(np.zeros_like(images[: spec.batch or 1]))})
    columns = []
    for channel in range(channels):
        one = np.zeros_like(images[: spec.batch or 1])
        one[:, channel] = 1
        columns.append(_response(head, {spec.name: unit.place(one)})[0] - base)
    weight = 1 / np.maximum(stored.deviation, 1e-3 * stored.deviation.max())
    matrix, target = np.stack(columns, 1) * weight[:, None], (stored.mean - base) * weight
    means = np.linalg.lstsq(matrix, target, rcond=1e-3)[0]  # of the input's channels, on the model's scale
    _, deviation = _response(head, {spec.name: unit.place(images)})
    alive = (stored.deviation > 1e-3 * stored.deviation.max()) & (deviation > 0)
    factor = float(np.exp(np.median(np.log(stored.deviation[alive] / deviation[alive])))) if alive.any() else 1.0
    std = 255 / factor
    return Normalization(ESTIMATED, tuple(map(float, SCENES_MEAN - means * std)), (float(std),) * channels)
