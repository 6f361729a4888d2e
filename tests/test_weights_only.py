"""Models of which nothing can be run: weights alone are rounded, and nothing is claimed. onnx.reference is the oracle."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import onnx_lwdf
from onnx_lwdf.errors import OptionError
from tests.nets import answers, residual, samples, sqnr_db, with_weights

HEAD = '<ir_version: 8, opset_import: ["" : 17, "theirs" : 1]> net (float[N,3,8,8] x) => (float[N,4] y)'
BODY = """
    a = Conv <pads = [1,1,1,1]> (x, w)
    b = BatchNormalization (a, g, beta, m, v)
    c = {middle} (b)
    d = ConvTranspose <strides = [2,2]> (c, u)
    e = GlobalAveragePool (d)
    f = Flatten (e)
    y = MatMul (f, k)
"""
RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.normal(0, 0.3, (6, 3, 3, 3)),
    "u": RNG.normal(0, 0.3, (6, 5, 2, 2)),
    "k": RNG.normal(0, 0.3, (5, 4)),
    "g": RNG.uniform(0.5, 1.5, 6),
    "beta": RNG.normal(0, 1, 6),
    "m": RNG.normal(0, 1, 6),
    "v": RNG.uniform(0.5, 2, 6),
}


class Magic(OpRun):
    """What nobody else knows."""

    op_domain = "theirs"

    def _run(self, x):
        return (np.sin(x),)


def foreign():
    return with_weights(f"{HEAD} {{ {BODY.format(middle='theirs.Magic')} }}", WEIGHTS)


def test_a_model_with_a_foreign_operator_is_compressed_around_it():
    source = foreign()
    result = onnx_lwdf.compress(source)
    layers = result.report.layers
    assert [layer.op for layer in layers] == ["Conv", "ConvTranspose", "MatMul"]
    assert {(layer.statistics, layer.bits, layer.sqnr_db) for layer in layers} == {("weights-only", "w8", None)}
    feeds = samples(source)
    (exact,), (answer,) = (ReferenceEvaluator(m, new_ops=[Magic]).run(None, feeds) for m in (source, result.model))
    assert sqnr_db(exact, answer) > 35  # three layers of 8 bits, 40 dB and more each


def namesakes(op):
    """An operator of that name that does something else."""
    return type(op, (OpRun,), {"op_domain": "theirs", "_run": lambda self, x, *_, **__: (np.sin(x),)})


@pytest.mark.parametrize(
    ("op", "where"),
    [
        ("Mul", "c = theirs.Mul (b, g2)"),
        ("Add", "c = theirs.Add (b, g2)"),
        ("BatchNormalization", "c = theirs.BatchNormalization (b, g, beta, m, v)"),
        ("Relu", "c = theirs.Relu (b)"),
        ("Pad", "p = theirs.Pad (b, none) h = Conv (p, w2) c = Relu (h)"),
        ("Identity", "i = theirs.Identity (w2) h = Conv (b, i) c = Relu (h)"),
        ("Conv", "h = theirs.Conv (b, w2) c = Relu (h)"),
    ],
)
def test_an_operator_of_another_domain_is_not_what_its_name_says(op, where):
    text = f"{HEAD} {{ {BODY.replace('(f, k)', '(f, last)').replace('c = {middle} (b)', where)} }}"
    tensors = {"last": WEIGHTS["k"], "w2": RNG.normal(0, 0.3, (6, 6, 1, 1)), "g2": RNG.uniform(1, 2, (6, 1, 1))}
    source = with_weights(text, WEIGHTS | tensors | {"none": np.zeros(8, np.int64)})
    result = onnx_lwdf.compress(source)
    assert [node.op_type for node in result.model.graph.node if node.domain == "theirs"] == [op]
    feeds = samples(source)
    new = [namesakes(op)]
    (exact,), (answer,) = (ReferenceEvaluator(m, new_ops=new).run(None, feeds) for m in (source, result.model))
    assert sqnr_db(exact, answer) > 30  # up to four layers of 8 bits, 40 dB and more each


def test_what_was_not_verified_is_said():
    report = onnx_lwdf.compress(foreign()).report
    assert report.outputs == {}
    assert any("theirs" in text and "nothing was verified" in text for text in report.warnings)
    with pytest.raises(onnx_lwdf.api.Gate, match="nothing could be verified"):
        onnx_lwdf.compress(foreign(), fail_under=-10)


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"channels": 0.2}, {"max_size": 0.3}, {"format": "qdq"}])
def test_what_needs_a_run_is_refused_with_the_reason(options):
    with pytest.raises(OptionError, match=r"onnxruntime cannot load the model: .*theirs.*; "):
        onnx_lwdf.compress(foreign(), **options)


def test_the_dry_run_says_the_same():
    planned, done = onnx_lwdf.inspect(foreign()), onnx_lwdf.compress(foreign()).report
    assert [(layer.name, layer.bits, layer.bytes_after) for layer in planned.layers] == [
        (layer.name, layer.bits, layer.bytes_after) for layer in done.layers
    ]
    assert planned.warnings == done.warnings


def test_the_file_is_named_by_what_was_done(tmp_path):
    onnx.save(foreign(), tmp_path / "m.onnx")
    command = [sys.executable, "-m", "onnx_lwdf", "m.onnx", "-q"]
    for code in (0, 1):  # the second time it is there
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.w8.onnx"]
    assert "error: m.w8.onnx: exists; give --force" in done.stderr


def test_a_model_with_an_input_of_words():
    text = """
    <ir_version: 8, opset_import: ["" : 17]> net (float[N,3,8,8] x, string[N] label) => (float[N,6,6,6] y, string[N] same)
    { y = Conv (x, w)  same = Identity (label) }
    """
    source = with_weights(text, {"w": WEIGHTS["w"]})
    result = onnx_lwdf.compress(source)
    assert [layer.statistics for layer in result.report.layers] == ["weights-only"]
    assert any("'label' is string" in text for text in result.report.warnings)
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((2, 3, 8, 8)).astype(np.float32), "label": np.array(["a", "b"], object)}
    (exact, _), (answer, same) = answers(source, feeds), answers(result.model, feeds)
    assert sqnr_db(exact, answer) > 40
    assert list(same) == ["a", "b"]


def test_a_model_that_can_be_run_is_verified_without_inputs_for_its_layers():
    source = residual()
    report = onnx_lwdf.compress(
        source, activations_from="none", activation_bits="float", input_range=(-4.0, 4.0)
    ).report
    assert {layer.statistics for layer in report.layers} == {"weights-only"}
    assert report.output_db > 30
    assert not report.warnings
    with pytest.raises(OptionError, match="--activation-bits float"):
        onnx_lwdf.compress(source, activations_from="none")


def test_local_functions_are_not_foreign():
    known = '<domain: "theirs", opset_import: ["" : 17]> Magic (p) => (q) { q = Sin (p) }'
    text = f"{HEAD} {{ {BODY.format(middle='theirs.Magic')} }} {known}"
    report = onnx_lwdf.compress(with_weights(text, WEIGHTS), samples=16, input_range=(-4.0, 4.0)).report
    assert "weights-only" not in {layer.statistics for layer in report.layers}
    assert report.outputs
