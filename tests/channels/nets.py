"""Networks with every kind of partner that a channel can have, and channels that can go without any loss."""

from __future__ import annotations

import numpy as np
import onnx

from onnx_lwdf.runtime import Array
from tests.nets import with_weights

# Depthwise, PRelu, a residual sum, squeeze and excite, a concatenation, a pool, a flattened map.
PARTNERS = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,12,12] x) => (float[N,4] y) {
    a0 = Conv <pads = [1,1,1,1]> (x, w0, b0)
    a = Relu (a0)
    d0 = Conv <pads = [1,1,1,1], group = 12> (a, wd, bd)
    d = PRelu (d0, slope)
    p = Conv (d, w1, b1)
    q0 = Conv (p, w2, b2)
    q = Sigmoid (q0)
    r = Conv (q, w3, b3)
    s = Add (p, r)
    g = GlobalAveragePool (s)
    e0 = Conv (g, w4, b4)
    e1 = Relu (e0)
    e2 = Conv (e1, w5, b5)
    e = HardSigmoid (e2)
    m = Mul (s, e)
    t0 = Conv (m, w6, b6)
    t = Relu (t0)
    c = Concat <axis = 1> (m, t)
    u = MaxPool <kernel_shape = [2,2], strides = [2,2]> (c)
    v0 = Conv (u, w7, b7)
    v = LeakyRelu (v0)
    f = Flatten (v)
    y = Gemm <transB = 1> (f, w8, b8)
}
"""
SHAPES: dict[str, tuple[int, ...]] = {
    **{"w0": (12, 3, 3, 3), "wd": (12, 1, 3, 3), "slope": (12, 1, 1), "w1": (8, 12, 1, 1), "w2": (10, 8, 1, 1)},
    **{"w3": (8, 10, 1, 1), "w4": (6, 8, 1, 1), "w5": (8, 6, 1, 1), "w6": (9, 8, 1, 1), "w7": (7, 17, 3, 3)},
    **{"w8": (4, 112), "b0": (12,), "bd": (12,), "b1": (8,), "b2": (10,), "b3": (8,), "b4": (6,), "b5": (8,)},
    **{"b6": (9,), "b7": (7,), "b8": (4,)},
}
# The channel that can go, the one that it copies, and what writes both.
TWINS = (
    (11, 0, ("w0", "b0", "wd", "bd", "slope")),
    (7, 1, ("w1", "b1", "w3", "b3", "w5", "b5")),
    (9, 2, ("w2", "b2")),
    (5, 0, ("w4", "b4")),
    (8, 3, ("w6", "b6")),
    (6, 4, ("w7", "b7")),
)
PARTNER_CHANNELS = 12 + 8 + 10 + 6 + 9 + 7

# A transposed convolution, a MatMul with its bias behind it.
OTHERS = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,8,8] x) => (float[N,3] y) {
    a0 = Conv <pads = [1,1,1,1]> (x, w0, b0)
    a = Relu (a0)
    u0 = ConvTranspose <strides = [2,2]> (a, w1, b1)
    u = Relu (u0)
    c0 = Conv (u, w2, b2)
    c = Relu (c0)
    g = GlobalAveragePool (c)
    f = Reshape (g, rows)
    h0 = MatMul (f, w3)
    h1 = Add (h0, b3)
    h = Relu (h1)
    z = MatMul (h, w4)
    y = Add (z, b4)
}
"""
OTHER_CHANNELS = 6 + 5 + 9 + 7


def partners(seed: int = 0) -> tuple[onnx.ModelProto, dict[str, Array]]:
    return _net(PARTNERS, _drawn(SHAPES, seed))


def twins() -> onnx.ModelProto:
    """The last channel of every set is a copy of another one, in all that writes them."""
    tensors = _drawn(SHAPES, 1)
    for copy, source, names in TWINS:
        for name in names:
            tensors[name][copy] = tensors[name][source]
    return _net(PARTNERS, tensors)[0]


def constant_channels() -> onnx.ModelProto:
    """The last channel of every set does not depend on the input; before padding it is zero."""
    tensors = _drawn(SHAPES, 2)
    for channel, _, names in TWINS:
        for name in names:
            if name.startswith("w") and name != "wd":
                tensors[name][channel] = 0
            elif name.startswith("b"):
                tensors[name][channel] = 0.7
    tensors["b0"][11] = -1
    return _net(PARTNERS, tensors)[0]


def other_twins() -> onnx.ModelProto:
    """Twins where the output channels run along the second axis of the weight."""
    shapes = {"w0": (6, 3, 3, 3), "w1": (6, 5, 2, 2), "w2": (9, 5, 1, 1), "w3": (9, 7), "w4": (7, 3)}
    shapes |= {"b0": (6,), "b1": (5,), "b2": (9,), "b3": (7,), "b4": (3,)}
    tensors = _drawn(shapes, 3)
    for name, copy, source in (("w0", 5, 0), ("b0", 5, 0), ("b1", 4, 1), ("w2", 8, 3), ("b2", 8, 3), ("b3", 6, 2)):
        tensors[name][copy] = tensors[name][source]
    tensors["w1"][:, 4], tensors["w3"][:, 6] = tensors["w1"][:, 1], tensors["w3"][:, 2]
    return _net(OTHERS, tensors | {"rows": np.array([-1, 9], np.int64)})[0]


def _drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 1 / np.sqrt(np.prod(shape[1:]) or 1), shape) for name, shape in shapes.items()}


def _net(text: str, tensors: dict[str, Array]) -> tuple[onnx.ModelProto, dict[str, Array]]:
    return with_weights(text, tensors), tensors
