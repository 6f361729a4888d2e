"""Ctrl-C at any moment: exit 130, the old output or the whole new one, nothing else beside it; the second one ends at once."""

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

from onnx_lwdf.interrupt import noticed
from onnx_lwdf.model_io import load
from tests.nets import residual

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a console sends Ctrl-C to all of its processes")

MOMENTS = 20

# The command as installed, but that it says when it begins and does something at a stage.
SCRIPT = """
import ctypes, signal, sys
print("begins", flush=True)
from onnx_lwdf import api, cli
compress_with = api.compress_with

def at_stage():
    {at_stage}

def watched(*args, on_layer, **options):
    def step(progress):
        on_layer(progress)
        if progress.stage == "synthesize":
            at_stage()
    return compress_with(*args, on_layer=step, **options)

api.compress_with = watched
cli.main()
"""
WAIT = """print("there", flush=True); sys.stdin.read()"""
LOST = """ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT))()"""
STUCK = """libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)  # a second lock waits for ever, whatever signals come
    print("there", flush=True)
    libc.pthread_mutex_lock(mutex)"""


@pytest.fixture(autouse=True)
def _interruptible():
    """Even where the tests run in the background of a shell that lets its jobs ignore Ctrl-C, and processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def folder(tmp_path):
    onnx.save(residual(), tmp_path / "m.onnx")
    (tmp_path / "out.onnx").write_bytes(b"old")
    return tmp_path


def start(folder: Path, at_stage: str = "pass") -> subprocess.Popen[str]:
    """The command on its way to out.onnx, from where it begins on."""
    script = folder.parent / f"{folder.name}-bin" / "onnx-lwdf"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SCRIPT.format(at_stage=at_stage))
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [
            sys.executable,
            str(script),
            "m.onnx",
            "-o",
            "out.onnx",
            "--force",
            "-q",
            "--report",
            "r.json",
            "--samples",
            "4",
            "-j1",
        ],
        cwd=folder,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    wait_for(process, "begins")
    return process


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{word}\n"


def assert_untouched(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["m.onnx", "out.onnx"]
    assert (folder / "out.onnx").read_bytes() == b"old"


def test_in_the_middle(folder):
    process = start(folder, WAIT)
    wait_for(process, "there")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert (process.returncode, stderr) == (130, "interrupted\n")
    assert_untouched(folder)


def test_one_that_python_loses(folder):
    """What is raised in a callback from C is printed, and the callback returns as if nothing had been."""
    process = start(folder, LOST)
    _, stderr = process.communicate()
    assert "Exception ignored" in stderr  # it was lost
    assert process.returncode == 130
    assert stderr.endswith("\ninterrupted\n")
    assert_untouched(folder)


def test_the_second_ends_what_the_first_cannot(folder):
    process = start(folder, STUCK)
    wait_for(process, "there")
    while process.poll() is None:  # two signals at a time would be one
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)  # one more would meet a process that is ending, and no longer handles any
    _, stderr = process.communicate()
    assert (process.returncode, stderr) == (130, "interrupted\n")
    assert_untouched(folder)


def test_at_random_moments(folder):
    began = time.monotonic()
    start(folder).communicate()
    whole = time.monotonic() - began
    caught = 0
    for moment in np.random.default_rng(0).uniform(0, 1, MOMENTS) * whole:
        for name in ("out.onnx", "r.json"):
            (folder / name).unlink(missing_ok=True)
        (folder / "out.onnx").write_bytes(b"old")
        process = start(folder)
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        # A shell says 130 of both: Python itself dies of the signal before our first line and in its own last ones.
        assert process.returncode in (0, 130, -signal.SIGINT), stderr
        if process.returncode == 130:
            assert stderr.endswith("interrupted\n")
        old = (folder / "out.onnx").read_bytes() == b"old"
        assert old or load(folder / "out.onnx")
        assert not (old and process.returncode == 0)
        assert {path.name for path in folder.iterdir()} <= {"m.onnx", "out.onnx", "r.json"}
        caught += process.returncode == 130 and old
    assert caught >= MOMENTS / 5  # in the middle of the work


def test_ignored_interrupts_stay_ignored(folder):
    """As a shell without job control starts what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start(folder, WAIT)
        wait_for(process, "there")
        process.send_signal(signal.SIGINT)
        process.communicate("go on")
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.returncode == 0
    assert load(folder / "out.onnx")


def test_a_library_leaves_the_handler_alone():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt), noticed():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1
