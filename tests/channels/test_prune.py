"""Channels that carry nothing go without any loss; what cannot be resolved is left alone and named."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnx_lwdf
from onnx_lwdf.errors import ModelError
from tests.channels.nets import PARTNER_CHANNELS, constant_channels, partners, twins
from tests.nets import answers, residual, samples, sqnr_db, with_weights

FAST = {"samples": 64, "jobs": 1, "input_range": (-4.0, 4.0)}
LOSSLESS_DB = 60  # whatever goes must cost no more than a channel that carries nothing


def reasons(model: onnx.ModelProto, **options: object) -> dict[str, str]:
    report = onnx_lwdf.compress(model, **FAST, **options).report
    return {layer.name: layer.reason for layer in report.layers}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Layer inputs from samples like those that the tests judge by."""
    path = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(path, samples(partners()[0], 256, seed=9)["x"])
    return {"activations_from": path, "jobs": 1}


@pytest.mark.parametrize("make", [twins, constant_channels])
def test_as_many_channels_as_carry_nothing_go_without_loss(make, options):
    source = make()
    model = onnx_lwdf.compress(source, channels=6.5 / PARTNER_CHANNELS, **options).model
    feeds = samples(source, 8)
    assert sqnr_db(answers(source, feeds)[0], answers(model, feeds)[0]) > LOSSLESS_DB


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_what_remains_is_valid_and_shapes_in_the_file_are_true(share):
    source = onnx.shape_inference.infer_shapes(partners()[0])
    result = onnx_lwdf.compress(source, channels=share, **FAST)
    onnx.checker.check_model(result.model, full_check=True)
    stated = {info.name: info for info in result.model.graph.value_info}
    bare = onnx.ModelProto.FromString(result.model.SerializeToString())
    del bare.graph.value_info[:]
    for info in onnx.shape_inference.infer_shapes(bare).graph.value_info:
        if info.name in stated:
            assert stated[info.name].type.tensor_type.shape.dim[1] == info.type.tensor_type.shape.dim[1], info.name
    assert answers(result.model, samples(source))[0].shape == (4, 4)
    removed = PARTNER_CHANNELS * share
    assert source.ByteSize() > result.model.ByteSize()
    gone = sum(
        int(layer.reason.split(" of ")[0]) for layer in result.report.layers if " channels removed" in layer.reason
    )
    assert gone >= int(removed)  # depthwise layers and sums name a channel once more


def test_fewer_channels_cost_more(options):
    source = partners()[0]
    feeds = samples(source, 16)
    exact = answers(source, feeds)[0]
    models = [onnx_lwdf.compress(source, channels=share, **options).model for share in (0.1, 0.5)]
    losses = [sqnr_db(exact, answers(model, feeds)[0]) for model in models]
    assert losses[0] > losses[1] + 3


def test_with_integers(options):
    source = twins()
    alone = onnx_lwdf.compress(source, bits=8, **options).report
    report = onnx_lwdf.compress(source, channels=6.5 / PARTNER_CHANNELS, bits=8, **options).report
    assert {layer.bits for layer in report.layers} == {"w8a8"}
    assert report.output_db is not None
    assert report.output_db > alone.output_db - 2  # grids of other channels, on which a decibel turns
    assert report.options["channels"] == 6.5 / PARTNER_CHANNELS


