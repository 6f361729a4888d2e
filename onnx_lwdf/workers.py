"""Threads for work that is independent of each other: NumPy releases Python's lock where it computes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from threadpoolctl import threadpool_limits


@contextlib.contextmanager
def workers(jobs: int | None) -> Iterator[ThreadPoolExecutor]:
    """So many threads, else one for each core that this process may use; BLAS keeps to one in each of them."""
    with threadpool_limits(limits=1), ThreadPoolExecutor(jobs or cores()) as pool:
        yield pool


def cores() -> int:
    """That this process may use: fewer than the machine has, where an affinity is set."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
