"""Killed at any moment, a run leaves the old file or the new one, and nothing that the next run does not remove."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_lwdf.model_io import load, write
from onnx_lwdf.staging import MARK, locked, staging
from tests.nets import residual

pytestmark = pytest.mark.skipif(os.name == "nt", reason="locks end with their process on POSIX systems")

KILLS = 100

# Single-threaded, so that it may fork: children write two models in turn until they are killed, the parent looks at the file.
KILLER = """
import hashlib, os, random, signal, sys, time
from pathlib import Path
from onnx_lwdf.model_io import load, write

folder, external, kills = Path(sys.argv[1]), sys.argv[2] == "external", int(sys.argv[3])
models, target = [load(folder / name) for name in ("a.onnx", "b.onnx")], folder / "out.onnx"

def content(model):
    return hashlib.sha256(b"".join(tensor.raw_data for tensor in model.graph.initializer)).hexdigest()

expected, wait, caught = {content(model) for model in models}, random.Random(0), 0
write(models[0], target, external)
for _ in range(kills):
    child = os.fork()
    if not child:
        while True:
            for model in models:
                write(model, target, external)
    time.sleep(wait.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    caught += any(folder.glob(".out.onnx*"))
    assert content(load(target)) in expected
write(models[0], target, external)
print(caught)
"""


def large(seed: int) -> onnx.ModelProto:
    """A model of a megabyte, so that writing it takes a while."""
    model = residual(seed)
    value = np.random.default_rng(seed).normal(size=(512, 512)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(value, "large"))
    return model


@pytest.mark.parametrize("form", ["whole", "external"])
def test_random_kills_of_a_write(tmp_path, form):
    for name, seed in (("a.onnx", 0), ("b.onnx", 1)):
        onnx.save(large(seed), tmp_path / name)
    command = [sys.executable, "-c", KILLER, str(tmp_path), form, str(KILLS // 2)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > KILLS / 20  # kills in the middle of a write
    left = {path.name for path in tmp_path.iterdir()} - {"a.onnx", "b.onnx", "out.onnx"}
    assert len(left) == (form == "external")  # its weights, those of the last model only


def test_kills_of_the_command(tmp_path):
    onnx.save(residual(), tmp_path / "m.onnx")
    (tmp_path / "out.onnx").write_bytes(b"old")
    command = [sys.executable, "-m", "onnx_lwdf", "m.onnx", "-o", "out.onnx", "--force", "--report", "r.json", "-q"]
    began = time.monotonic()
    subprocess.run([*command, "--dry-run"], cwd=tmp_path, check=True, capture_output=True)
    whole = 2 * (time.monotonic() - began)
    for moment in np.random.default_rng(0).uniform(0.3, 1, 4) * whole:
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert (tmp_path / "out.onnx").read_bytes() == b"old" or load(tmp_path / "out.onnx")
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "out.onnx", "r.json"]


def test_two_runs_on_one_output(tmp_path):
    """The last one wins, whole."""
    for name, seed in (("a.onnx", 0), ("b.onnx", 1)):
        onnx.save(large(seed), tmp_path / name)
    writer = (
        "import sys; from pathlib import Path; from onnx_lwdf.model_io import load, write\n"
        "model = load(Path(sys.argv[1]))\n"
        "for _ in range(40): write(model, Path('out.onnx'), external=True)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    runs = [
        subprocess.Popen([sys.executable, "-c", writer, name], cwd=tmp_path, env=environment)
        for name in ("a.onnx", "b.onnx")
    ]
    assert [run.wait(120) for run in runs] == [0, 0]
    written = {tensor.name: tensor.raw_data for tensor in load(tmp_path / "out.onnx").graph.initializer}
    assert written in [{t.name: t.raw_data for t in large(seed).graph.initializer} for seed in (0, 1)]
    assert len(list(tmp_path.iterdir())) == 4  # both sources, the model, its weights


def test_only_what_nobody_holds_is_removed(tmp_path):
    target = tmp_path / "out.onnx"
    dead = tmp_path / f".out.onnx{MARK}dead"
    dead.mkdir()
    (tmp_path / ".out.onnx.theirs").mkdir()
    with staging(target) as mine:
        assert not dead.exists()
        with staging(target) as other:
            assert mine.exists()
            assert mine != other
        with locked(mine) as free:
            assert not free
    assert [path.name for path in tmp_path.iterdir()] == [".out.onnx.theirs"]


@pytest.mark.parametrize("external", [False, True])
def test_disk_full_in_the_middle(tmp_path, external):
    """The system lets no file grow beyond a hundred kilobytes."""
    onnx.save(large(0), tmp_path / "a.onnx")
    write(residual(), tmp_path / "out.onnx", external)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code = (
        "import resource, sys; from pathlib import Path; from onnx_lwdf.model_io import load, write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"write(load(Path('a.onnx')), Path('out.onnx'), {external})"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "ModelError: out.onnx: cannot be written: File too large" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_external_weights_that_are_too_small_for_a_file_leave_none(tmp_path):
    model = residual(width=2)
    write(model, tmp_path / "out.onnx", True)
    (left,) = list(tmp_path.iterdir())
    assert onnx.load(left) == model
