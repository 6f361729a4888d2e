"""S of inner tensors against differences of the rest of the network, entry by entry."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_lwdf import gradients
from onnx_lwdf.activations import aligned
from onnx_lwdf.derivatives import HALF_STEP
from onnx_lwdf.graph import Graph
from onnx_lwdf.precondition.fold import fold
from tests.nets import answers, samples, with_weights

HEAD = """
<ir_version: 8, opset_import: ["" : {opset}]>
net (float[N,3,6,6] x) => (float[N,{outputs}] y) {{
    t = Conv <pads = [1,1,1,1]> (x, w0)
    {body}
}}
"""

END = "GlobalAveragePool (f) y = Flatten (e)"
BODIES = {
    "relu, full, pool": f"a = Relu (t) f = Conv <strides = [2,2]> (a, w1) e = {END}",
    "clip, depthwise": f"a = Clip (t, zero, one) f = Conv <group = 4, pads = [1,1,1,1]> (a, w2) e = {END}",
    "same lower, dilated": f'a = Conv <auto_pad = "SAME_LOWER"> (t, w1) f = Conv <dilations = [2,2]> (a, w1) e = {END}',
    "transposed": f"f = ConvTranspose <strides = [2,2], pads = [1,1,1,1]> (t, w1) e = {END}",
    "residual": f"a = Conv <pads = [1,1,1,1]> (t, w1) b = Add (t, a) f = Relu (b) e = {END}",
    "h-swish, excitation": (
        f"a = HardSwish (t) p = GlobalAveragePool (a) q = Conv (p, w3) r = HardSigmoid (q) f = Mul (a, r) e = {END}"
    ),
    "concat": (
        "a = Relu (t) b = Sigmoid (t) c = Concat <axis = 1> (a, b)"
        " d = ReduceMean <axes = [2, 3], keepdims = 0> (c) y = Gemm (d, w5)"
    ),
    "average pool": (
        "a = AveragePool <kernel_shape = [2,2], strides = [2,2]> (t) b = Tanh (a) c = Flatten (b) y = MatMul (c, w6)"
    ),
    "max pool": (
        "a = MaxPool <kernel_shape = [2,2], strides = [2,2]> (t) b = Transpose <perm = [0,2,3,1]> (a)"
        " c = Flatten (b) y = MatMul (c, w6)"
    ),
    "enlarged": (
        'a = Relu (t) b = Resize <mode = "nearest", nearest_mode = "floor",'
        f' coordinate_transformation_mode = "asymmetric"> (a, , twice) f = Conv (b, w1) e = {END}'
    ),
    "normalized": (
        "a = Conv (t, w3) b = Tanh (a) c = BatchNormalization (b, g, bb, m, v) d = Sub (c, one) e = Div (d, two)"
        " f = GlobalAveragePool (e) z = Flatten (f) y = Softmax (z)"
    ),
}


class Ones:
    """In place of random numbers: the gradient of the sum of all outputs."""

    def standard_normal(self, shape):
        return np.ones(shape)


def network(body, opset=17):
    rng = np.random.default_rng(4)
    shapes = {
        "w0": (4, 3, 3, 3),
        "w1": (4, 4, 3, 3),
        "w2": (4, 1, 3, 3),
        "w3": (4, 4, 1, 1),
        "w5": (8, 3),
        "w6": (36, 2),
    }
    tensors = {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()}
    tensors |= {"zero": np.array(0.0), "one": np.array(1.0), "two": np.array(2.0)}
    tensors["twice"] = np.array([1, 1, 2, 2], np.float32)
    tensors |= {name: rng.uniform(0.5, 1.5, 4) for name in ("g", "bb", "m", "v")}
    used = body.replace(",", " ").replace(")", " ").split()
    outputs = 2 if "w6" in body else 3 if "w5" in body else 4
    text = HEAD.format(opset=opset, outputs=outputs, body=body)
    return with_weights(text, {name: value for name, value in tensors.items() if name == "w0" or name in used})


def by_differences(model, tensor, output, feeds):
    """sum over positions of g g^T, mean over images, g the derivative of the sum of the output by the tensor."""
    inner = onnx.ModelProto()
    inner.CopyFrom(model)
    del inner.graph.output[:]
    inner.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in (tensor, output))
    values, exact = answers(inner, feeds, optimize=False)
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    del rest.graph.input[:], rest.graph.output[:]
    nodes = [node for node in model.graph.node if tensor not in node.output]
    del rest.graph.node[:]
    rest.graph.node.extend(nodes[: next(i for i, node in enumerate(nodes) if output in node.output) + 1])
    rest.graph.input.append(
        onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, [None, *values.shape[1:]])
    )
    rest.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    step, total = HALF_STEP, 0.0
    size = int(np.prod(values.shape[1:]))
    moves = step * np.eye(size, dtype=np.float32).reshape(size, *values.shape[1:])
    for value in values:
        ends = [
            answers(rest, {tensor: value + sign * moves}, optimize=False)[0].reshape(size, -1).sum(1)
            for sign in (1, -1)
        ]
        slope = ((ends[0].astype(np.float64) - ends[1]) / (2 * step)).reshape(values.shape[1], -1)
        total = total + slope @ slope.T
    power = float((exact.astype(np.float64) ** 2).sum()) / len(values)
    return total / len(values) / power


def found_of(model, tensors, feeds, statistics=None, align=None, rng=None):
    return gradients.sensitivities(model, tensors, set(tensors), set(), [feeds], rng or Ones(), statistics or {}, align)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_the_backward_pass_agrees_with_differences(body):
    model = network(body)
    feeds = samples(model)
    output = "z" if "Softmax" in body else "y"  # in front of it: behind, the outputs of an image sum to 1
    found = found_of(model, ["t"], feeds)
    expected = by_differences(model, "t", output, feeds)
    # Both take differences over the same step; float32 leaves some 1e-3 of a difference of sums.
    np.testing.assert_allclose(found["t"], expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_random_directions_average_to_the_sum_over_outputs():
    """E of v v^T is the unit matrix: for a linear network S is W^T W, and 64 images of 4 outputs tell it within 15 %."""
    model = network("a = Conv (t, w3) c = GlobalAveragePool (a) y = Flatten (c)")
    feeds = samples(model, 64)
    found = found_of(model, ["t"], feeds, rng=np.random.default_rng(0))["t"]
    weight = Graph(model).constant("w3")[:, :, 0, 0].astype(np.float64)
    expected = weight.T @ weight
    ratio = np.trace(found) / np.trace(expected)
    np.testing.assert_allclose(found / ratio, expected, rtol=0, atol=0.3 * np.abs(expected).max())


def test_the_diagonal_alone():
    model = network(BODIES["residual"])
    feeds = samples(model)
    whole = found_of(model, ["t", "a"], feeds)
    part = gradients.sensitivities(model, ["t", "a"], {"a"}, set(), [feeds], Ones(), {}, None)
    np.testing.assert_allclose(part["t"], np.diag(whole["t"]), rtol=1e-5)
    np.testing.assert_array_equal(gradients.strengths(whole["t"]), np.diag(whole["t"]))
    np.testing.assert_array_equal(part["a"], whole["a"])


def test_the_input_of_an_unknown_operator_counts_as_an_output():
    body = "a = Relu (t) b = Conv (a, w3) c = GlobalAveragePool (b) {} = Flatten (c)"
    known, unknown = network(body.format("y")), network(body.format("f") + " y = Hardmax (f)")
    expected = found_of(known, ["t", "a"], samples(known))
    found = found_of(unknown, ["t", "a"], samples(unknown))
    assert found.keys() == expected.keys() == {"t", "a"}
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5)


def test_what_stands_in_front_of_an_unknown_form_has_no_gradient():
    body = "a = Relu (t) k = Mul (a, a) p = MaxPool <kernel_shape = [2,2], ceil_mode = 1> (k) r = Conv (a, w3)"
    body += f" s = GlobalAveragePool (p) q = GlobalAveragePool (r) f = Add (s, q) e = {END}"
    found = found_of(network(body), ["t", "a", "k", "p", "r"], samples(network(body)))
    assert found.keys() == {"p", "r"}  # of the others on one way only, and that would be too little


def test_slopes_are_taken_where_the_aligned_samples_are():
    """A BatchNormalization's statistics put every value above the corner of the Relu: no slope is 0."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,6,6] x) => (float[N,4] y) {
        a = Conv (x, w0)
        b = BatchNormalization (a, g, bb, m, v)
        c = Relu (b)
        d = GlobalAveragePool (c)
        y = Flatten (d)
    }
    """
    rng = np.random.default_rng(0)
    tensors = {"w0": rng.normal(size=(4, 3, 3, 3)), "g": np.full(4, 0.01), "bb": np.full(4, 5.0)}
    model = with_weights(text, tensors | {"m": np.full(4, 900.0), "v": np.ones(4)})
    graph = Graph(model)
    statistics = fold(graph)
    feeds = samples(model)
    plain = found_of(graph.snapshot(), ["b"], feeds)
    assert not plain  # as it stands, no image gets over the corner
    found = found_of(graph.snapshot(), ["b"], feeds, statistics, aligned.align)
    assert (np.diag(found["b"]) > 0).all()
