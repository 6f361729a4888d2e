"""onnxruntime, entered through one door: a misspelled session argument would be swallowed silently."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from onnx_lwdf.errors import ModelError
from onnx_lwdf.mapped import ROOT, has_mapped

PROTOBUF_LIMIT_BYTES = 2**31 - 2**20  # a ModelProto above 2 GiB does not serialize
WARNINGS, ERRORS_ONLY, NOTHING = 2, 3, 4  # onnxruntime's log levels; WARNINGS is its default

# 1.19.2 looks for some mapped files in the working folder; between that and 1.32 nothing was tried.
OLDEST_MAPPED = (1, 20)
# What would make changed copies of weights; of a model whose weights are mapped it is left out.
COPYING = ("ConstantFolding", "ConvBNFusion", "ConvMulFusion", "MatMul_BatchNormalization_Fusion")

STANDARD = ("", "ai.onnx", "ai.onnx.ml")  # domains of ONNX's own operators

Array = npt.NDArray[Any]


def open_session(
    model: onnx.ModelProto | Path,
    *,
    optimize: bool = True,
    arena: bool = True,
    optimized_path: Path | None = None,
) -> ort.InferenceSession:
    """A CPU session; ModelError with onnxruntime's own words where it refuses the model.

    Without the arena, memory goes back after each tensor: for few runs on large batches it is smaller by a third and
    faster (measured on onnxruntime 1.32). Mapped weights stay where they are: without the optimizations that copy them.
    """
    options = ort.SessionOptions()
    options.log_severity_level = NOTHING  # what fails is raised, and said once
    options.enable_cpu_mem_arena = options.enable_mem_pattern = arena
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    skipped: list[str] = []
    if isinstance(model, onnx.ModelProto) and has_mapped(model):
        if not maps():
            raise ModelError(f"onnxruntime {ort.__version__} is too old for more than 2 GiB of weights; upgrade it")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(ROOT))
        options.add_session_config_entry("session.disable_prepacking", "1")
        if optimize:  # beyond this level weights are laid out anew
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            skipped += COPYING
    try:
        if isinstance(model, Path):
            return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        if model.ByteSize() < PROTOBUF_LIMIT_BYTES:
            data = model.SerializeToString()
            return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"], disabled_optimizers=skipped)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(copy_of(model), path, save_as_external_data=True)
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many unrelated pybind11 types
        raise ModelError(f"onnxruntime cannot load the model: {first_line(error)}") from error


def maps() -> bool:
    """Whether this onnxruntime runs models whose weights are mapped."""
    return tuple(int(part) for part in ort.__version__.split(".")[:2]) >= OLDEST_MAPPED


def unloadable(model: onnx.ModelProto) -> str | None:
    """Why onnxruntime cannot load a model with somebody's own operators; None where it can, or the model has none."""
    if all(entry.domain in STANDARD for entry in model.opset_import):
        return None
    try:
        open_session(model)
    except ModelError as error:
        return str(error)
    return None


def run(session: ort.InferenceSession, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Array]:
    """One run; ModelError with onnxruntime's own words where it fails."""
    try:
        return [_array(value) for value in session.run(outputs, dict(feeds))]
    except Exception as error:
        raise ModelError(
            f"onnxruntime cannot run the model: {first_line(error)}; where the input's size is open, give --input-shape"
        ) from error


def _array(value: Any) -> Array:
    """The value as an array; one of objects where it is a sequence of tensors of different shapes, which no array holds."""
    if not isinstance(value, list) or len({np.shape(item) for item in value}) <= 1:
        return np.asarray(value)
    array = np.empty(len(value), object)
    array[:] = value
    return array


def copy_of(model: onnx.ModelProto, outputs: Sequence[str] | None = None) -> onnx.ModelProto:
    """A copy of the model; with `outputs`, these tensors are what it puts out."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if outputs is not None:
        del copy.graph.output[:]
        copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
    return copy


@contextlib.contextmanager
def quiet_sessions() -> Iterator[None]:
    """Silence warnings of sessions that another library opens."""
    ort.set_default_logger_severity(ERRORS_ONLY)
    try:
        yield
    finally:
        ort.set_default_logger_severity(WARNINGS)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def trim() -> None:
    """Give freed memory back to the system, that of cycles among it: a graph's nodes and what stands between them.

    glibc keeps what a session had, up to a gigabyte; others have no such call.
    """
    gc.collect()
    release = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if release is not None:
        release(0)
