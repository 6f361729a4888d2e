"""onnx's own node tests and model structures, as small models: none crashes, none comes out wrong."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test import loader

import onnx_lwdf
from onnx_lwdf.errors import ModelError
from onnx_lwdf.runtime import Array
from tests.nets import answers

CODE = 2 / 127  # of the largest weight: codes are off by one at most, and pair-safe scales are twice as wide at most
INPUT, OUTPUT = 1 / 255, 1 / 255  # of the largest value: half a step, of a range of twice its size at most
OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization")
REASONS = (
    "the weight is not constant",
    "the bias is not constant",
    "the input is constant",
    "the constant is on the left side",
    "the input is transposed (transA)",
    "the bias differs by row",
    "a grouped ConvTranspose has no axis along which its outputs run",
    "onnxruntime has no integer ConvTranspose; format qdq keeps it in float",
    "the weight has 1 dimensions, not 2",
    "the weight has 3 dimensions, not 2",
    "the weight has 4 dimensions, not 2",
)


@dataclass(frozen=True)
class Case:
    name: str
    model: onnx.ModelProto
    values: dict[str, Array]  # of its inputs


@pytest.fixture(scope="module")
def cases():
    with warnings.catch_warnings():  # making up the data of other operators overflows here and there
        warnings.simplefilter("ignore")
        tests = loader.load_model_tests(kind="node")
    return [case for case in map(case_of, tests) if case is not None]


def case_of(test) -> Case | None:
    """A test of one node; older onnx keeps it in files."""
    model = test.model or onnx.load(Path(test.model_dir) / "model.onnx")
    if len(model.graph.node) != 1 or model.graph.node[0].op_type not in OPS:
        return None
    if test.data_sets:
        data = test.data_sets[0][0]
    else:
        files = [Path(test.model_dir) / "test_data_set_0" / f"input_{i}.pb" for i in range(len(model.graph.input))]
        data = [numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes())) for file in files]
    return Case(test.name, model, dict(zip([value.name for value in model.graph.input], data, strict=True)))


def with_constants(model: onnx.ModelProto, values: dict[str, Array], kept: str) -> onnx.ModelProto:
    """The test's model with all inputs but one as initializers."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.ir_version = max(copy.ir_version, 4)
    copy.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in values.items() if name != kept)
    inputs = [value for value in model.graph.input if value.name == kept]
    del copy.graph.input[:]
    copy.graph.input.extend(inputs)
    return copy


def compressed_or_refused(model: onnx.ModelProto, options: dict[str, object]) -> onnx_lwdf.Result | None:
    try:
        return onnx_lwdf.compress(model, **options)
    except ModelError as error:
        reason = str(error).removeprefix("nothing to compress: ")
    assert reason in REASONS
    return None


@pytest.mark.parametrize("activations", [8, "float"])
@pytest.mark.parametrize(("op", "compressed"), [("Conv", 6), ("ConvTranspose", 9), ("Gemm", 8), ("MatMul", 1)])
def test_node(cases, op, compressed, activations):
    done = set()
    for case in cases:
        if case.model.graph.node[0].op_type != op:
            continue
        values = case.values
        for kept in values:
            model = with_constants(case.model, values, kept)
            low, high = float(values[kept].min(initial=0)), float(values[kept].max(initial=1e-3))
            options = {"activation_bits": activations, "input_range": (low, high), "samples": 32, "jobs": 1}
            result = compressed_or_refused(model, options)
            if result is None:
                continue
            done.add(case.name)
            feed, extremes = {kept: values[kept]}, {n: np.full_like(v, np.abs(v).max()) for n, v in values.items()}
            largest = np.abs(answers(with_constants(case.model, extremes, kept), {kept: extremes[kept]})[0]).max()
            error = np.abs(answers(model, feed)[0] - answers(result.model, feed)[0]).max()
            assert error <= (CODE + (INPUT + OUTPUT if activations == 8 else 0)) * largest, case.name
    assert len(done) == (0 if op == "ConvTranspose" and activations == 8 else compressed)


def test_batch_normalization_behind_a_layer(cases):
    done = 0
    for case in cases:
        node = case.model.graph.node[0]
        if node.op_type != "BatchNormalization" or any(item.name == "training_mode" for item in node.attribute):
            continue
        model = with_constants(case.model, case.values, "x")
        channels = case.values["x"].shape[1]
        weight = np.random.default_rng(0).normal(size=(channels, channels, 1, 1)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
        model.graph.node[0].input[0] = "between"
        model.graph.node.insert(0, onnx.helper.make_node("Conv", ["x", "w"], ["between"]))
        result = onnx_lwdf.compress(model, activation_bits="float", samples=32, jobs=1)
        assert [node.op_type for node in result.model.graph.node].count("BatchNormalization") == 0
        exact, answer = (answers(one, {"x": case.values["x"]})[0] for one in (model, result.model))
        assert np.abs(exact - answer).max() <= CODE * channels * np.abs(exact).max(), case.name
        done += 1
    assert done == 2


LIGHT = Path(loader.DATA_DIR) / "light"  # structures of known networks, with made-up weights


@pytest.mark.parametrize("name", ["densenet121", "inception_v1", "shufflenet", "squeezenet"])
def test_structure(name):
    report = onnx_lwdf.inspect(LIGHT / f"light_{name}.onnx")
    nodes = onnx.load(LIGHT / f"light_{name}.onnx").graph.node
    assert len(report.compressed) == len(report.layers) == sum(node.op_type in ("Conv", "Gemm") for node in nodes)
