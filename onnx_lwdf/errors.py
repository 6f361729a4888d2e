"""What can go wrong, each kind with the exit code that the command line gives it."""

from __future__ import annotations


class LwdfError(Exception):
    """Any failure that the user can understand: what, where, what to do."""

    exit_code = 1


class ModelError(LwdfError):
    """The file or model cannot be read, written or compressed."""


class OptionError(LwdfError):
    """An option's value is wrong, or options contradict each other."""

    exit_code = 2


class GateError(LwdfError):
    """A gate of the pipeline failed; the file is still written."""

    exit_code = 3
