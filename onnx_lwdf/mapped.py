"""Weights that stay in files: a model above protobuf's 2 GiB is edited and run without ever being in memory.

Its large tensors are external data in the sense of ONNX, mapped where they are read. A changed one is written to a file
of its own in a scratch folder, and the old one stays as it was: copies of the model are small, and each remains right.
onnxruntime maps external files too, but only from one folder: so locations start at the root of the file system.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from onnx_lwdf.errors import ModelError

Array = npt.NDArray[Any]

ROOT = Path(os.path.abspath(os.sep))  # noqa: PTH100  # pathlib has no word for it
MAPPED_BYTES = 2**16  # smaller tensors are in memory
_T = onnx.TensorProto
PLAIN = (
    _T.FLOAT,
    _T.INT8,
    _T.UINT8,
    _T.INT16,
    _T.UINT16,
    _T.INT32,
    _T.INT64,
)  # types whose bytes NumPy reads as they are


@dataclass(frozen=True, slots=True)
class Scratch:
    """A folder for arrays that need not be in memory. Whoever made it removes it."""

    folder: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def keep(self, value: Array) -> Array:
        """The array in a file; what is written into it goes there, too."""
        if value.nbytes < MAPPED_BYTES:
            return value
        path = self._write(value)
        return np.asarray(np.memmap(path, value.dtype, "r+", shape=value.shape))

    def tensor(self, value: Array, name: str) -> onnx.TensorProto:
        """The array as a tensor of this name, whose values are in a file where they are many."""
        if value.nbytes < MAPPED_BYTES:
            return onnx.numpy_helper.from_array(value, name)
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=value.shape)
        refer(tensor, anchored(self._write(value)), 0, value.nbytes)
        return tensor

    def _write(self, value: Array) -> Path:
        path = self.folder / f"{next(self._numbers)}.scratch"
        try:
            np.asarray(value, order="C").tofile(path)
        except OSError as error:
            raise ModelError(f"{path}: cannot be written: {error.strerror or error}") from error
        return path


def refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Let the tensor's values be these bytes of the file at a location."""
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def anchored(path: Path) -> str:
    """The file's location seen from the root."""
    path = path.resolve()
    if not path.is_relative_to(ROOT):
        raise ModelError(f"{path}: is on another drive than {ROOT}; put it there")
    return path.relative_to(ROOT).as_posix()


def mappable(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor is one to be mapped: large, and of a type that NumPy knows."""
    return tensor.data_type in PLAIN and bytes_of(tensor) >= MAPPED_BYTES


def bytes_of(tensor: onnx.TensorProto) -> int:
    """Of the values of a tensor of a plain type."""
    return math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def is_mapped(tensor: onnx.TensorProto) -> bool:
    """Whether the values are in a file."""
    return bool(uses_external_data(tensor))


def has_mapped(model: onnx.ModelProto) -> bool:
    """Whether the values of an initializer are in a file."""
    return any(is_mapped(tensor) for tensor in model.graph.initializer)


def values_of(tensor: onnx.TensorProto) -> Array:
    """The values of a mapped tensor, read as they are wanted. Read only."""
    info = ExternalDataInfo(tensor)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.asarray(np.memmap(ROOT / info.location, dtype, "r", offset=info.offset or 0, shape=tuple(tensor.dims)))


def loaded(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """The tensor with its values in memory."""
    if not is_mapped(tensor):
        return tensor
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.ClearField("external_data")
    copy.ClearField("data_location")
    copy.raw_data = values_of(tensor).tobytes()
    return copy


def without_mapped(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, or a copy of it that takes its mapped tensors as inputs: for those who cannot read them."""
    if not has_mapped(model):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = [tensor for tensor in model.graph.initializer if not is_mapped(tensor)]
    gone = [tensor for tensor in model.graph.initializer if is_mapped(tensor)]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(kept)
    listed = {value.name for value in copy.graph.input}
    copy.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in gone
        if tensor.name not in listed
    )
    return copy
