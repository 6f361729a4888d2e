"""Data-free compression of trained CNNs: ONNX in, smaller and faster ONNX out."""

from onnx_lwdf import interrupt as interrupt  # first: from here on Ctrl-C ends a command that still loads the others
from onnx_lwdf.api import Gate, Result, check, compress, inspect
from onnx_lwdf.compress import Progress
from onnx_lwdf.config import Config
from onnx_lwdf.errors import GateError, LwdfError, ModelError, OptionError
from onnx_lwdf.model_io import tool_version
from onnx_lwdf.report import LayerReport, Report

__version__ = tool_version()

__all__ = [
    "Config",
    "Gate",
    "GateError",
    "LayerReport",
    "LwdfError",
    "ModelError",
    "OptionError",
    "Progress",
    "Report",
    "Result",
    "check",
    "compress",
    "inspect",
]
