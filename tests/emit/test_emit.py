"""All formats beside each other: the same solution gives the same kernels and the same answers however it is stored."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import onnx_lwdf
from onnx_lwdf import emit
from onnx_lwdf.config import Config
from onnx_lwdf.emit import FLOAT, FORMATS, INTEGER
from onnx_lwdf.emit.stored import Rounded, Stored
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, Layer, bias_of, find_layers, output_axis
from onnx_lwdf.ranges import grid_for
from onnx_lwdf.sites import find_sites
from tests.emit.rebuilding import kernels
from tests.nets import FAST, answers, residual, samples, sqnr_db, with_weights

BITS = {"w0": 8, "w1": 8, "w2": 3, "w3": 6, "w4": 5}
RUNNABLE = [
    (name, weights, activations)
    for name, form in FORMATS.items()
    for weights in form.weights
    for activations in form.activations
    if emit.refusal(name, weights, activations) is None
]


def wide() -> onnx.ModelProto:
    """Layers large enough for every storage to pay: first, depthwise, pointwise, strided, classifier; 93 % are zeros."""
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    net (float[N,3,12,12] x) => (float[N,40] y) {
        a = Conv <pads = [1,1,1,1]> (x, w0, b0)
        b = Relu (a)
        c = Conv <pads = [1,1,1,1], group = 32> (b, w1, b1)
        d = Clip (c, zero, six)
        e = Conv (d, w2, b2)
        s = Add (b, e)
        f = Conv <strides = [2,2]> (s, w3, b3)
        g = Relu (f)
        p = GlobalAveragePool (g)
        q = Flatten (p)
        y = Gemm <transB = 1> (q, w4, b4)
    }
    """
    rng = np.random.default_rng(0)
    shapes = [(32, 3, 3, 3), (32, 1, 3, 3), (32, 32, 1, 1), (61, 32, 3, 3), (40, 61)]
    tensors: dict[str, np.ndarray] = {"zero": np.float32(0), "six": np.float32(6)}
    for number, shape in enumerate(shapes):
        keep = rng.random(shape) < (0.07 if number > 1 else 1)
        tensors[f"w{number}"] = rng.normal(0, 0.3, shape) * keep
        tensors[f"b{number}"] = rng.normal(0, 0.1, shape[0])
    return with_weights(text, tensors)


def written(name: str, weights: str, activations: str) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The net's weights rounded to nearest by hand, or left float, in this format; the bytes by layer."""
    graph = Graph(wide())
    layers, _ = find_layers(graph)
    plan = {layer.name: Bits(BITS[layer.weight], 8 if activations == INTEGER else None) for layer in layers}
    sites = find_sites(graph, layers, plan)
    grids = {
        tensor: grid_for(-4.0 if site.low is None else site.low, 4.0, 8, False)
        for site in sites
        for tensor in site.tensors
    }
    stored = [_stored(graph, layer, weights, grids) for layer in layers]
    sizes = emit.emit(graph, FORMATS[name].store, stored, sites, grids, signed=False)
    graph.commit()
    return graph.model, sizes


def _stored(graph: Graph, layer: Layer, weights: str, grids: dict[str, object]) -> Stored:
    weight, axis, bits = graph.constant(layer.weight), output_axis(layer), BITS[layer.weight]
    assert weight is not None
    assert axis == 0
    half = 2 ** min(bits - 1, 6)  # not all of 8 bits: sums of two products would saturate on a CPU without VNNI
    low, high = -half, half - 1
    scale = (np.abs(weight).reshape(len(weight), -1).max(1, initial=1e-3) / -low).astype(np.float32)
    column = scale.reshape(-1, *[1] * (weight.ndim - 1))
    codes = np.clip(np.rint(weight / column), low, high).astype(np.int8)
    rounded = Rounded(codes, scale, axis, bits) if weights == INTEGER else None
    return Stored(layer, weight, rounded, bias_of(graph, layer), grids.get(layer.input))


def test_layers_found_before_a_commit_are_refused():
    graph = Graph(wide())
    layers, _ = find_layers(graph)
    stored = [_stored(graph, layer, INTEGER, {}) for layer in layers]
    graph.commit()
    with pytest.raises(AssertionError, match=layers[0].name):
        emit.emit(graph, FORMATS["folded"].store, stored, [], {}, signed=False)


