"""A fixed batch is free while the model is compressed, and fixed again in what is written."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnx_lwdf
from onnx_lwdf.activations.inputs import find_inputs
from onnx_lwdf.batch import fix_batch, free_batch
from onnx_lwdf.config import Config
from onnx_lwdf.graph import Graph
from tests.nets import FAST, answers, residual, samples, sqnr_db, with_weights

SHUFFLED = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[2,3,8,8] x) => (float[2,4] y) {
    a = Conv <pads = [1,1,1,1]> (x, w0)
    r = Relu (a)
    s = Reshape (r, grouped)
    t = Transpose <perm = [0,2,1,3,4]> (s)
    u = Reshape (t, back)
    b = Conv <group = 2> (u, w1)
    p = GlobalAveragePool (b)
    f = Reshape (p, rows)
    y = Gemm (f, w2)
}
"""


def shuffled(rows: tuple[int, ...] = (2, -1)) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    shapes = {"w0": (8, 3, 3, 3), "w1": (6, 4, 1, 1), "w2": (6, 4)}
    targets = {"grouped": (2, 2, 4, 8, 8), "back": (2, 8, 8, 8), "rows": rows}
    tensors = {name: rng.normal(0, 0.4, shape) for name, shape in shapes.items()}
    return with_weights(SHUFFLED, tensors | {name: np.array(value) for name, value in targets.items()})


def fixed_at(model: onnx.ModelProto, size: int) -> onnx.ModelProto:
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = size
    return model


def test_free_and_fixed_again():
    model = shuffled()
    graph = Graph(model)
    before = model.SerializeToString(deterministic=True)
    fixed = free_batch(graph, find_inputs(graph, Config()))
    feeds = {"x": np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)}
    parts = [answers(shuffled(), {"x": feeds["x"][i : i + 2]})[0] for i in (0, 2, 4)]
    np.testing.assert_allclose(answers(graph.model, feeds)[0], np.concatenate(parts), rtol=1e-4, atol=1e-5)
    fix_batch(graph, fixed)
    assert graph.model.SerializeToString(deterministic=True) == before


def test_a_function_of_the_whole_batch_is_left_as_it_is():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[2,4] x) => (float[2,3] y) { m = ReduceMean <axes = [0]> (x)  d = Sub (x, m)  y = MatMul (d, w) }
    """
    model = with_weights(text, {"w": np.random.default_rng(0).normal(size=(4, 3))})
    before = model.SerializeToString(deterministic=True)
    graph = Graph(model)
    assert free_batch(graph, find_inputs(graph, Config())) is None
    assert graph.model.SerializeToString(deterministic=True) == before
    result = onnx_lwdf.compress(model, samples=32)
    feeds = samples(model)
    assert sqnr_db(answers(model, feeds)[0], answers(result.model, feeds)[0]) > 25


@pytest.mark.parametrize("size", [1, 3])
def test_a_fixed_batch_costs_nothing(size):
    free, fixed = onnx_lwdf.compress(residual(), **FAST), onnx_lwdf.compress(fixed_at(residual(), size), **FAST)
    assert fixed.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == size
    weights = [{t.name: numpy_helper.to_array(t) for t in r.model.graph.initializer} for r in (free, fixed)]
    np.testing.assert_equal(*weights)


@pytest.mark.parametrize("bits", [8, 6])
def test_shapes_that_name_the_batch(bits):
    model = shuffled()
    result = onnx_lwdf.compress(model, bits=bits, **FAST)
    targets = {t.name: numpy_helper.to_array(t).tolist() for t in result.model.graph.initializer if t.data_type == 7}
    assert targets == {"grouped": [2, 2, 4, 8, 8], "back": [2, 8, 8, 8], "rows": [2, -1]}
    feeds = samples(model)
    assert sqnr_db(answers(model, feeds)[0], answers(result.model, feeds)[0]) > 25


TAILS = {  # what drops the batch of one, and what follows
    "squeeze": ("y = Squeeze (f, first)", "float[4] y"),
    "squeeze more": ("k = Unsqueeze (f, last) y = Squeeze (k, both)", "float[4] y"),
    "gather": ("y = Gather <axis = 0> (f, zero)", "float[4] y"),
    "softmax": ("k = Squeeze (f, first) y = Softmax <axis = -1> (k)", "float[4] y"),
    "sizes": (
        "s = Shape (f) n1 = Gather <axis = 0> (s, zero) n2 = Unsqueeze (n1, first) t = Concat <axis = 0> (n2, rest)"
        " k = Reshape (f, t) y = Squeeze (k, first)",
        "float[4] y",
    ),
    "given back": ("k = Squeeze (f, first) h = Relu (k) y = Unsqueeze (h, first)", "float[1,4] y"),
}
ONE = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[1,3,8,8] x) => ({y}) {{
    a = Conv <pads = [1,1,1,1]> (x, w0)
    n = BatchNormalization (a, g, b, m, v)
    r = Relu (n)
    c = Conv (r, w1)
    p = GlobalAveragePool (c)
    f = Flatten (p)
    {tail}
}}
"""


