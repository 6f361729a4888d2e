"""The rebuilt model is the written one, with its weights as tensors again."""

from __future__ import annotations

import numpy as np
import pytest

import onnx_lwdf
from onnx_lwdf import mapped, runtime
from onnx_lwdf.emit.rebuilt import rebuilt
from onnx_lwdf.graph import Graph
from onnx_lwdf.mapped import Scratch, has_mapped
from tests.nets import FAST, answers, samples
from tests.test_mapped import net

pytestmark = pytest.mark.skipif(
    not runtime.maps(), reason="onnxruntime 1.19 does not run mapped weights; the command says so"
)


@pytest.mark.parametrize("activations", [8, "float"])
@pytest.mark.parametrize("form", ["packed", "sparse"])
def test_the_same_answers_without_the_chains(tmp_path, monkeypatch, form, activations):
    options = {"bits": 4, "activation_bits": activations, "format": form, "sparsity": 0.6 if form == "sparse" else 0.0}
    model = onnx_lwdf.compress(net(), **FAST, **options, keep_first_last=False, fail_under=-20).model
    assert rebuilt(Graph(model)) is model
    monkeypatch.setattr(mapped, "MAPPED_BYTES", 16)
    other = rebuilt(Graph(model, Scratch(tmp_path)))
    assert has_mapped(other)
    left = {node.op_type for node in other.graph.node}
    assert left.isdisjoint({"BitwiseAnd", "BitShift", "ScatterElements", "CumSum"})
    feeds = samples(net(), 8)
    plain = answers(model, feeds)[0]
    np.testing.assert_allclose(answers(other, feeds)[0], plain, atol=0.02 * np.abs(plain).max())
