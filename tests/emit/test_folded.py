"""Weight-only files: onnxruntime folds them at load, and nothing else of the model changes."""

from __future__ import annotations

import onnx

import onnx_lwdf
from tests.emit.rebuilding import kernels
from tests.nets import FAST, answers, residual, samples, sqnr_db


def test_weight_only_is_folded_at_load_and_keeps_opset_and_ir():
    source = residual()
    source.ir_version = 7
    source.opset_import[0].version = 12
    model = onnx_lwdf.compress(source, activation_bits="float", bits=6, **FAST).model
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version) == (7, 12)
    assert not {"Cast", "Mul", "DequantizeLinear"} & set(kernels(model))
    feeds = samples(source)
    assert sqnr_db(answers(source, feeds)[0], answers(model, feeds)[0]) > 20
