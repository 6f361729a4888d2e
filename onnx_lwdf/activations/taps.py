"""Taps: sampled layer inputs and tensors, gathered inside onnxruntime, so that whole activations never leave it.

A layer's tap answers the patches x that its weight rows meet, `[groups, in, positions]`, so that y = W x is the layer;
of them only the moments E[x] and E[x x^T] are kept. A tensor's tap answers values of every channel. The positions are
drawn anew for every chunk of images and fed as indices: one session serves all chunks and all taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from onnx_lwdf.activations.moments import Indices, Moments, Sums
from onnx_lwdf.errors import ModelError
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Layer, Window, input_blocks, input_channels
from onnx_lwdf.runtime import Array, copy_of, open_session, run, trim
from onnx_lwdf.statistics import F64, ChannelStatistics, Statistics

F32 = npt.NDArray[np.float32]
Feed = Mapping[str, Array]
Align = Callable[[Graph, str, ChannelStatistics, tuple[int, ...]], str]  # graph, tensor, what it must have, its shape

CHUNK = 16  # images at a time: bounds the memory, and is enough for batch statistics
FEWEST_POSITIONS, MOST_POSITIONS = 1024, 4096  # of each layer over all samples, where it has so many
PATCH_VALUES = 2**23  # of a layer over all samples; beyond, positions are fewer
POSITIONS_PER_INPUT = 2  # a Hessian of rank `in` needs more positions than it has rows
VALUES_PER_CHANNEL = 2048  # of each tensor over all samples: rare large values decide where a range may end


@dataclass(frozen=True, slots=True)
class Samples:
    """What the taps saw."""

    moments: Mapping[str, Moments]  # by layer name
    values: Mapping[str, F32]  # by tensor name, [channels, values]


@dataclass(frozen=True, slots=True)
class _Tap:
    """One tap: where it is read, the indices it is fed, and how an answer is brought into shape."""

    output: str
    feed: str | None
    draw: Callable[[np.random.Generator], Indices] | None
    decode: Callable[[Array], F32]


def sample(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    tensors: Iterable[str],
    chunks: Sequence[Feed],
    rng: np.random.Generator,
    statistics: Statistics,
    align: Align | None,
    keep: Callable[[Array], Array] = lambda array: array,
    whole: bool = False,
) -> Samples:
    """Run the chunks of input samples through the model and gather the patches of layers and the values of tensors.

    `align` replaces every tensor that has statistics before the taps are laid: a source's way of making activations.
    whole: no layer's inputs are split into blocks.
    `keep` answers the same array in a file where the samples of all layers are too large for memory.
    """
    tensors = list(dict.fromkeys(tensors))
    graph = Graph(copy_of(model))
    known = statistics if align else {}
    shapes = tensor_shapes(model, [*(layer.input for layer in layers), *tensors, *known], chunks[0])
    batch = samples_in(chunks[0])
    total = batch * len(chunks)
    aligned = {
        name: replace_aligned(graph, name, align, known[name], (batch, *shapes[name][1:]))
        for name in known
        if align is not None
    }
    taps = {
        layer.name: _layer_tap(graph, layer, aligned.get(layer.input, layer.input), shapes[layer.input], total)
        for layer in layers
    }
    rows = {layer.input for layer in layers if layer.window is None}
    values = {name: _value_tap(graph, aligned.get(name, name), shapes[name], name in rows, total) for name in tensors}
    blocks = {layer.name: 1 if whole else input_blocks(graph, layer) for layer in layers}
    samples = _run(graph, taps, blocks, values, chunks, rng, keep)
    trim()
    return samples


def samples_in(feed: Feed) -> int:
    """How many samples one run of this feed takes."""
    return max((len(value) for value in feed.values() if value.ndim), default=1)


def replace_aligned(graph: Graph, tensor: str, align: Align, known: ChannelStatistics, shape: tuple[int, ...]) -> str:
    """Let all readers of the tensor read its aligned version; the new tensor's name."""
    readers = list(graph.consumers[tensor])
    aligned = align(graph, tensor, known, shape)
    graph.reroute(readers, tensor, aligned)
    return aligned


