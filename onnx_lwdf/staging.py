"""Files come into being beside their target and move there in one step: a reader finds the old one or the new one.

A run that is killed leaves its staging folder behind. Each folder is locked by its owner, and a lock ends with its process:
the next run on the same target removes the folders that nobody holds.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and what a killed run left stays
    fcntl = None  # type: ignore[assignment]

MARK = ".onnx-lwdf-"


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A folder of this run's own beside the target, gone at the end."""
    for stray in target.parent.glob(f".{glob.escape(target.name)}{MARK}*"):
        with locked(stray) as free:
            if free:
                shutil.rmtree(stray, ignore_errors=True)
    while True:
        folder = target.with_name(f".{target.name}{MARK}{secrets.token_hex(8)}")
        try:  # from before there is a folder: an interrupt may come at any moment
            folder.mkdir(mode=0o700)
            with locked(folder):
                if folder.exists():  # else another run found it before it was locked
                    yield folder
                    return
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the folder's lock where it is free, or once it is; whether it is held."""
    handle = _open(folder)
    if handle is None:
        yield False
        return
    try:
        yield _lock(handle, wait)
    finally:
        os.close(handle)


def _open(folder: Path) -> int | None:
    try:
        return None if fcntl is None else os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # its owner is done with it
        return None


def _lock(handle: int, wait: bool) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def settle(staged: Path, target: Path) -> None:
    """Flush the staged file to the disk and move it over the target."""
    with staged.open("rb+") as file:
        os.fsync(file.fileno())
    staged.replace(target)
