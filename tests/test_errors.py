"""Every failure: one clear line, the right exit code, no traceback, nothing half-written, an old output untouched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnx_lwdf
from tests.nets import residual, with_weights


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "onnx_lwdf", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def assert_refused(folder: Path, code: int, what: str, *words: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    done = run(folder, *words)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert what in lines[0]
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.fixture
def folder(tmp_path):
    onnx.save(residual(), tmp_path / "m.onnx")
    return tmp_path


def test_files_that_are_no_models(folder):
    (folder / "text.onnx").write_text("hello\n" * 100)
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "cut.onnx").write_bytes((folder / "m.onnx").read_bytes()[:-300])
    assert_refused(folder, 1, "no such file", "missing.onnx")
    assert_refused(folder, 1, "not an ONNX file", "text.onnx")
    assert_refused(folder, 1, "not an ONNX file", "empty.onnx")
    assert_refused(folder, 1, "cut.onnx", "cut.onnx")
    assert_refused(folder, 1, "is a folder", ".", "-o", "out.onnx")


def test_models_that_cannot_be_compressed(folder):
    text = '<ir_version: 8, opset_import: ["" : 17]> net (float[2] x) => (float[2] y) { y = Relu (x) }'
    onnx.save(onnx.parser.parse_model(text), folder / "relu.onnx")
    assert_refused(folder, 1, "nothing to compress", "relu.onnx")
    for name, value, words in (("w2", np.nan, "NaN"), ("w2", np.inf, "infinite"), ("v0", -1.0, "negative variance")):
        model = residual()
        tensor = next(t for t in model.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array.flat[0] = value
        tensor.CopyFrom(numpy_helper.from_array(array, name))
        onnx.save(model, folder / "broken.onnx")
        assert_refused(folder, 1, words, "broken.onnx")


def test_outputs_that_may_not_be_written(folder):
    onnx.save(residual(1), folder / "there.onnx")
    assert_refused(folder, 1, "is the input itself", "m.onnx", "-o", "m.onnx", "--force")
    assert_refused(folder, 1, "--force", "m.onnx", "-o", "there.onnx")
    assert_refused(folder, 1, "no such folder", "m.onnx", "-o", "nowhere/out.onnx")
    (folder / "folder").mkdir()
    assert_refused(folder, 1, "is a folder", "m.onnx", "-o", "folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_not_replaced(folder):
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "pipe.json")
    for words in (("-o", "pipe"), ("-o", "out.onnx", "--report", "pipe.json")):
        assert_refused(folder, 1, words[-1], "m.onnx", *words, "--force")
        assert (folder / words[-1]).is_fifo()


@pytest.mark.parametrize("weights", ["w.bin", "w.json"])
def test_files_that_the_input_needs_are_not_replaced(folder, weights):
    onnx.save(residual(), folder / "e.onnx", save_as_external_data=True, location=weights, size_threshold=0)
    (folder / "e.json").write_bytes((folder / "e.onnx").read_bytes())
    (folder / "folder.json").mkdir()
    assert_refused(folder, 1, "holds weights of the input", "e.onnx", "-o", weights, "--force")
    assert_refused(folder, 1, "is the input itself", "e.json", "-o", "out.onnx", "--report", "e.json")
    assert_refused(folder, 1, "is no file", "e.onnx", "-o", "out.onnx", "--report", "folder.json")
    assert_refused(folder, 2, "named twice", "e.onnx", "-o", "o.json", "--report", "o.json")
    assert_refused(folder, 2, "named twice", "e.onnx", "-o", "out.onnx", "--report", "a.md", "--report", "./a.md")
    if weights.endswith(".json"):
        assert_refused(folder, 1, "holds weights of the input", "e.onnx", "-o", "out.onnx", "--report", weights)


def test_our_own_output_is_refused(folder):
    assert run(folder, "m.onnx", "-o", "out.onnx").returncode == 0
    assert_refused(folder, 1, "already compressed", "out.onnx")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--bits", "9"), "2 to 8"),
        (("--bits", "x"), "--bits"),
        (("--activation-bits", "1"), "2"),
        (("--bits-for", "nothing=4"), "matches no layer"),
        (("--bits-for", "Conv=11"), "11"),
        (("-x", "nothing*"), "matches no layer"),
        (("--format", "folded"), "float activations"),
        (("--input-range", "3,1"), "below"),
        (("--input-shape", "q:1,3,8,8"), "no input"),
        (("--activations-from", "nowhere"), "neither a source"),
        (("--report", "r.txt"), ".json"),
        (("--no-such-option",), "--no-such-option"),
    ],
)
def test_usage(folder, words, what):
    assert_refused(folder, 2, what, "m.onnx", "-o", "out.onnx", *words)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk(folder, monkeypatch):
    """Every write fails for want of space: an old output stays, no stray file is left."""
    (folder / "out.onnx").write_bytes(b"old")
    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.suffix == ".onnx":
            with Path("/dev/full").open("wb", buffering=0) as device:
                return device.write(data) or 0
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(onnx_lwdf.ModelError, match="No space left"):
        onnx_lwdf.compress(folder / "m.onnx", folder / "out.onnx", force=True, samples=16)
    monkeypatch.undo()
    assert (folder / "out.onnx").read_bytes() == b"old"
    assert sorted(path.name for path in folder.iterdir()) == ["m.onnx", "out.onnx"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_unwritable_folder(folder):
    locked = folder / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    assert_refused(folder, 1, "not writable", "m.onnx", "-o", "locked/out.onnx")


def test_an_operator_that_onnxruntime_lacks_is_said(folder):
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,8,8] x) => (float[N,3,8,8] y) { a = Conv (x, w)  y = MaxRoiPool <pooled_shape = [8, 8]> (a, rois) }
    """
    model = with_weights(text, {"w": np.ones((3, 3, 1, 1)), "rois": np.ones((1, 4))})  # a region has five numbers
    onnx.save(model, folder / "bad.onnx")
    assert_refused(folder, 1, "onnxruntime cannot", "bad.onnx")