UNRESOLVED = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,8,8] x) => (float[N,8,8,8] y, float[N,4,8,8] z) {
    a = Conv (x, w0)
    b = Softmax <axis = 1> (a)
    c = Conv <group = 2> (b, w1)
    d = Conv (c, w2)
    e = Relu (d)
    y = Conv (e, w3)
    z = Conv (e, w4)
}
"""


def unresolved():
    rng = np.random.default_rng(0)
    drawn = {"w0": (8, 3, 1, 1), "w1": (8, 4, 1, 1), "w2": (6, 8, 1, 1), "w3": (8, 6, 1, 1), "w4": (4, 6, 1, 1)}
    return with_weights(UNRESOLVED, {name: rng.normal(size=shape) for name, shape in drawn.items()})


def test_what_cannot_be_resolved_is_left_alone_and_named():
    found = reasons(unresolved(), channels=0.4)
    assert found["conv_0"] == "channels kept: read by Softmax softmax_1"
    assert found["conv_2"] == "channels kept: Conv conv_2 has 2 groups"
    assert found["conv_3"] == "2 of 6 channels removed"
    assert found["conv_5"].startswith("channels kept: an output of the model; re-fitted at ")


def test_excluded_layers_keep_their_channels():
    found = reasons(partners()[0], channels=0.2, exclude=["conv_5"])
    assert found["conv_5"] == "excluded"
    assert found["conv_4"].startswith("channels kept: read by Conv conv_5")
    model = onnx_lwdf.compress(partners()[0], channels=0.2, exclude=["conv_5"], **FAST).model
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(weights["w2"], partners()[1]["w2"].astype(np.float32))


def test_nothing_to_remove():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,8,8] x) => (float[N,4,8,8] y) { y = Conv (x, w) }
    """
    source = with_weights(text, {"w": np.ones((4, 3, 1, 1))})
    with pytest.raises(ModelError, match="no channels can be removed: an output of the model"):
        onnx_lwdf.compress(source, channels=0.5, **FAST)
    with pytest.raises(ModelError, match="less than one step"):
        onnx_lwdf.compress(residual(), channels=0.001, **FAST)


def test_the_same_bytes_with_any_number_of_jobs():
    made = {
        onnx_lwdf.compress(
            residual(), channels=0.3, samples=16, jobs=jobs, input_range=(-4.0, 4.0)
        ).model.SerializeToString(deterministic=True)
        for jobs in (1, 2)
    }
    assert len(made) == 1


def test_rows_that_a_matmul_reads_have_no_channels_on_axis_one():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,4,4] x) => (float[N,16,5] y) {
        a = Conv <pads = [1,1,1,1]> (x, w0)
        b = Relu (a)
        c = Conv (b, w1)
        d = Reshape (c, shape)
        e = Transpose <perm = [0,2,1]> (d)
        y = MatMul (e, w2)
    }
    """
    rng = np.random.default_rng(0)
    tensors = {"w0": rng.normal(0, 0.3, (24, 3, 3, 3)), "w1": rng.normal(0, 0.3, (6, 24, 1, 1))}
    tensors |= {"w2": rng.normal(0, 0.3, (6, 5)), "shape": np.array([0, 6, -1], np.int64)}
    source = with_weights(text, tensors)
    result = onnx_lwdf.compress(source, channels=0.3, bits=8, **FAST)
    assert answers(result.model, samples(source))[0].shape == answers(source, samples(source))[0].shape
    assert any(" channels removed" in layer.reason for layer in result.report.layers)


def test_a_batch_on_axis_one_stays_open():
    """Behind a Transpose to sequences the batch stands where channels were: one sample must not become its size."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,4,4] x) => (float[P,N,5] y) {
        a = Conv <pads = [1,1,1,1]> (x, w0)
        b = Relu (a)
        c = Conv <kernel_shape = [4,1]> (b, w1)
        d = Squeeze (c, axis)
        e = Transpose <perm = [2,0,1]> (d)
        f = Unsqueeze (e, axis)
        g = Reshape (f, shape)
        y = MatMul (g, w2)
    }
    """
    rng = np.random.default_rng(0)
    tensors = {
        "w0": rng.normal(0, 0.3, (24, 3, 3, 3)),
        "w1": rng.normal(0, 0.3, (6, 24, 4, 1)),
        "w2": rng.normal(0, 0.3, (6, 5)),
    }
    tensors |= {"axis": np.array([2], np.int64), "shape": np.array([0, 0, -1], np.int64)}
    source = with_weights(text, tensors)
    model = onnx_lwdf.compress(source, channels=0.3, **FAST).model
    for count in (1, 3):
        assert answers(model, samples(source, count))[0].shape == (4, count, 5)
