"""Ctrl-C on the command line: the first ends the work and leaves no trace of it, a second one ends the process at once.

Python raises KeyboardInterrupt wherever the main thread stands. In a callback from C or in a finalizer it is printed and
lost; so it is noted too, and every step of the work looks. And Python learns of a signal only when C returns, which a run
of onnxruntime may put off for long; so a thread reads the second one, from a pipe into which the signal itself writes.

A part of the command line: importing it does nothing but in a process that is the command.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED = 130
SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it


def leave(*_: object) -> None:
    """End the process, whatever it is doing."""
    os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + b"interrupted\n")
    os._exit(INTERRUPTED)


@contextmanager
def noticed() -> Iterator[Callable[[], None]]:
    """Work that an interrupt ends with KeyboardInterrupt, at the latest in what this yields, or at the end of the work.

    Does nothing where interrupts are not Python's own to handle: ignored, another's, or in a thread.
    """
    before = signal.getsignal(signal.SIGINT)
    if before not in (leave, signal.default_int_handler) or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked = threading.Event()

    def note(*_: object) -> None:
        asked.set()
        raise KeyboardInterrupt

    def look() -> None:
        if asked.is_set():
            raise KeyboardInterrupt

    reading, writing = os.pipe()
    if sys.platform != "win32":
        os.set_blocking(writing, False)  # a signal must not wait
    threading.Thread(target=_leave_at_the_second, args=(reading,), daemon=True).start()
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, note)
    try:
        yield look
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(wakeup)
        os.close(writing)
        look()


def _leave_at_the_second(reading: int) -> None:
    """Until the pipe is closed."""
    seen = 0
    while number := os.read(reading, 1):
        seen += number[0] == signal.SIGINT
        if seen == 2:
            leave()
    os.close(reading)


def _is_command() -> bool:
    """Whether this process is `onnx-lwdf` or `python -m onnx_lwdf`, still loading."""
    script = Path(sys.argv[0]).stem == "onnx-lwdf" if sys.argv else False
    return script or (sys.argv[:1] == ["-m"] and "onnx_lwdf" in sys.orig_argv)


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)  # until there is something to clean up
