"""Which layers are pruned, exact numbers of zeros in the file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnx_lwdf
from onnx_lwdf.errors import ModelError, OptionError
from tests.nets import answers, residual, samples, sqnr_db, with_weights
from tests.test_end_to_end import accuracy

MODELS = Path(__file__).parent.parent / "models"
FAST = {"samples": 16, "jobs": 1, "input_range": (-4.0, 4.0)}  # the tests feed standard normal values
FIRST, DEPTHWISE, POINTWISE, STRIDED, CLASSIFIER = "conv_0", "conv_3", "conv_6", "conv_9", "gemm_13"


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Weight of each weighted node, by the node's name."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {node.name: stored[node.input[1]] for node in model.graph.node if node.op_type in ("Conv", "Gemm")}


def test_the_names_of_the_test_network():
    assert list(weights(residual())) == [FIRST, DEPTHWISE, POINTWISE, STRIDED, CLASSIFIER]


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("method", ["obs", "magnitude"])
def test_the_budget_is_exact_and_float_where_nothing_else_is_asked(sparsity, method):
    options = {"method": method, "format": "dense", "fail_under": -100}  # at 90 % little is left of the signal
    result = onnx_lwdf.compress(residual(), sparsity=sparsity, **options, **FAST)
    stored = weights(result.model)
    pruned = [POINTWISE, STRIDED, CLASSIFIER]
    zeros = sum(int((stored[name] == 0).sum()) for name in pruned)
    assert zeros == round(sparsity * sum(stored[name].size for name in pruned))
    assert {layer.name: layer.reason for layer in result.report.kept} == {
        FIRST: "dense: the first layer",
        DEPTHWISE: "dense: depthwise",
    }
    for layer in result.report.compressed:
        assert layer.sparsity == (stored[layer.name] == 0).mean()
        assert (layer.bits, layer.method) == ("float", method)


def test_a_named_layer_has_its_own_share():
    options = {"sparsity": 0.5, "sparsity_for": {DEPTHWISE: 0.25, CLASSIFIER: 0.0}}
    stored = weights(onnx_lwdf.compress(residual(), format="dense", **options, **FAST).model)
    assert (stored[DEPTHWISE] == 0).sum() == 18
    assert (stored[CLASSIFIER] == 0).sum() == 0
    sharing = [stored[POINTWISE], stored[STRIDED]]
    assert sum(int((w == 0).sum()) for w in sharing) == round(0.5 * sum(w.size for w in sharing))


def test_only_named_layers():
    result = onnx_lwdf.compress(residual(), sparsity_for={"Gemm": 0.5}, **FAST)
    assert [layer.name for layer in result.report.compressed] == [CLASSIFIER]
    assert {layer.reason for layer in result.report.kept} == {"dense: not named"}


@pytest.mark.parametrize("bits", [None, 8])
def test_two_of_four_along_input_channels(bits):
    result = onnx_lwdf.compress(residual(), nm=(2, 4), bits=bits, **FAST)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.model.graph.initializer}
    for name, node in (("w2", POINTWISE), ("w3", STRIDED)):
        weight = stored[f"{name}.codes"] if bits else weights(result.model)[node]  # [out, in, kh, kw]
        blocks = weight.reshape(weight.shape[0], -1, 4, *weight.shape[2:])
        assert (blocks != 0).sum(2).max() == 2
    notes = {layer.name: layer.reason for layer in result.report.layers}
    assert notes[CLASSIFIER] == "dense: 6 input channels, not a multiple of 4"
    assert notes[DEPTHWISE] == "dense: depthwise"


def test_the_layers_that_cost_most_for_their_weights_are_spared_up_to_a_tenth():
    """The narrow layers in the middle, whose inputs all count; the wide ones alone can have zeros."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,8,8] x) => (float[N,80,8,8] y) {
        a = Conv (x, w0)
        b = Relu (a)
        c = Conv (b, w1)
        d = Conv (c, w2)
        e = Relu (d)
        y = Conv (e, w3)
    }
    """
    rng = np.random.default_rng(0)
    shapes = {"w0": (64, 3, 1, 1), "w1": (4, 64, 1, 1), "w2": (96, 4, 1, 1), "w3": (80, 96, 1, 1)}
    source = with_weights(text, {name: rng.normal(0, 0.3, shape) for name, shape in shapes.items()})
    result = onnx_lwdf.compress(source, nm=(2, 4), **FAST)
    stored = list(weights(result.model).values())
    assert [layer.reason for layer in result.report.layers if "costs most" in layer.reason]
    spared = sum(w.size for w in stored[1:] if (w != 0).all())
    assert 0 < spared <= 0.1 * sum(w.size for w in stored[1:])
    for weight in stored[1:]:
        blocks = weight.reshape(weight.shape[0], -1, 4, *weight.shape[2:])
        assert (weight != 0).all() or (blocks != 0).sum(2).max() == 2


def test_with_bits_every_layer_is_rounded_and_the_pruned_ones_are_sparse():
    result = onnx_lwdf.compress(residual(), sparsity=0.5, bits=8, **FAST)
    assert {layer.bits for layer in result.report.layers} == {"w8a8"}
    methods = {layer.name: layer.method for layer in result.report.layers}
    assert (methods[POINTWISE], methods[DEPTHWISE]) == ("obs", "descent")
    pruned = {layer.name: layer.sparsity for layer in result.report.layers}
    assert sum(pruned[n] * weights(residual())[n].size for n in (POINTWISE, STRIDED, CLASSIFIER)) >= round(0.5 * 526)


def test_the_bias_takes_up_the_mean_error():
    source = residual()
    model = onnx_lwdf.compress(source, sparsity=0.6, samples=64, input_range=(-4.0, 4.0)).model
    feeds = samples(source, 64, seed=5)
    exact, answer = answers(source, feeds)[0], answers(model, feeds)[0]
    assert np.abs((exact - answer).mean(0)).max() < 0.35 * exact.std()
    assert sqnr_db(exact, answer) > 8


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"nm": (2, 4)}])
def test_nothing_to_prune(options):
    text = '<ir_version: 8, opset_import: ["" : 17]> net (float[N,3,8,8] x) => (float[N,3,6,6] y) { y = Conv (x, w) }'
    source = with_weights(text, {"w": np.random.default_rng(0).normal(0, 0.3, (3, 3, 3, 3))})
    with pytest.raises(ModelError, match="nothing to prune: dense: the first layer; name layers by --sparsity-for"):
        onnx_lwdf.compress(source, **options, **FAST)


def test_a_pattern_that_names_no_layer():
    with pytest.raises(OptionError, match="sparsity-for 'head' matches no layer; --dry-run lists their names"):
        onnx_lwdf.compress(residual(), sparsity_for={"head": 0.5}, **FAST)


def test_transposed_convolutions_are_pruned():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,8,8] x) => (float[N,4,16,16] y) {
        a = Conv <pads = [1,1,1,1]> (x, w0)
        b = Relu (a)
        y = ConvTranspose <strides = [2,2]> (b, w1)
    }
    """
    rng = np.random.default_rng(0)
    source = with_weights(text, {"w0": rng.normal(0, 0.3, (8, 3, 3, 3)), "w1": rng.normal(0, 0.3, (8, 4, 2, 2))})
    feeds, reached = samples(source), []
    for method in ("obs", "magnitude"):
        model = onnx_lwdf.compress(source, sparsity=0.5, method=method, format="dense", **FAST).model
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        last = next(node for node in model.graph.node if node.op_type == "ConvTranspose")
        assert (stored[last.input[1]] == 0).sum() == 64
        reached.append(sqnr_db(answers(source, feeds)[0], answers(model, feeds)[0]))
    assert reached[0] > reached[1]


@pytest.mark.parametrize("bits", [None, 8])
def test_a_real_network_keeps_its_accuracy(bits):
    source = onnx.load(MODELS / "fmnist-resnet-bn.onnx")
    result = onnx_lwdf.compress(source, sparsity=0.5, bits=bits)
    assert accuracy(result.model) >= accuracy(source) - 1.0
    layers = [layer for layer in result.report.layers if layer.sparsity > 0.02]
    zeros = sum(layer.sparsity * np.prod(layer.shape) for layer in layers)
    assert zeros >= 0.49 * sum(np.prod(layer.shape) for layer in layers)


def test_same_bytes_with_any_number_of_jobs():
    models = [onnx_lwdf.compress(residual(), sparsity=0.5, **{**FAST, "jobs": jobs}).model for jobs in (1, 2)]
    assert models[0].SerializeToString(deterministic=True) == models[1].SerializeToString(deterministic=True)
