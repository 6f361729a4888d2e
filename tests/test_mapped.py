"""Weights that stay in files: the path of models above 2 GiB, taken by a small one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnx_lwdf
from onnx_lwdf import layers, mapped, model_io, runtime
from onnx_lwdf.errors import ModelError
from onnx_lwdf.graph import Graph
from onnx_lwdf.mapped import Scratch
from tests.nets import FAST, answers, samples, trained, with_weights

pytestmark = pytest.mark.skipif(
    not runtime.maps(), reason="onnxruntime 1.19 does not run mapped weights; the command says so"
)

WIDE = 24  # channels, so that most weights take more than a kilobyte
NET = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,12,12] x) => (float[N,5] y) {
    a0 = Conv <pads = [1,1,1,1]> (x, w0)
    a1 = BatchNormalization (a0, g, b, m0, v0)
    a2 = Relu (a1)
    c0 = Conv <pads = [1,1,1,1]> (a2, w1)
    c1 = BatchNormalization (c0, g, b, m1, v1)
    c2 = Relu (c1)
    s = Add (a2, c2)
    p = GlobalAveragePool (s)
    f = Flatten (p)
    h = Gemm (f, w2, b)
    r = Relu (h)
    y = Gemm <transB = 1> (r, w3, b3)
}
"""
OPTIONS = [{}, {"activation_bits": "float"}, {"bits": 8, "sparsity": 0.5}]
EACH_ON_ITS_OWN = [  # layers that an ordinary file packs together
    {"bits": 4, "activation_bits": "float", "format": "packed", "keep_first_last": False},
    {"sparsity": 0.5},
]


def net() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    shapes = {"w0": (WIDE, 3, 3, 3), "w1": (WIDE, WIDE, 3, 3), "w2": (WIDE, WIDE), "w3": (5, WIDE), "b3": (5,)}
    tensors = {name: rng.normal(0, 0.2, shape) for name, shape in shapes.items()}
    tensors |= {"g": rng.uniform(0.5, 1.5, WIDE), "b": rng.normal(0.3, 0.3, WIDE)}
    tensors |= {f"{word}{i}": rng.uniform(0.5, 1.5, WIDE) for word in "mv" for i in range(2)}
    return trained(with_weights(NET, tensors))


@pytest.fixture
def path(tmp_path):
    onnx.save(net(), tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=1024)
    return tmp_path / "m.onnx"


def lower(monkeypatch, path):
    """The limits so low that this model is above them."""
    monkeypatch.setattr(model_io, "PROTOBUF_LIMIT_BYTES", path.stat().st_size + 1)
    monkeypatch.setattr(mapped, "MAPPED_BYTES", 1024)


@pytest.fixture
def lowered(monkeypatch, path):
    lower(monkeypatch, path)
    return path


def content(path: Path) -> tuple[bytes, list[bytes]]:
    return path.read_bytes(), [file.read_bytes() for file in sorted(path.parent.glob(f"{path.name}.*.data"))]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_file_as_in_memory(path, tmp_path, monkeypatch, options):
    """Byte for byte, where onnxruntime computes in the same way: the mapped path leaves some of its optimizations out."""
    monkeypatch.setattr(runtime, "has_mapped", lambda model: True)
    target = tmp_path / "out.onnx"
    whole = onnx_lwdf.compress(path, target, **FAST, **options)
    expected = content(target)
    lower(monkeypatch, path)
    done = onnx_lwdf.compress(path, target, **FAST, **options, force=True)
    assert model_io.read(path).mapped
    assert content(target) == expected
    assert done.report.to_dict() == whole.report.to_dict()
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "m.bin", *(f.name for f in tmp_path.glob("out.*"))}


@pytest.mark.parametrize("options", [*OPTIONS[:2], *EACH_ON_ITS_OWN], ids=str)
def test_the_same_answers_in_blocks_of_channels(path, tmp_path, monkeypatch, options):
    """As the ordinary command gives, but for the last digits of floats."""
    whole, feeds = onnx_lwdf.compress(net(), **FAST, **options), samples(net(), 8)
    plain = answers(whole.model, feeds)[0]
    lower(monkeypatch, path)
    monkeypatch.setattr(layers, "BLOCK_VALUES", 7 * 9 * WIDE)
    before = content(path), (tmp_path / "m.bin").read_bytes()
    result = onnx_lwdf.compress(path, tmp_path / "out.onnx", **FAST, **options)
    assert (content(path), (tmp_path / "m.bin").read_bytes()) == before
    largest = float(np.abs(plain).max())
    np.testing.assert_allclose(answers(onnx.load(tmp_path / "out.onnx"), feeds)[0], plain, atol=0.02 * largest)
    assert result.report.output_db == pytest.approx(whole.report.output_db, abs=0.5)


