"""Inputs that are read as bytes: the same function, and codes that are the pixels."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_lwdf import compress
from onnx_lwdf.activations.images import scenes
from onnx_lwdf.activations.inputs import read_inputs
from onnx_lwdf.activations.normalization import AS_BYTES, CONVENTIONS, Normalization
from onnx_lwdf.config import Config
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, find_layers
from onnx_lwdf.precondition.pixels import read_pixels
from tests.nets import answers, sqnr_db, with_weights

TORCHVISION, CENTRED, *_, CAFFE = CONVENTIONS
ALIKE = Normalization("given", (127.5, 127.5, 127.5), (64.0, 64.0, 64.0))
STEM = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,12,12] x) => (float y) {
    y = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w, b)
}
"""
SHARED = STEM.replace("y = Conv", "z = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w, b)\n    q = Conv").replace(
    "(x, w, b)\n}", "(x, w, b)\n    y = Add (z, q)\n}"
)


def stem(text=STEM, kernel=(8, 3, 3, 3)):
    rng = np.random.default_rng(3)
    return with_weights(text, {"w": rng.normal(0, 0.5, kernel), "b": rng.normal(0, 1, kernel[0])})


def pixels(count=4):
    """Whole numbers, [N, 3, 12, 12]."""
    return np.rint(255 * scenes(count, 3, 12, 12, np.random.default_rng(7)))


def normalized(images, normalization):
    return {"x": normalization.apply((images / 255).astype(np.float32))}


def options(normalization):
    return {"input_mean": normalization.mean, "input_std": normalization.std}


def normalizing(steps, x="float[N,3,12,12]"):
    """A text whose steps make n of x."""
    text = STEM.replace("float[N,3,12,12]", x).replace("(x, w", "(n, w")
    return text.replace("y = Conv", f"{steps}\n    y = Conv")


OWN = {  # text, the constants' axis of channels
    "sub div": (normalizing("c = Sub (x, mean) n = Div (c, std)"), 1),
    "mul add": (normalizing("c = Mul (gain, x) n = Add (shift, c)"), 1),
    "turned round": (normalizing("d = Sub (mean, x) e = Mul (d, minus) n = Div (e, std)"), 1),
    "bytes": (normalizing("f = Cast <to = 1> (x) c = Sub (f, mean) n = Div (c, std)", "uint8[N,3,12,12]"), 1),
    "half": (normalizing("f = Cast <to = 1> (x) c = Sub (f, mean) n = Div (c, std)", "float16[N,3,12,12]"), 1),
    "rows": (
        normalizing("c = Sub (x, mean) d = Div (c, std) n = Transpose <perm = [0,3,1,2]> (d)", "float[N,12,12,3]"),
        3,
    ),
}


def own(text, normalization=TORCHVISION, axis=1):
    """A model that reads pixels and normalizes them itself."""
    model, shape = stem(text), [1] * 4
    shape[axis] = 3
    mean, std = (np.reshape(values, shape) for values in (normalization.mean, normalization.std))
    constants = {"mean": mean, "std": std, "gain": 1 / std, "shift": -mean / std, "minus": np.array(-1.0)}
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    return model


def read(model, normalization=TORCHVISION, bits=8, **more):
    """The graph and its only input, read as bytes where that is worth it."""
    given = options(normalization) if "input_range" not in more else {}
    graph, config = Graph(model), Config(weight_bits=bits, activation_bits=bits, **given, **more)
    layers, _ = find_layers(graph)
    (spec,), _ = read_inputs(graph, config, {})
    plan = {layer.name: Bits(bits, bits) for layer in layers}
    layers, (spec,) = read_pixels(graph, layers, plan, (spec,), config)
    return graph, layers, spec


LAST = STEM.replace("float[N,3,12,12]", "float[N,12,12,3]").replace("(x, w", "(t, w")
LAST = LAST.replace("y = Conv", "t = Transpose <perm = [0,3,1,2]> (x)\n    y = Conv")
TURNED = STEM.replace("(x, w", "(t, w").replace("y = Conv", "t = Transpose <perm = [0,2,1,3]> (x)\n    y = Conv")
TURNED = TURNED.replace("float[N,3,12,12]", "float[N,3,3,12]")  # rows in the place of channels


