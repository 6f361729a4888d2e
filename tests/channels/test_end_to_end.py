"""Structured pruning of real networks: accuracy, size, and together with integers."""

from __future__ import annotations

import onnx
import pytest

import onnx_lwdf
from tests.test_end_to_end import MODELS, accuracy


@pytest.mark.parametrize(("name", "points"), [("fmnist-mbv2-bn", 0.5), ("fmnist-resnet-bn", 1.5)])
def test_a_fifth_of_the_channels_of_real_networks(name, points):
    source = onnx.load(MODELS / f"{name}.onnx")
    alone = onnx_lwdf.compress(source, channels=0.2)
    onnx.checker.check_model(alone.model, full_check=True)
    assert alone.model.ByteSize() < 0.8 * source.ByteSize()
    assert accuracy(alone.model) > accuracy(source) - points
    assert {node.op_type for node in alone.model.graph.node} <= {node.op_type for node in source.graph.node}
    assert {(layer.weight_bits, layer.activation_bits) for layer in alone.report.layers} == {(None, None)}


def test_integers_on_what_remains():
    source = onnx.load(MODELS / "fmnist-mbv2-bn.onnx")
    both = onnx_lwdf.compress(source, channels=0.2, bits=8)
    assert both.model.ByteSize() < 0.9 * onnx_lwdf.compress(source, bits=8).model.ByteSize()
    assert accuracy(both.model) > accuracy(source) - 1
