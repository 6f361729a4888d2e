"""Emitted files: onnxruntime against the ONNX reference evaluator, kernels that run, limits that hold."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import onnx_lwdf
from onnx_lwdf.config import TARGETS
from tests.emit.rebuilding import kernels
from tests.nets import FAST, answers, residual, samples, sqnr_db, with_weights


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if not target.signed_activations])
def test_every_layer_becomes_an_integer_kernel(bits, target):
    model = onnx_lwdf.compress(residual(), bits=bits, target=target, **FAST).model
    onnx.checker.check_model(model, full_check=True)
    counts = Counter(kernels(model))
    assert counts["QLinearConv"] == 4
    assert counts["QLinearAdd"] == 1
    assert counts["QLinearGlobalAveragePool"] == 1
    assert counts["QGemm"] == 1
    assert not {"Conv", "FusedConv"} & set(counts)


@pytest.mark.parametrize("bits", [8, 5])
def test_reference_evaluator_gives_the_same_answer(bits):
    source = residual()
    source.opset_import[0].version, source.ir_version = 21, 10  # the evaluator knows DequantizeLinear from 19 on
    model = onnx_lwdf.compress(source, bits=bits, **FAST).model
    feeds = samples(model)
    reference = ReferenceEvaluator(model).run(None, feeds)[0]
    # Without fusion the two differ only where a float32 sum lands on a rounding tie.
    assert sqnr_db(reference, answers(model, feeds, optimize=False)[0]) > 45
    # With integer kernels a tie may move one code at each of six layers: far below the quantization error itself.
    assert sqnr_db(reference, answers(model, feeds)[0]) > 30


def test_eight_bits_are_near_float():
    source = residual()
    model = onnx_lwdf.compress(source, **FAST).model
    feeds = samples(source, 16)
    assert sqnr_db(answers(source, feeds)[0], answers(model, feeds)[0]) > 20


def stored_codes(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {
        tensor.name: numpy_helper.to_array(tensor).astype(int)
        for tensor in model.graph.initializer
        if tensor.name.endswith(".codes") and tensor.data_type == onnx.TensorProto.INT8
    }


def worst_pair(codes: np.ndarray) -> int:
    """Over filters [out, in, kh, kw] flattened in NHWC order, or rows [out, in]."""
    rows = codes.transpose(0, 2, 3, 1).reshape(len(codes), -1) if codes.ndim == 4 else codes
    even = rows.shape[1] // 2 * 2
    return int(np.abs(rows[:, 0:even:2] + rows[:, 1:even:2]).max())


def all_of_one_sign() -> onnx.ModelProto:
    """Filters whose pairs all want to be over the limit."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,12,12] x) => (float[N,6] y) {
        a = Conv (x, w0)
        b = Relu (a)
        c = Conv (b, w1)
        p = GlobalAveragePool (c)
        f = Flatten (p)
        y = Gemm <transB = 1> (f, w2)
    }
    """
    rng = np.random.default_rng(0)
    shapes = {"w0": (5, 3, 3, 3), "w1": (6, 5, 3, 3), "w2": (6, 6)}
    return with_weights(text, {name: rng.uniform(0.8, 1, shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("method", ["auto", "rtn", "squant", "gptq"])
def test_no_pair_of_codes_can_saturate(method):
    codes = stored_codes(onnx_lwdf.compress(all_of_one_sign(), method=method, **FAST).model)
    assert len(codes) == 3
    assert max(worst_pair(array) for array in codes.values()) <= 128
    free = stored_codes(onnx_lwdf.compress(all_of_one_sign(), method=method, target="x86-vnni", **FAST).model)
    assert max(worst_pair(array) for array in free.values()) > 128


def test_a_convolution_that_is_the_output_keeps_the_output_name():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,8,8] x) => (float[N,2,8,8] y, float[N,4,8,8] b) {
        a = Conv <pads = [1,1,1,1]> (x, w0)
        b = Relu (a)
        y = Conv (b, w1)
    }
    """
    rng = np.random.default_rng(0)
    source = with_weights(text, {"w0": rng.normal(size=(4, 3, 3, 3)), "w1": rng.normal(size=(2, 4, 1, 1))})
    model = onnx_lwdf.compress(source, **FAST).model
    assert [value.name for value in model.graph.output] == ["y", "b"]
    feeds = samples(source)
    for exact, answer in zip(answers(source, feeds), answers(model, feeds), strict=True):
        assert sqnr_db(exact, answer) > 20


def test_a_transposed_convolution_stays_float_with_integers_and_is_stored_small_without():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,8,8] x) => (float[N,2,16,16] y) {
        a = Conv <pads = [1,1,1,1]> (x, w0)
        b = Relu (a)
        y = ConvTranspose <strides = [2,2]> (b, w1)
    }
    """
    rng = np.random.default_rng(0)
    source = with_weights(text, {"w0": rng.normal(size=(4, 3, 3, 3)), "w1": rng.normal(size=(4, 2, 2, 2))})
    report = onnx_lwdf.compress(source, **FAST).report
    assert [(layer.op, layer.status) for layer in report.layers] == [("Conv", "compressed"), ("ConvTranspose", "kept")]
    small = onnx_lwdf.compress(source, activation_bits="float", **FAST)
    assert {layer.status for layer in small.report.layers} == {"compressed"}
    feeds = samples(source)
    assert sqnr_db(answers(source, feeds)[0], answers(small.model, feeds)[0]) > 30


def test_a_tiny_channel_with_a_large_bias_does_not_overflow():
    source = residual()
    for tensor in source.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if tensor.name == "w3":
            array[0] = 1e-12
        if tensor.name == "wb3":
            array[0] = 3.0
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    model = onnx_lwdf.compress(source, **FAST).model
    feeds = samples(source)
    assert sqnr_db(answers(source, feeds)[0], answers(model, feeds)[0]) > 15