def test_an_older_opset_is_raised(lowered, tmp_path):
    """onnx's converter may forget where values are."""
    model = onnx.load(lowered, load_external_data=False)
    model.opset_import[0].version = 12
    lowered.write_bytes(model.SerializeToString())
    report = onnx_lwdf.compress(lowered, tmp_path / "out.onnx", **FAST).report
    assert "opset raised from 12 to 13" in report.warnings[0]
    assert report.output_db > 10  # as in memory


def test_dry_run(lowered, tmp_path):
    before = {file.name for file in tmp_path.iterdir()}
    assert len(onnx_lwdf.inspect(lowered).compressed) == 4
    assert {file.name for file in tmp_path.iterdir()} == before


def test_what_cannot_be_done_is_one_line(lowered, tmp_path):
    with pytest.raises(ModelError, match="is too large to be compressed in memory; give an output"):
        onnx_lwdf.compress(lowered, **FAST)
    with pytest.raises(ModelError, match="is too large for bits to be chosen by size; give --bits"):
        onnx_lwdf.compress(lowered, tmp_path / "out.onnx", max_size=0.2, **FAST)
    with pytest.raises(ModelError, match="save it with its weights as external data, and give its path"):
        onnx_lwdf.compress(net(), tmp_path / "out.onnx", **FAST)
    (tmp_path / "m.bin").write_bytes((tmp_path / "m.bin").read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"its external data cannot be read: 'm\.bin' does not hold the"):
        onnx_lwdf.compress(lowered, tmp_path / "out.onnx", **FAST)
    model = net()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    onnx.save(model, tmp_path / "half.onnx", save_as_external_data=True, location="half.bin", size_threshold=1024)
    with pytest.raises(ModelError, match="some are not float32"):
        onnx_lwdf.compress(tmp_path / "half.onnx", tmp_path / "out.onnx", **FAST)
    assert not (tmp_path / "out.onnx").exists()


def test_a_changed_value_leaves_copies_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "MAPPED_BYTES", 16)
    graph = Graph(net(), Scratch(tmp_path))
    old = graph.constant("w2").copy()
    graph.overwrite("w2", 2 * old)
    twin = graph.twin()
    graph.overwrite("w2", 3 * old)
    np.testing.assert_array_equal(twin.constant("w2"), 2 * old)
    np.testing.assert_array_equal(graph.constant("w2"), 3 * old)
    assert mapped.has_mapped(graph.snapshot())
    feeds = samples(net())
    for model in (graph.snapshot(), twin.snapshot()):
        inlined = onnx.ModelProto()
        inlined.CopyFrom(model)
        for tensor in inlined.graph.initializer:
            tensor.CopyFrom(mapped.loaded(tensor))
        np.testing.assert_allclose(answers(model, feeds)[0], answers(inlined, feeds)[0], rtol=1e-4, atol=1e-5)


def test_kept_arrays_are_in_files(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "MAPPED_BYTES", 16)
    scratch, value = Scratch(tmp_path), np.arange(12.0).reshape(3, 4)
    kept = scratch.keep(value.T)
    np.testing.assert_array_equal(kept, value.T)
    kept += 1
    (file,) = tmp_path.iterdir()
    np.testing.assert_array_equal(np.fromfile(file).reshape(4, 3), value.T + 1)


INTERRUPTED = """
import sys
from pathlib import Path
import onnx_lwdf
from onnx_lwdf import mapped, model_io
model_io.PROTOBUF_LIMIT_BYTES, mapped.MAPPED_BYTES = int(sys.argv[1]), 1024
pause = lambda step: (print(step.stage, flush=True), sys.stdin.read())
onnx_lwdf.compress("m.onnx", "out.onnx", samples=2, input_range=(-4, 4), force=True, on_layer=pause)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals and locks are those of POSIX systems")
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL], ids=str)
def test_nothing_stays_behind_an_interrupted_run(path, tmp_path, kill):
    """A killed one leaves its folder to the next run."""
    command = [sys.executable, "-c", INTERRUPTED, str(path.stat().st_size + 1)]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"synthesize\n"
    assert len(list(tmp_path.glob(".out.onnx*"))) == 1
    process.send_signal(kill)
    process.communicate()
    if kill == signal.SIGKILL:
        subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    assert not list(tmp_path.glob(".out.onnx*"))