def tensor_shapes(model: onnx.ModelProto, tensors: Iterable[str], feed: Feed) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors, seen in one run of as few samples as the model takes: works where shape inference does not.

    What is no tensor but a sequence of them, say, has none.
    """
    names = list(dict.fromkeys(tensors))
    inputs = [name for name in names if name in feed]
    wanted = [name for name in names if name not in feed]
    fixed = {info.name: info.type.tensor_type.shape.dim[:1] for info in model.graph.input}
    fewest = {name: max([1, *(dim.dim_value for dim in dims)]) for name, dims in fixed.items()}  # -1: open, for some
    single = {name: value[: fewest[name]] if value.ndim else value for name, value in feed.items()}
    shapes = {}
    if wanted:
        session = open_session(copy_of(model, wanted))
        found = [value.name for value in session.get_outputs() if value.type.startswith("tensor(")]
        shapes = {name: value.shape for name, value in zip(found, run(session, single, found), strict=True)}
    return shapes | {name: single[name].shape for name in inputs}


def _run(
    graph: Graph,
    layers: Mapping[str, _Tap],
    blocks: Mapping[str, int],
    tensors: Mapping[str, _Tap],
    chunks: Sequence[Feed],
    rng: np.random.Generator,
    keep: Callable[[Array], Array],
) -> Samples:
    taps = [*layers.values(), *tensors.values()]
    session = _session(graph, taps)
    outputs, inputs = [value.name for value in session.get_outputs()], {value.name for value in session.get_inputs()}
    sums: dict[str, Sums] = {}
    values: dict[str, list[F32]] = {name: [] for name in tensors}
    for chunk in chunks:
        indices = {tap.feed: tap.draw(rng) for tap in taps if tap.feed is not None and tap.draw is not None}
        given: dict[str, Array] = {**chunk, **indices}
        feeds = {name: value for name, value in given.items() if name in inputs}
        answers = dict(zip(outputs, run(session, feeds, outputs), strict=True))
        for name, tap in layers.items():
            x = tap.decode(answers.pop(tap.output))  # [groups, in, positions]
            x = x.reshape(len(x) * blocks[name], -1, x.shape[2])
            mean, power = _moments(name, x)
            if name in sums:
                sums[name].add(mean, power)
            else:
                sums[name] = Sums(mean, keep(power))
        for name, tap in tensors.items():
            values[name].append(tap.decode(answers.pop(tap.output))[0])
    moments = {name: replace(found.moments(), blocks=blocks[name]) for name, found in sums.items()}
    return Samples(moments, {name: keep(np.concatenate(values.pop(name), axis=-1)) for name in tensors})


def _moments(name: str, x: F32) -> tuple[F64, F64]:
    """Means of x and of x x^T over the positions; ModelError where the network's own values overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean, power = x.sum(-1, dtype=np.float64), (x @ x.transpose(0, 2, 1)).astype(np.float64)
    if not np.isfinite(power).all():
        raise ModelError(
            f"layer {name!r}: its input overflows on synthetic inputs; give --input-range, or repair the model"
        )
    power /= x.shape[-1]
    return mean / x.shape[-1], power


def _session(graph: Graph, taps: Sequence[_Tap]) -> ort.InferenceSession:
    model = graph.model
    graph.set_outputs(tap.output for tap in taps)
    for tap in taps:
        if tap.feed is not None:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tap.feed, onnx.TensorProto.INT64, [None]))
    graph.commit()
    return open_session(model, arena=False)


