"""Do no harm: a layer that is destroyed stays float, a file that is worse than none is not written."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest

import onnx_lwdf
from onnx_lwdf.errors import ModelError
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import find_layers, sources
from onnx_lwdf.verify import Fidelity
from tests.nets import FAST, answers, residual, samples, sqnr_db, with_weights

ENGINE = sys.modules["onnx_lwdf.compress"]  # the function of this name hides the module


@pytest.fixture
def damage(monkeypatch):
    """Store the weights of the named layers with the wrong sign, as a defect of an emitter would."""
    stored = ENGINE._stored

    def install(*names):
        def damaged(graph, answer, codes):
            item = stored(graph, answer, codes)
            if answer.layer.name not in names:
                return item
            return replace(item, rounded=replace(item.rounded, codes=-item.rounded.codes))

        monkeypatch.setattr(ENGINE, "_stored", damaged)

    return install


def test_sources_end_at_the_next_layer():
    graph = Graph(residual())
    layers, _ = find_layers(graph)
    conv_a, depthwise, project, strided, classifier = (layer.name for layer in layers)
    found = sources(graph, layers)
    assert {layer.name: found.get(layer.input, set()) for layer in layers} == {
        conv_a: set(),
        depthwise: {conv_a},
        project: {depthwise},
        strided: {conv_a, project},
        classifier: {strided},
    }
    assert found["y"] == {classifier}


def test_harmed_are_those_that_began_it():
    decibels = {"a": 30.0, "b": -2.0, "c": -9.0, "dead": -math.inf, "broken": math.nan}
    reads = {"a": set(), "b": {"a"}, "c": {"a", "b"}, "dead": {"a"}, "broken": {"a", "dead"}}
    assert Fidelity({}, decibels).harmed(reads, 0.0) == ["b", "broken"]
    assert Fidelity({}, decibels).harmed(reads, -5.0) == ["c", "broken"]


def test_an_output_is_lost_where_its_layer_is():
    fidelity = Fidelity({"y": -3.0, "z": -35.0, "u": 9.0, "v": -1.0}, {"a": -3.0, "b": 7.0})
    assert fidelity.lost({"y": {"a"}, "z": {"b"}, "u": {"a"}, "v": set()}) == {"y": -3.0, "v": -1.0}


@pytest.mark.parametrize("name", ["conv_3", "gemm_13"])
def test_a_destroyed_layer_stays_float_and_is_named(damage, name):
    damage(name)
    result = onnx_lwdf.compress(residual(), **FAST)
    (kept,) = result.report.kept
    assert kept.name == name
    assert "stays float: at its output -" in kept.reason
    assert len(result.report.compressed) == 4
    feeds = samples(residual())
    assert sqnr_db(answers(residual(), feeds)[0], answers(result.model, feeds)[0]) > 20


def test_a_file_worse_than_none_is_not_written(monkeypatch, tmp_path):
    verify = ENGINE.verify

    def worse(*arguments):
        return replace(verify(*arguments), outputs={"y": -3.0}, layers=dict.fromkeys(arguments[3], -3.0))

    monkeypatch.setattr(ENGINE, "verify", worse)
    onnx.save(residual(), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"'y' would have more error than signal .* \(-3.0 dB\); nothing was written"):
        onnx_lwdf.compress(tmp_path / "m.onnx", tmp_path / "out.onnx", **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    onnx_lwdf.compress(tmp_path / "m.onnx", tmp_path / "out.onnx", fail_under=-10, **FAST)
    assert (tmp_path / "out.onnx").exists()


def test_a_weak_output_of_sound_layers_is_written_and_warned_of(monkeypatch):
    verify = ENGINE.verify
    monkeypatch.setattr(ENGINE, "verify", lambda *given: replace(verify(*given), outputs={"y": -3.0}))
    warnings = onnx_lwdf.compress(residual(), **FAST).report.warnings
    assert [text for text in warnings if "'y' has more error than signal" in text and "(-3.0 dB)" in text]


def test_outputs_without_an_error_to_measure():
    """An index, and a list of as many rows as were found."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,8,8] x) => (float[N,4] y, int64[N,1] best, float[M] above) {
        a = Conv (x, w)
        p = GlobalAveragePool (a)
        y = Flatten (p)
        best = ArgMax <axis = 1> (y)
        mask = Greater (y, zero)
        flat = Reshape (mask, all)
        above = Compress (y, flat)
    }
    """
    tensors = {"w": np.random.default_rng(0).normal(size=(4, 3, 1, 1)), "zero": np.array(0.0), "all": np.array([-1])}
    report = onnx_lwdf.compress(with_weights(text, tensors), samples=16, jobs=1).report
    assert "y" in report.outputs
    assert "best" not in report.outputs


def test_sequences_of_maps_of_different_sizes():
    """As feature pyramids are: no array holds them."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]> net (float[N,3,8,8] x) => (float[N,4,4,4] y, seq(float) levels) {
        a = Conv (x, w)
        y = MaxPool <kernel_shape = [2,2], strides = [2,2]> (a)
        levels = SequenceConstruct (a, y)
    }
    """
    model = with_weights(text, {"w": np.random.default_rng(0).normal(size=(4, 3, 1, 1))})
    result = onnx_lwdf.compress(model, **FAST)
    assert list(result.report.outputs) == ["y"]
    feeds = samples(model)
    (_, exact), (_, levels) = answers(model, feeds), answers(result.model, feeds)
    assert [level.shape for level in levels] == [(4, 4, 8, 8), (4, 4, 4, 4)]
    assert all(sqnr_db(a, b) > 30 for a, b in zip(exact, levels, strict=True))


ENDLESS = """
<ir_version: 8, opset_import: ["" : 17]> net (float[N,3,8,8] x) => (float[N,6] y) {
    a = Conv (x, w)
    m = Add (a, never_a)
    r = Relu (m)
    c = Conv (r, v)
    p = GlobalAveragePool (c)
    f = Flatten (p)
    y = Add (f, never_y)
}
"""


@pytest.mark.parametrize("activations", [8, 7, "float"])
@pytest.mark.parametrize("masked", [(), ("never_a",), ("never_y",), ("never_a", "never_y")])
@pytest.mark.filterwarnings("error")
def test_a_class_or_a_channel_that_is_masked_by_infinity(masked, activations):
    rng = np.random.default_rng(0)
    tensors = {"w": rng.normal(0, 0.3, (6, 3, 3, 3)), "v": rng.normal(0, 0.3, (6, 6, 1, 1))}
    for name, shape in (("never_a", (6, 1, 1)), ("never_y", (6,))):
        tensors[name] = np.zeros(shape)
        tensors[name][2] = -np.inf if name in masked else 0
    model = with_weights(ENDLESS, tensors)
    result = onnx_lwdf.compress(model, activation_bits=activations, **FAST)
    assert result.report.output_db > 25
    feeds = samples(model)
    (exact,), (answer,) = answers(model, feeds), answers(result.model, feeds)
    assert np.isneginf(exact).any() == ("never_y" in masked)
    np.testing.assert_array_equal(np.isneginf(answer), np.isneginf(exact))
    seen = np.isfinite(exact)
    assert sqnr_db(exact[seen], answer[seen]) > 25


def test_boxes_and_scores_are_joined_in_float():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,16,16] x) => (float[N,M,5] y) {
        a = Conv (x, w)
        r = Relu (a)
        boxes = Conv (r, wb, b)
        scores = Conv (r, ws)
        all = Concat <axis = 1> (boxes, scores)
        t = Transpose <perm = [0,2,3,1]> (all)
        y = Reshape (t, rows)
    }
    """
    rng = np.random.default_rng(0)
    tensors = {"w": rng.normal(0, 0.4, (6, 3, 3, 3)), "wb": rng.normal(0, 100, (4, 6, 1, 1)), "b": np.full(4, 300.0)}
    tensors |= {"ws": rng.normal(0, 0.1, (1, 6, 1, 1)), "rows": np.array([0, -1, 5])}
    source = with_weights(text, tensors)
    result = onnx_lwdf.compress(source, samples=32, jobs=1, input_range=(-4.0, 4.0))
    (tail,) = result.report.kept
    assert (tail.name, tail.op) == ("concat_4", "Concat")
    assert "stays float" in tail.reason
    feeds = samples(source)
    exact, answer = answers(source, feeds)[0], answers(result.model, feeds)[0]
    assert sqnr_db(exact[..., 4:], answer[..., 4:]) > 25


def test_an_output_behind_a_layer_of_zeros_is_not_lost():
    fidelity = Fidelity({"y": -math.inf}, {"dead": -math.inf, "broken": -3.0})
    assert fidelity.lost({"y": {"dead"}}) == {}
    assert fidelity.lost({"y": {"dead", "broken"}}) == {"y": -math.inf}
