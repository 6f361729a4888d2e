"""Inputs that are read in two parts: the same function, and one grid that holds both finely."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lwdf import compress, preparation
from onnx_lwdf.activations.inputs import read_inputs
from onnx_lwdf.activations.normalization import ASSUMED
from onnx_lwdf.config import Config
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, find_layers
from onnx_lwdf.precondition.residual import FINER, REACH, split_inputs
from tests.fashion_mnist import load
from tests.nets import answers, sqnr_db, with_weights

MODELS = Path(__file__).parent.parent.parent / "models"
NET = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,12,12] x) => (float y) {
    a = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w, b)
    r = Relu (a)
    y = Conv <pads = [1,1,1,1]> (r, v)
}
"""  # without BatchNormalization: the first layer has 1 % of the work and of the weights, the input is assumed
GREY = NET.replace("[N,3,12,12]", "[N,1,12,12]")
ROWS = NET.replace("float[N,3,12,12]", "float[N,12,12,3]").replace("(x, w", "(t, w")
ROWS = ROWS.replace("a = Conv", "t = Transpose <perm = [0,3,1,2]> (x)\n    a = Conv")
TENFOLD = NET.replace("(x, w", "(t, w").replace("a = Conv", "t = Mul (x, ten)\n    a = Conv")
TWICE = NET.replace("a = Conv", "z = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w, b)\n    q = Conv")
TWICE = TWICE.replace("r = Relu", "a = Add (z, q)\n    r = Relu")
GROUPED = NET.replace("a = Conv <", "a = Conv <group = 3, ")


def net(text=NET, channels=3, wide=126):
    rng = np.random.default_rng(3)
    return with_weights(
        text,
        {
            "w": rng.normal(0, 0.5, (wide, channels, 3, 3)),
            "b": rng.normal(0, 1, wide),
            "v": rng.normal(0, 0.05, (wide, wide, 3, 3)),
            "ten": np.array(10.0),
        },
    )


def read(model, bits=8, **more):
    """The graph, its layers and its only input, read in parts where that is worth it."""
    graph, config = Graph(model), Config(weight_bits=bits, activation_bits=bits, **more)
    layers, _ = find_layers(graph)
    inputs, _ = read_inputs(graph, config, {})
    plan = {layer.name: Bits(bits, 8 if layer is layers[0] else bits) for layer in layers}
    layers, (spec,) = split_inputs(graph, layers, plan, inputs, config)
    return graph, layers, spec


@pytest.mark.parametrize(
    ("text", "channels", "times"),
    [
        (NET, 3, 1),
        (GREY, 1, 1),
        (NET.replace("pads = [1,1,1,1], strides", "pads = [0,2,1,3], strides"), 3, 1),
        (NET.replace("strides = [2,2]", "dilations = [2,2]"), 3, 1),
        (ROWS, 3, 1),
        (TENFOLD, 3, 10),
    ],
    ids=["padded", "grey", "sides", "dilated", "channels last", "scaled"],
)
def test_the_function_stays_and_the_grid_holds_both_parts(text, channels, times):
    model = net(text, channels)
    graph, layers, spec = read(model)
    assert spec.normalization is not None
    assert spec.parts is not None
    assert layers[0].input == spec.parts
    assert spec.ranges[spec.parts] == (-128, 127)  # 255 steps of 1
    reach = REACH * max(map(abs, spec.normalization.range))
    rng = np.random.default_rng(5)
    shape = (4, channels, 12, 12)
    images = rng.uniform(-reach, reach, shape).astype(np.float32)
    images[0] = reach  # a large even area at the very end
    feeds = {"x": images.transpose(0, 2, 3, 1) if text == ROWS else images}
    (exact,), (answer,) = answers(model, feeds), answers(graph.snapshot(), feeds)
    np.testing.assert_allclose(answer, exact, rtol=0, atol=1e-5 * np.abs(exact).max())  # float32: more products
    graph.set_outputs([spec.parts])
    graph.commit()
    (held,) = answers(graph.model, feeds)
    assert held.shape[1] == 2 * channels
    stored = np.clip(np.rint(held), -128, 127)
    whole, left = stored[:, :channels], stored[:, channels:]
    np.testing.assert_array_equal(whole, held[:, :channels])  # exact, the last step too
    step = reach / (127 - FINER / 2)
    found = step * (whole + left / FINER)
    # Half a step of the residual, and float32's rounding of some hundred steps
    np.testing.assert_allclose(found, images, rtol=0, atol=step * (0.5 / FINER + 1e-4))
    assert times * step * np.abs(whole).max() >= times * reach - step


@pytest.mark.parametrize(
    ("model", "more"),
    [
        (net(), {"input_mean": (127.5,), "input_std": (127.5,)}),
        (net(), {"bits": 5}),
        (net(), {"target": "tensorrt"}),
        (net(wide=3), {}),
        (net(TWICE), {}),
        (net(GROUPED, channels=1), {}),
        (net(NET.replace("float[N,3,12,12] x", "uint8[N,3,12,12] x").replace("a = Conv", "f = Cast <to = 1> (x)\n    a = Conv")
         .replace("(x, w", "(f, w")), {}),
    ],
    ids=["known", "five bits", "symmetric", "much of the work", "two readers", "grouped", "bytes"],
)  # fmt: skip
def test_left_alone(model, more):
    graph, _, spec = read(model, **more)
    assert spec.parts is None
    assert [node.op_type for node in graph.nodes] == [node.op_type for node in model.graph.node]


def test_files_of_networks_of_unknown_range_answer_more_closely(monkeypatch):
    """Fashion-MNIST's normalization is in no table, and half of its pixels are one even black."""
    model, (images, _) = onnx.load(MODELS / "fmnist-resnet-bn.onnx"), load()
    feeds = {model.graph.input[0].name: images[:500]}
    (exact,) = answers(model, feeds)

    def made():
        done = compress(model, bits=8)
        (answer,) = answers(done.model, feeds)
        return done.report.layers[0].reason, sqnr_db(exact, answer)

    note, found = made()
    assert "reads its input in two parts" in note
    monkeypatch.setattr(preparation, "split_inputs", lambda graph, layers, plan, inputs, config: (layers, inputs))
    note, before = made()
    assert "two parts" not in note
    assert found > before + 3  # it was 9 dB


def test_what_is_assumed_of_an_unknown_input_is_not_what_pixels_are():
    """torchvision's normalization is assumed of three channels: the parts hold what else it may be."""
    _, _, spec = read(net())
    assert spec.normalization == ASSUMED
    assert spec.pixels is None
    assert spec.vague
