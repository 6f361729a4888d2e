"""What each operator makes of the gradient that reaches its output, as nodes of the backward graph.

One table, `RULES`, from operators to rules. A rule gives gradients to what the node reads; False says that it cannot, and
what stands in front of the node has no gradient then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx

from onnx_lwdf.activations.taps import pads_for
from onnx_lwdf.backward import Backward, Rule
from onnx_lwdf.graph import attribute
from onnx_lwdf.layers import window_of

HALF_STEP = 2.0**-7  # of the central difference that stands for an activation's slope


def _convolution(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    weight = back.graph.constant(node.input[1])
    source, made = back.shape(node.input[0])[2:], back.shape(node.output[0])[2:]
    if weight is None:
        return False
    window = window_of(node, weight.shape[2:])
    begins, ends = pads_for(window, source)
    reach = [d * (k - 1) + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    rest = [
        n - ((m - 1) * s + r - b - e)
        for n, m, s, r, b, e in zip(source, made, window.strides, reach, begins, ends, strict=True)
    ]
    options = {
        "strides": window.strides,
        "dilations": window.dilations,
        "pads": (*begins, *ends),
        "group": attribute(node, "group", 1),
        "kernel_shape": window.kernel,
    }
    back.give(node.input[0], back.add("ConvTranspose", [gradient, node.input[1]], output_padding=rest, **options))
    return True


def _transposed(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    weight = back.graph.constant(node.input[1])
    window = None if weight is None else window_of(node, weight.shape[2:])
    if window is None or window.pads is None or any(attribute(node, "output_padding", ())):
        return False
    options = {
        "strides": window.strides,
        "dilations": window.dilations,
        "pads": window.pads,
        "group": attribute(node, "group", 1),
        "kernel_shape": window.kernel,
    }
    back.give(node.input[0], back.add("Conv", [gradient, node.input[1]], **options))
    return True


def _gemm(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    weight = back.graph.constant(node.input[1])
    if weight is None or attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1:
        return False
    transposed = 0 if attribute(node, "transB", 0) else 1
    back.give(node.input[0], back.add("Gemm", [gradient, node.input[1]], transB=transposed))
    return True


def _matmul(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    weight = back.graph.constant(node.input[1])
    if weight is None or weight.ndim != 2 or len(back.shape(node.input[0])) < 2:
        return False
    turned = back.add("Transpose", [node.input[1]], perm=[1, 0])
    back.give(node.input[0], back.add("MatMul", [gradient, turned]))
    return True


def _slope(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    """Any function of single values: a central difference of two more nodes of the kind."""
    ends = []
    for step in (HALF_STEP, -HALF_STEP):
        moved = back.add("Add", [node.input[0], back.constant(np.float32(step))])
        ends.append(back.add(node.op_type, [moved, *node.input[1:]], **_attributes(node)))
    rise = back.add("Sub", ends)
    slope = back.add("Mul", [rise, back.constant(np.float32(0.5 / HALF_STEP))])
    back.give(node.input[0], back.add("Mul", [gradient, slope]))
    return not any(back.varies(name) for name in node.input[1:])


def _attributes(node: onnx.NodeProto) -> dict[str, object]:
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def _sum(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    shape = back.shape(node.output[0])
    for name in filter(back.varies, node.input):
        back.give(name, back.summed(gradient, shape, back.shape(name)))
    return True


def _difference(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    shape = back.shape(node.output[0])
    for index, name in enumerate(node.input):
        if back.varies(name):
            signed = back.add("Neg", [gradient]) if index else gradient
            back.give(name, back.summed(signed, shape, back.shape(name)))
    return True


def _product(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    shape = back.shape(node.output[0])
    for name, other in (node.input, reversed(node.input)):
        if back.varies(name):
            back.give(name, back.summed(back.add("Mul", [gradient, other]), shape, back.shape(name)))
    return True


def _quotient(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    if back.varies(node.input[1]):
        return False
    shape = back.shape(node.output[0])
    scaled = back.add("Div", [gradient, node.input[1]])
    back.give(node.input[0], back.summed(scaled, shape, back.shape(node.input[0])))
    return True


def _global_average(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    return _spread(back, node, gradient, tuple(range(2, len(back.shape(node.input[0])))))


def _mean(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    rank = len(back.shape(node.input[0]))
    listed = back.graph.constant(node.input[1]) if len(node.input) > 1 and node.input[1] else None
    axes = attribute(node, "axes", None if listed is None else listed.tolist())
    return axes is not None and _spread(back, node, gradient, tuple(sorted(axis % rank for axis in axes)))


def _spread(back: Backward, node: onnx.NodeProto, gradient: str, axes: tuple[int, ...]) -> bool:
    """Of a mean over axes: each value has its share."""
    shape = back.shape(node.input[0])
    kept = [1 if axis in axes else size for axis, size in enumerate(shape)]
    share = back.constant(np.float32(1 / math.prod(shape[axis] for axis in axes)))
    shared = back.add("Mul", [back.reshaped(gradient, kept), share])
    back.give(node.input[0], back.add("Expand", [shared, back.constant(np.array(shape, np.int64))]))
    return True


def _average(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    """Windows at the border count as the others do, padding as values."""
    kernel = tuple(attribute(node, "kernel_shape"))
    channels, source = back.shape(node.input[0])[1], back.shape(node.input[0])[2:]
    made = back.shape(node.output[0])[2:]
    window = window_of(node, kernel)
    begins, ends = pads_for(window, source)
    parts = zip(source, made, window.strides, kernel, begins, ends, strict=True)
    rest = [n - ((m - 1) * s + k - b - e) for n, m, s, k, b, e in parts]
    if (any(attribute(node, "dilations", ())) and any(d != 1 for d in window.dilations)) or min(rest, default=0) < 0:
        return False
    share = np.full((channels, 1, *kernel), 1 / math.prod(kernel), np.float32)
    options = {"strides": window.strides, "pads": (*begins, *ends), "group": channels, "kernel_shape": kernel}
    spread = back.add("ConvTranspose", [gradient, back.constant(share)], output_padding=rest, **options)
    back.give(node.input[0], spread)
    return True


def _maximum(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    """To the largest value of each window; where two windows share it, one of them counts."""
    if (
        (len(node.output) > 1 and node.output[1])
        or attribute(node, "ceil_mode", 0)
        or attribute(node, "storage_order", 0)
    ):
        return False
    again = back.graph.producer[back.add("MaxPool", node.input, **_attributes(node))]
    places = back.graph.unique("gradient")
    again.output.append(places)
    back.graph.producer[places] = again
    shape = back.constant(np.array(back.shape(node.input[0]), np.int64))
    kernel = attribute(node, "kernel_shape")
    strides = attribute(node, "strides", [1] * len(kernel))
    options = {"kernel_shape": kernel, "strides": strides}
    back.give(node.input[0], back.add("MaxUnpool", [gradient, places, shape], **options))
    return True


def _enlarged(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    """Nearest neighbours, whole times as large: each value collects from its copies."""
    source, made = back.shape(node.input[0]), back.shape(node.output[0])
    times = [big // small for small, big in zip(source, made, strict=True)]
    exact = all(big == k * small for k, small, big in zip(times, source, made, strict=True))
    if attribute(node, "mode", "nearest") != "nearest" or not exact or times[:2] != [1, 1]:
        return False
    pooled = back.add("AveragePool", [gradient], kernel_shape=times[2:], strides=times[2:])
    back.give(node.input[0], back.add("Mul", [pooled, back.constant(np.float32(math.prod(times)))]))
    return True


def _same_values(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    """Values keep their order."""
    back.give(node.input[0], back.reshaped(gradient, back.shape(node.input[0])))
    return True


def _permuted(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    perm = attribute(node, "perm", list(reversed(range(len(back.shape(node.input[0]))))))
    back.give(node.input[0], back.add("Transpose", [gradient], perm=np.argsort(perm).tolist()))
    return True


def _joined(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    shape = back.shape(node.output[0])
    axis = attribute(node, "axis") % len(shape)
    start = 0
    for name in node.input:
        size = back.shape(name)[axis]
        ends = [back.constant(np.array([value], np.int64)) for value in (start, start + size, axis)]
        if back.varies(name):
            back.give(name, back.add("Slice", [gradient, *ends]))
        start += size
    return True


def _normalized(back: Backward, node: onnx.NodeProto, gradient: str) -> bool:
    """A BatchNormalization that stands alone: a factor of every channel."""
    values = [back.graph.constant(name) for name in (node.input[1], node.input[4])]
    if values[0] is None or values[1] is None:
        return False
    factor = values[0] / np.sqrt(values[1] + attribute(node, "epsilon", 1e-5))
    shaped = factor.reshape(-1, *(1,) * (len(back.shape(node.input[0])) - 2)).astype(np.float32)
    back.give(node.input[0], back.add("Mul", [gradient, back.constant(shaped)]))
    return True


SLOPES = (
    *(
        "Relu",
        "Clip",
        "LeakyRelu",
        "PRelu",
        "Elu",
        "Selu",
        "Celu",
        "ThresholdedRelu",
        "Abs",
        "Exp",
        "Sqrt",
        "Erf",
        "Tanh",
    ),
    *("Sigmoid", "HardSigmoid", "HardSwish", "Softplus", "Softsign", "Gelu", "Mish", "Swish", "Neg", "Sin", "Cos"),
)
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(SLOPES, _slope),
    **dict.fromkeys(("Identity", "Dropout", "Flatten", "Reshape", "Squeeze", "Unsqueeze"), _same_values),
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _sum,
    "Sum": _sum,
    "Sub": _difference,
    "Mul": _product,
    "Div": _quotient,
    "GlobalAveragePool": _global_average,
    "ReduceMean": _mean,
    "AveragePool": _average,
    "MaxPool": _maximum,
    "Resize": _enlarged,
    "Upsample": _enlarged,
    "Transpose": _permuted,
    "Concat": _joined,
    "BatchNormalization": _normalized,
}