@pytest.mark.parametrize(("name", "weights", "activations"), RUNNABLE)
def test_storage_changes_neither_kernels_nor_answers(name, weights, activations):
    model, _ = written(name, weights, activations)
    plain = {(INTEGER, INTEGER): "qdq", (INTEGER, FLOAT): "folded", (FLOAT, FLOAT): "dense"}[weights, activations]
    reference, _ = written(plain, weights, activations)
    if name != plain:
        assert model.ByteSize() < 0.9 * reference.ByteSize()
    assert model.ir_version <= 10
    assert kernels(model) == kernels(reference)
    rebuilding = {"Cast", "Mul", "BitShift", "ScatterElements", "CumSum", "Reshape", "ConstantOfShape"}
    assert not rebuilding & set(kernels(model))
    assert ("QLinearConv" in kernels(model)) == (activations == INTEGER)
    assert ("Conv" in kernels(model) or "FusedConv" in kernels(model)) == (activations == FLOAT)
    feeds = samples(model)
    np.testing.assert_array_equal(answers(model, feeds)[0], answers(reference, feeds)[0])
    if name != "sparse-initializer":
        onnx.checker.check_model(model, full_check=True)
        exact = ReferenceEvaluator(model).run(None, feeds)[0]
        assert sqnr_db(exact, answers(model, feeds)[0]) > (40 if activations == INTEGER else 100)


@pytest.mark.parametrize(("name", "weights", "activations"), RUNNABLE)
def test_bytes_of_the_layers_are_those_of_the_initializers_that_are_no_bias(name, weights, activations):
    model, sizes = written(name, weights, activations)
    biases = {node.input[2] for node in model.graph.node if node.op_type in ("Conv", "Gemm")}
    made = {node.output[0]: node for node in model.graph.node}
    biases |= {name for bias in biases if bias in made for name in made[bias].input}
    others = {name for node in model.graph.node if node.op_type in ("QuantizeLinear", "Clip") for name in node.input}
    operands = {"BitwiseAnd": 1, "BitShift": 1, "Reshape": 1, "Split": 1, "CumSum": 1, "ConstantOfShape": 0}  # no data
    others |= {node.input[operands[node.op_type]] for node in model.graph.node if node.op_type in operands}
    tensors = [t for t in model.graph.initializer if t.name not in biases | others]
    for sparse in model.graph.sparse_initializer:
        tensors += [sparse.values, sparse.indices]
    held = sum(numpy_helper.to_array(tensor).nbytes for tensor in tensors)
    assert abs(sum(sizes.values()) - held) < 3 * len(sizes), "layers share bytes where their codes meet"
    assert set(sizes) == {node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm")}


def test_onnx_rejects_a_convolution_fed_by_a_sparse_initializer():
    """As the report says. Where this fails onnx has learned it, and the warning can go."""
    model, _ = written("sparse-initializer", FLOAT, FLOAT)
    onnx.checker.check_model(model)
    assert model.graph.sparse_initializer
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("name", ["packed", "sparse"])
def test_the_report_plans_what_is_then_written(name):
    options = {"weight_bits": 4, "activation_bits": "float", "format": name, **FAST}
    written = onnx_lwdf.compress(wide(), **options).report
    config = Config(weight_bits=4, activation_bits=None, format=name, input_range=(-4.0, 4.0))
    planned = onnx_lwdf.inspect(wide(), config)
    pairs = list(zip(planned.layers, written.layers, strict=True))
    assert all(a.bytes_after >= b.bytes_after for a, b in pairs)
    assert written.output["bytes"] > sum(layer.bytes_after for layer in written.layers)
    if name == "packed":
        data = [layer for layer in planned.layers if layer.name == "conv_6"]  # w3, 4 bits
        codes, multipliers = 61 * 32 * 9 // 2, 61 * 2 * 9 * 3 // 8
        assert data[0].bytes_after - 4 * 61 in range(codes + multipliers, codes + multipliers + 64)


def test_opset_is_raised_only_where_bits_are_packed():
    eight = onnx_lwdf.compress(residual(), activation_bits="float", format="packed", **FAST)
    assert eight.model.opset_import[0].version == 17
    six = onnx_lwdf.compress(residual(), weight_bits=6, activation_bits="float", format="packed", **FAST)
    assert (six.model.opset_import[0].version, six.model.ir_version) == (18, 8)
    assert six.report.warnings == ("opset raised from 17 to 18, which format packed needs",)


def test_a_mixed_file_keeps_a_float_weight_float():
    graph = Graph(wide())
    layers, _ = find_layers(graph)
    stored = [_stored(graph, layer, INTEGER if layer.weight == "w3" else FLOAT, {}) for layer in layers]
    emit.emit(graph, FORMATS["folded"].store, stored, [], {}, signed=False)
    graph.commit()
    assert [node.op_type for node in graph.model.graph.node].count("Mul") == 1
    feeds = samples(graph.model)
    assert sqnr_db(answers(wide(), feeds)[0], answers(graph.model, feeds)[0]) > 20