def _layer_tap(graph: Graph, layer: Layer, source: str, shape: tuple[int, ...], total: int) -> _Tap:
    groups, channels = layer.groups, input_channels(graph, layer)
    rank = 2 + len(layer.window.kernel) if layer.window else max(len(shape), 1)
    if len(shape) != rank or shape[1 if layer.window else -1] != channels:
        raise ModelError(
            f"layer {layer.name!r} takes {channels} channels, and its input is {shape}; give --input-shape"
        )
    if layer.window is None:
        return _row_tap(graph, source, shape, channels, total)
    channels //= groups
    window = layer.window if layer.op == "Conv" else _pointwise(layer.window)
    wanted = _positions(channels * math.prod(window.kernel), groups)
    return _window_tap(graph, source, shape, window, groups, -(-wanted // total))


def _positions(inputs: int, groups: int) -> int:
    fair = PATCH_VALUES // (inputs * groups)
    return max(POSITIONS_PER_INPUT * inputs, int(np.clip(fair, FEWEST_POSITIONS, MOST_POSITIONS)))


def _pointwise(window: Window) -> Window:
    """A transposed convolution's patches are single input positions."""
    ones = (1,) * len(window.kernel)
    return Window(ones, ones, ones, (0,) * 2 * len(ones), "NOTSET")


def _row_tap(graph: Graph, source: str, shape: tuple[int, ...], width: int, total: int) -> _Tap:
    """Gemm and MatMul: rows of the input [..., in]."""
    rows = math.prod(shape[1:-1])  # of one sample
    flat = graph.add("Reshape", [source, graph.add_constant("tap.shape", np.array([-1, width], np.int64))], "tap")
    wanted = -(-_positions(width, 1) // total)
    if rows <= wanted:
        return _Tap(flat, None, None, lambda value: value.T[None])
    feed = graph.unique("tap.rows")
    output = graph.add("Gather", [flat, feed], "tap", axis=0)

    def draw(rng: np.random.Generator) -> Indices:
        return np.sort(rng.choice(rows, wanted, replace=False)).astype(np.int64)

    return _Tap(output, feed, draw, lambda value: value.T[None])


def _window_tap(
    graph: Graph, source: str, shape: tuple[int, ...], window: Window, groups: int, per_sample: int
) -> _Tap:
    """Conv: the patches under the kernel at sampled output positions."""
    size = np.array(shape[2:])
    begins, ends = pads_for(window, shape[2:])
    if any((*begins, *ends)):
        widths = np.array([0, 0, *begins, 0, 0, *ends], np.int64)
        source = _pad(graph, source, widths)
    padded = size + begins + ends
    reach = np.array(window.dilations) * (np.array(window.kernel) - 1) + 1
    out = (padded - reach) // np.array(window.strides) + 1  # output positions per axis
    count, kernel = int(np.prod(out)), math.prod(window.kernel)
    taken = min(per_sample, count)
    shape_name = graph.add_constant("tap.shape", np.array([0, shape[1], -1], np.int64))
    flat = graph.add("Reshape", [source, shape_name], "tap")
    feed = graph.unique("tap.positions")
    output = graph.add("Gather", [flat, feed], "tap", axis=2)
    offsets = np.indices(window.kernel).reshape(len(out), -1) * np.array(window.dilations)[:, None]  # [axes, kernel]

    def draw(rng: np.random.Generator) -> Indices:
        chosen = np.sort(rng.choice(count, taken, replace=False))
        corner = np.stack(np.unravel_index(chosen, out)) * np.array(window.strides)[:, None]  # [axes, taken]
        places = corner[:, None, :] + offsets[:, :, None]  # [axes, kernel, taken]
        return np.ravel_multi_index(tuple(places), tuple(padded)).ravel().astype(np.int64)

    def decode(value: Array) -> F32:
        samples = value.shape[0]
        split = value.reshape(samples, groups, shape[1] // groups, kernel, taken)
        ordered = split.transpose(1, 3, 2, 0, 4)  # [groups, kernel, channels, samples, taken]
        return np.ascontiguousarray(ordered).reshape(groups, kernel * (shape[1] // groups), samples * taken)

    return _Tap(output, feed, draw, decode)


def pads_for(window: Window, size: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Begins and ends of the padding, auto_pad resolved for this input size."""
    rank = len(window.kernel)
    if window.pads is not None:
        return window.pads[:rank], window.pads[rank:]
    begins, ends = [], []
    for n, k, s, d in zip(size, window.kernel, window.strides, window.dilations, strict=True):
        total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        small = total // 2
        begins.append(total - small if window.auto_pad == "SAME_LOWER" else small)
        ends.append(total - begins[-1])
    return tuple(begins), tuple(ends)


def _pad(graph: Graph, source: str, widths: Indices) -> str:
    if graph.opset < 11:
        return graph.add("Pad", [source], "tap", pads=[int(width) for width in widths])
    return graph.add("Pad", [source, graph.add_constant("tap.pads", widths)], "tap")


def _value_tap(graph: Graph, source: str, shape: tuple[int, ...], rows: bool, total: int) -> _Tap:
    """A tensor [N, C, ...], or [N, ..., C] where rows of it are read: values of every channel at sampled positions."""
    channels = shape[-1] if rows else shape[1] if len(shape) > 1 else 1
    count = math.prod(shape[1:-1] if rows else shape[2:])
    taken = min(count, -(-VALUES_PER_CHANNEL // total))
    split = np.array([-1, count, channels] if rows else [-1, channels, count], np.int64)
    flat = graph.add("Reshape", [source, graph.add_constant("tap.shape", split)], "tap")
    feed = graph.unique("tap.values")
    output = graph.add("Gather", [flat, feed], "tap", axis=1 if rows else 2)

    def draw(rng: np.random.Generator) -> Indices:
        return np.sort(rng.choice(count, taken, replace=False)).astype(np.int64)

    def decode(value: Array) -> F32:
        ordered = value.transpose(2, 0, 1) if rows else value.transpose(1, 0, 2)  # [channels, samples, taken]
        return np.ascontiguousarray(ordered).reshape(1, channels, -1)

    return _Tap(output, feed, draw, decode)
