"""Threads for work that is independent of each other: NumPy releases Python's lock where it computes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor


def workers(jobs: int | None) -> ThreadPoolExecutor:
    """So many threads, else one for each core that this process may use."""
    return ThreadPoolExecutor(jobs or cores())


def cores() -> int:
    """That this process may use: fewer than the machine has, where an affinity is set."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