def of_one(name: str, opset: int = 17) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    tail, y = TAILS[name]
    text = ONE.format(tail=tail, y=y).replace('"" : 17', f'"" : {opset}')
    constants = {"first": [0], "last": [2], "both": [0, 2], "zero": 0, "rest": [4]}
    if opset < 13:
        for word, axes in constants.items():
            for op in ("Squeeze", "Unsqueeze"):
                text = re.sub(rf"{op} \((\w+), {word}\)", rf"{op} <axes = {axes}> (\1)", text)
    tensors = {
        "w0": rng.normal(0, 0.4, (8, 3, 3, 3)),
        "w1": rng.normal(0, 0.4, (4, 8, 1, 1)),
        "g": rng.uniform(0.5, 1.5, 8),
        "b": rng.normal(0, 0.5, 8),
        "m": rng.normal(0, 0.5, 8),
        "v": rng.uniform(1, 4, 8),
    }
    return with_weights(text, tensors | {word: np.array(value) for word, value in constants.items() if word in text})


@pytest.mark.parametrize("opset", [17, 11])
@pytest.mark.parametrize("name", TAILS)
def test_a_batch_that_is_dropped_stays_meanwhile(name, opset):
    model = of_one(name, opset)
    onnx.checker.check_model(model, full_check=True)
    graph = Graph(onnx.ModelProto.FromString(model.SerializeToString()))
    fixed = free_batch(graph, find_inputs(graph, Config()))
    feeds = {"x": np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)}
    parts = [answers(model, {"x": feeds["x"][i : i + 1]})[0].reshape(1, 4) for i in range(6)]
    np.testing.assert_allclose(answers(graph.model, feeds)[0], np.concatenate(parts), rtol=1e-4, atol=1e-5)
    fix_batch(graph, fixed)
    again = graph.model
    assert [node.op_type for node in again.graph.node] == [node.op_type for node in model.graph.node]
    assert list(again.graph.output) == list(model.graph.output)
    np.testing.assert_array_equal(*(answers(one, {"x": feeds["x"][:1]})[0] for one in (model, again)))


@pytest.mark.parametrize("opset", [17, 11])
@pytest.mark.parametrize("name", TAILS)
def test_a_model_of_one_sample_is_as_good_as_one_of_many(name, opset):
    """Statistics of single images would be others in each image."""
    one = of_one(name, opset)
    result = onnx_lwdf.compress(one, **FAST)
    assert list(result.model.graph.output) == list(one.graph.output)
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    assert sqnr_db(answers(one, feeds)[0], answers(result.model, feeds)[0]) > 30


@pytest.mark.parametrize("name", ["squeeze", "whole"])
def test_who_takes_one_sample_at_a_time_is_told(name):
    model = of_one("squeeze")
    if name == "whole":  # a function of all samples
        model.graph.node[-1].CopyFrom(onnx.helper.make_node("ReduceMean", ["f"], ["y"], axes=[0], keepdims=0))
    warnings = onnx_lwdf.compress(model, **FAST).report.warnings
    assert any("takes one sample at a time" in text for text in warnings) == (name == "whole")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "options", [{"bits": "auto", "fail_under": 10.0}, {"max_size": 4000.0}, {"sparsity": 0.5}, {"channels": 0.3}]
)
def test_choices_where_one_sample_runs_at_a_time(options):
    """There is no deviation from sample to sample to measure an error by."""
    model = of_one("squeeze")
    model.graph.node[-1].CopyFrom(onnx.helper.make_node("ReduceMean", ["f"], ["y"], axes=[0], keepdims=0))
    result = onnx_lwdf.compress(model, **options, **FAST)
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    assert sqnr_db(answers(model, feeds)[0], answers(result.model, feeds)[0]) > 2