@pytest.mark.parametrize("normalization", [TORCHVISION, CAFFE], ids=lambda known: known.name)
@pytest.mark.parametrize(
    ("text", "kernel"),
    [
        (STEM, (8, 3, 3, 3)),
        (STEM.replace("[1,1,1,1]", "[0,0,0,0]"), (8, 3, 3, 3)),
        (STEM.replace("[1,1,1,1]", "[0,2,1,3]"), (8, 3, 3, 3)),
        (STEM.replace("strides = [2,2]", "dilations = [2,2]"), (8, 3, 3, 3)),
        (STEM.replace("strides = [2,2]", "group = 3"), (6, 1, 3, 3)),
        (STEM.replace("y = Conv", "s = Shape (x)\n    y = Conv"), (8, 3, 3, 3)),
        (LAST, (8, 3, 3, 3)),
    ],
    ids=["padded", "bare", "aside", "dilated", "grouped", "shape", "channels last"],
)
def test_the_function_stays_and_codes_are_pixels(text, kernel, normalization):
    model, images = stem(text, kernel), pixels()
    feeds = normalized(images, normalization)
    if "Transpose" in text:
        feeds = {"x": np.ascontiguousarray(feeds["x"].transpose(0, 2, 3, 1))}
    (exact,) = answers(model, feeds)
    graph, layers, spec = read(model, normalization)
    assert spec.pixels is not None
    assert layers[0].input == spec.pixels
    (answer,) = answers(graph.snapshot(), feeds)
    # float32: sums of products of up to 255, in place of 2.6
    np.testing.assert_allclose(answer, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    graph.set_outputs([spec.pixels])
    graph.commit()
    (held,) = answers(graph.model, feeds)
    if text == STEM:
        np.testing.assert_allclose(held[:, :, 1:-1, 1:-1], images, rtol=0, atol=1e-3)
        mean = np.broadcast_to(np.array(normalization.mean).reshape(1, -1, 1, 1), held[:, :, :1].shape)
        np.testing.assert_allclose(held[:, :, :1], mean, rtol=1e-6)


@pytest.mark.parametrize("normalization", [TORCHVISION, CAFFE], ids=lambda known: known.name)
@pytest.mark.parametrize(("text", "axis"), OWN.values(), ids=OWN)
def test_a_model_that_normalizes_by_itself_is_read_as_bytes_behind_that(text, axis, normalization):
    model, images = own(text, normalization, axis), pixels()
    kind = np.uint8 if "uint8" in text else np.float16 if "float16" in text else np.float32
    feeds = {"x": np.ascontiguousarray(images.transpose(0, 2, 3, 1) if axis == 3 else images).astype(kind)}
    (exact,) = answers(model, feeds)
    graph, _, spec = read(model, AS_BYTES)
    assert spec.pixels is not None
    (answer,) = answers(graph.snapshot(), feeds)
    np.testing.assert_allclose(answer, exact, rtol=0, atol=1e-5 * np.abs(exact).max())  # as above
    graph.set_outputs([spec.pixels])
    graph.commit()
    (held,) = answers(graph.model, feeds)
    np.testing.assert_allclose(held[:, :, 1:-1, 1:-1], images, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "steps",
    [
        "c = Sub (x, mean) n = Div (c, zeros)",
        "c = Sub (x, mean) n = Div (std, c)",
        "c = Sub (x, minus) n = Div (c, minus)",  # one mean for all
        "n = Mul (x, x)",
        "c = Sub (x, plane) n = Div (c, std)",
        "c = Cast <to = 6> (x) d = Cast <to = 1> (c) e = Sub (d, mean) n = Div (e, std)",
        "c = Clip (x) d = Sub (c, mean) n = Div (d, std)",
    ],
    ids=["zero", "reciprocal", "one mean", "square", "plane", "rounded", "clip"],
)
def test_what_is_no_normalization_of_channels_is_left_alone(steps):
    model = own(normalizing(steps))
    for name, shape in (("zeros", (1, 3, 1, 1)), ("plane", (1, 3, 12, 12))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
    graph, _, spec = read(model, AS_BYTES)
    assert spec.pixels is None
    assert [node.op_type for node in graph.nodes] == [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    ("text", "normalization", "more"),
    [
        (STEM, CENTRED, {}),
        (STEM, ALIKE, {}),
        (STEM, TORCHVISION, {"bits": 7}),
        (STEM, TORCHVISION, {"target": "tensorrt"}),
        (STEM, TORCHVISION, {"input_range": (-1.0, 1.0)}),
        (SHARED, TORCHVISION, {}),
        (TURNED, TORCHVISION, {}),
        (STEM.replace("pads = [1,1,1,1]", 'auto_pad = "SAME_UPPER"'), TORCHVISION, {}),
        (STEM.replace("float[N,3,12,12] x", "uint8[N,3,12,12] x").replace("y = Conv", "f = Cast <to = 1> (x)\n    y = Conv")
         .replace("(x, w, b)", "(f, w, b)"), TORCHVISION, {}),
    ],
    ids=["one mean", "channels alike", "seven bits", "symmetric", "range", "two readers", "turned", "auto pad", "cast"],
)  # fmt: skip
def test_left_alone(text, normalization, more):
    model = stem(text)
    graph, _, spec = read(model, normalization, **more)
    assert spec.pixels is None
    assert [node.op_type for node in graph.nodes] == [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("normalization", [TORCHVISION, CAFFE], ids=lambda known: known.name)
def test_the_first_layer_of_a_file_is_nearly_as_good_as_its_weights(normalization):
    model, feeds = stem(), normalized(pixels(16), normalization)
    fast = {"samples": 32, "jobs": 1, "target": "x86-vnni", **options(normalization)}
    done = compress(model, **fast)
    assert done.report.layers[0].reason == "reads pixels of 0 to 255"
    quantize, convolution = (
        next(node for node in done.model.graph.node if node.op_type == op) for op in ("QuantizeLinear", "Conv")
    )
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in done.model.graph.initializer}
    assert [float(constants[name]) for name in quantize.input[1:3]] == [1.0, 0.0]
    alone = compress(model, activation_bits="float", **fast).model
    graph = Graph(done.model)
    graph.set_outputs([convolution.output[0]])  # in front of the output's own grid
    graph.commit()
    (exact,), (answer,), (weights,) = (answers(one, feeds) for one in (model, graph.model, alone))
    inside = np.s_[:, :, 1:, 1:]  # the first row and column read padding, which is up to half a pixel off
    lost = sqnr_db(exact[inside], weights[inside]) - sqnr_db(exact[inside], answer[inside])
    assert lost < 3  # what padding is off, the bias takes up everywhere; rounded pixels lose 6
