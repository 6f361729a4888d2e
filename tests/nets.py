"""Small networks for tests, written as ONNX text with seeded weights."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_lwdf.runtime import Array, open_session, run

FAST = {"samples": 16, "jobs": 1, "input_range": (-4.0, 4.0)}  # options for nets that get standard normal values

RESIDUAL = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,16,16] x) => (float[N,5] y) {
    a0 = Conv <pads = [1,1,1,1]> (x, w0)
    a1 = BatchNormalization (a0, g0, b0, m0, v0)
    a2 = Relu (a1)
    c0 = Conv <pads = [1,1,1,1], group = 8> (a2, w1)
    c1 = BatchNormalization (c0, g1, b1, m1, v1)
    c2 = Clip (c1, zero, six)
    d0 = Conv (c2, w2)
    d1 = BatchNormalization (d0, g2, b2, m2, v2)
    s = Add (a2, d1)
    e0 = Conv <strides = [2,2]> (s, w3, wb3)
    e1 = Relu (e0)
    p = GlobalAveragePool (e1)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, w4, wb4)
}
"""


def residual(seed: int = 0, width: int = 8) -> onnx.ModelProto:
    """Conv-BN-Relu, depthwise Conv-BN-Clip, a linear bottleneck with a residual Add, a strided Conv, a classifier."""
    rng = np.random.default_rng(seed)
    tensors = {
        "w0": rng.normal(0, 0.3, (width, 3, 3, 3)),
        "w1": rng.normal(0, 0.4, (width, 1, 3, 3)),
        "w2": rng.normal(0, 0.5, (width, width, 1, 1)),
        "w3": rng.normal(0, 0.3, (6, width, 3, 3)),
        "wb3": rng.normal(0, 0.2, 6),
        "w4": rng.normal(0, 0.5, (5, 6)),
        "wb4": rng.normal(0, 0.1, 5),
        "zero": np.array(0.0),
        "six": np.array(6.0),
    }
    for i in range(3):
        tensors[f"g{i}"] = rng.uniform(0.5, 1.5, width)
        tensors[f"b{i}"] = rng.normal(0.3, 0.5, width)
        tensors[f"m{i}"] = rng.normal(0, 0.5, width)
        tensors[f"v{i}"] = rng.uniform(0.2, 2, width)
    return trained(with_weights(RESIDUAL.replace("group = 8", f"group = {width}"), tensors))


def trained(model: onnx.ModelProto, feeds: dict[str, Array] | None = None) -> onnx.ModelProto:
    """The model whose BatchNormalizations have stored what these inputs give (else standard normal ones), as training would."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            head = onnx.ModelProto()
            head.CopyFrom(model)
            del head.graph.output[:]
            head.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.input[0]))
            value = answers(head, samples(head, 64, seed=7) if feeds is None else feeds)[0]
            axes = (0, *range(2, value.ndim))
            for name, statistic in zip(node.input[3:], (value.mean(axes), value.var(axes)), strict=True):
                weights[name].CopyFrom(numpy_helper.from_array(statistic, name))
    return model


def with_weights(text: str, tensors: dict[str, Array]) -> onnx.ModelProto:
    """The model of the text with float32 initializers (other dtypes are kept as they are)."""
    model = onnx.parser.parse_model(text)
    for name, value in tensors.items():
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type.lower()}_{number}"
    return model


def samples(model: onnx.ModelProto, count: int = 4, seed: int = 1) -> dict[str, Array]:
    """Standard normal inputs for every input of the model; dynamic sizes become `count`."""
    rng = np.random.default_rng(seed)
    weights = {tensor.name for tensor in model.graph.initializer}
    feeds = {}
    for value in model.graph.input:
        if value.name not in weights:
            shape = [dim.dim_value or count for dim in value.type.tensor_type.shape.dim]
            feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def answers(model: onnx.ModelProto, feeds: dict[str, Array], *, optimize: bool = True) -> list[Array]:
    return run(open_session(model, optimize=optimize), feeds)


def sqnr_db(exact: Array, answer: Array) -> float:
    exact = exact.astype(np.float64)
    noise = float(((exact - answer) ** 2).sum())
    return float(10 * np.log10((exact**2).sum() / noise)) if noise else np.inf
