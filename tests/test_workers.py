from __future__ import annotations

import os
import threading

import pytest

from onnx_lwdf.workers import cores, workers


@pytest.mark.parametrize(("jobs", "expected"), [(3, 3), (1, 1), (None, cores())])
def test_as_many_threads_as_asked_or_as_there_are_cores(jobs, expected):
    """Work that waits for all its fellows ends where each has a thread, and not where there is one fellow more."""
    enough, too_many = threading.Barrier(expected), threading.Barrier(expected + 1)
    with workers(jobs) as pool:
        list(pool.map(lambda _: enough.wait(60), range(expected)))
        with pytest.raises(threading.BrokenBarrierError):
            list(pool.map(lambda _: too_many.wait(0.5), range(expected + 1)))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system has no affinity")
def test_an_affinity_counts():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)
