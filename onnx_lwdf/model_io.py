"""Read and write a ModelProto: external data, operator set and IR version, atomic save, provenance."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError
from onnx import external_data_helper, version_converter

from onnx_lwdf.errors import ModelError
from onnx_lwdf.mapped import Scratch, anchored, bytes_of, is_mapped, loaded, mappable, refer, values_of, without_mapped
from onnx_lwdf.precision import FLOAT32, VALUE_BYTES, Precision, widen
from onnx_lwdf.runtime import PROTOBUF_LIMIT_BYTES, copy_of, first_line, open_session, trim
from onnx_lwdf.staging import locked, settle, staging

TOOL = "onnx-lwdf"
PREFIX = "onnx_lwdf."  # of our keys in metadata_props
EXTERNAL_BYTES = 1024  # smaller tensors stay in the model's own file
DIGITS = 12  # of a hash in the name of a file of weights
# The IR version that onnx 1.x released with an operator set; onnxruntime refuses a file whose IR is newer than itself.
IR_OF_OPSET: Mapping[int, int] = {9: 4, 11: 6, 13: 7, 18: 8}
# What the checker says of operators that ONNX withdrew, and onnxruntime still runs: GroupNormalization of opset 18 to 20.
WITHDRAWN = "is deprecated in domain_version"


@dataclass(frozen=True, slots=True)
class Source:
    """A model as it was read."""

    model: onnx.ModelProto  # in float32, whatever it was
    path: Path | None
    sha256: str  # of the file, or of the serialized ModelProto
    size_bytes: int  # of the file and its external data
    external: bool  # the weights came from other files
    precision: Precision = FLOAT32  # that it had
    mapped: bool = False  # its weights are too large for memory, and stayed in their files


def tool_version() -> str:
    try:
        return version(TOOL)
    except PackageNotFoundError:  # a source tree that was never installed
        return "0"


def read(source: str | Path | onnx.ModelProto) -> Source:
    """The model with its external data, in float32; ModelError where it is missing, not ONNX, truncated, or our own output."""
    if isinstance(source, onnx.ModelProto):
        _check_size("the model", max(source.ByteSize(), _float_bytes(source)))
        model = copy_of(source)
        data = model.SerializeToString(deterministic=True)
        result = Source(model, None, hashlib.sha256(data).hexdigest(), len(data), external=False)
    else:
        result = _read_file(Path(source))
    if provenance(result.model):
        raise ModelError(f"{result.path or 'the model'}: was already compressed by {TOOL}; give it the original model")
    _check_valid(result)
    kinds = {tensor.data_type for tensor in result.model.graph.initializer if len(tensor.dims) > 1} & set(VALUE_BYTES)
    if result.mapped and kinds - {onnx.TensorProto.FLOAT}:
        raise ModelError(
            f"{result.path}: has more than {PROTOBUF_LIMIT_BYTES / 2**30:.0f} GiB of weights, and some are not float32; "
            "export it in float32"
        )
    found = replace(result, precision=widen(result.model))
    trim()  # reading and checking take three times what the model does
    return found


def _check_valid(source: Source) -> None:
    """ModelError where onnx's checker refuses the model, unless for an operator that was withdrawn and still runs."""
    try:
        onnx.checker.check_model(_checkable(source))
    except Exception as error:  # the checker raises ValidationError, and others on broken attributes
        if WITHDRAWN not in str(error) or source.mapped:
            raise ModelError(f"{source.path or 'the model'}: is not a valid ONNX model: {first_line(error)}") from error
        open_session(source.model)


def _checkable(source: Source) -> onnx.ModelProto | str:
    """What onnx's checker takes: a path is not serialized, but all that it names is read into memory."""
    open_ranks = with_shapes(source.model)
    if source.mapped or source.path is None or open_ranks is not source.model:
        return without_mapped(open_ranks)
    return str(source.path)


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, or a copy for onnx's checker: that wants a shape of every input and output, onnxruntime runs them without."""
    if not any(map(_rank_is_open, (*model.graph.input, *model.graph.output))):
        return model
    copy = copy_of(model)
    for info in filter(_rank_is_open, (*copy.graph.input, *copy.graph.output)):
        info.type.tensor_type.shape.SetInParent()  # whose rank the checker then takes for 0, and does not look at
    return copy


def _rank_is_open(info: onnx.ValueInfoProto) -> bool:
    return info.type.HasField("tensor_type") and not info.type.tensor_type.HasField("shape")


def load(path: Path) -> onnx.ModelProto:
    """A model of anyone's, with its external data; ModelError where it is missing, not ONNX, or truncated."""
    return _read_file(path).model


def _read_file(path: Path) -> Source:
    if not path.exists():
        raise ModelError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; give the .onnx file in it")
    try:
        _check_size(path, path.stat().st_size)
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(f"{path}: not an ONNX file, or truncated; export or download it again") from error
    if not model.HasField("graph") or not model.graph.node:
        raise ModelError(f"{path}: not an ONNX file, or one without a graph; export or download it again")
    external = list(_external_files(model))
    for name in external:
        _check_inside(path, name)
    size, mapped = len(data), False
    if not external:
        _check_size(path, _float_bytes(model))
    else:
        try:
            mapped = _read_weights(path, model)
            size += sum((path.parent / name).stat().st_size for name in external)
        except Exception as error:  # onnx raises its own checker errors beside OSError and ValueError
            raise ModelError(f"{path}: its external data cannot be read: {first_line(error)}") from error
    return Source(model, path, hashlib.sha256(data).hexdigest(), size, bool(external), mapped=mapped)


def _check_size(name: Path | str, size: int) -> None:
    """ModelError where so many bytes of weights, in float32, do not fit into one protobuf."""
    if size > PROTOBUF_LIMIT_BYTES:
        raise ModelError(
            f"{name}: has {size / 2**30:.1f} GiB of float32 weights, and {PROTOBUF_LIMIT_BYTES / 2**30:.0f} GiB are the most "
            "that a file without external data holds; save it with its weights as external data, and give its path"
        )


def _read_weights(path: Path, model: onnx.ModelProto) -> bool:
    """Read the model's external data, or map what is large where it is more than fits into one protobuf; whether it is."""
    mapped = _float_bytes(model) > PROTOBUF_LIMIT_BYTES
    large = [tensor for tensor in model.graph.initializer if mapped and is_mapped(tensor) and mappable(tensor)]
    for tensor in large:
        _map(path.parent, tensor)
    done = {id(tensor) for tensor in large}  # as long as they are held, they are the same objects
    for tensor in external_data_helper._get_all_tensors(model):
        if is_mapped(tensor) and id(tensor) not in done:
            external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return mapped


def _map(folder: Path, tensor: onnx.TensorProto) -> None:
    """Let the tensor's values be mapped from the file where they are; ValueError where that does not hold them."""
    info = external_data_helper.ExternalDataInfo(tensor)
    file, offset, length = folder / info.location, info.offset or 0, bytes_of(tensor)
    if (info.length or length) != length or file.stat().st_size < offset + length:
        raise ValueError(f"{info.location!r} does not hold the {length:,} bytes of tensor {tensor.name!r}")
    refer(tensor, anchored(file), offset, length)


def _float_bytes(model: onnx.ModelProto) -> int:
    """Of the weights, in float32."""
    floats = (math.prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type in VALUE_BYTES)
    return VALUE_BYTES[onnx.TensorProto.FLOAT] * sum(floats)


def _check_inside(path: Path, name: str) -> None:
    """ModelError where a file of weights is not in the model's own folder, by its name or because it is a link."""
    folder = path.parent.resolve()
    if Path(name).is_absolute() or not (folder / name).resolve().is_relative_to(folder):
        raise ModelError(
            f"{path}: its external data {name!r} is outside of its folder; move it there, or do not trust it"
        )


def _external_files(model: onnx.ModelProto) -> dict[str, None]:
    names: dict[str, None] = {}
    for tensor in external_data_helper._get_all_tensors(model):
        if external_data_helper.uses_external_data(tensor):
            names[external_data_helper.ExternalDataInfo(tensor).location] = None
    return names


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the bodies of its local functions in place of their calls."""
    return onnx.inliner.inline_local_functions(model) if model.functions else model


def raise_opset(model: onnx.ModelProto, opset: int, form: str) -> tuple[onnx.ModelProto, str | None]:
    """The model at this operator set at least, which the format needs, with a note where it had to be converted.

    Raises ModelError where onnx cannot convert it.
    """
    current = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    if current >= opset:
        return model, None
    try:
        converted = version_converter.convert_version(model, opset)
    except Exception as error:  # the converter raises RuntimeError and others
        raise ModelError(
            f"opset {current} cannot be raised to {opset}, which format {form} needs: {first_line(error)}; "
            "export it with a newer opset, or use --activation-bits float --format folded"
        ) from error
    mapped = {tensor.name: tensor for tensor in model.graph.initializer if is_mapped(tensor)}
    for tensor in converted.graph.initializer:  # older versions of onnx forget where their values are
        if tensor.name in mapped:
            tensor.CopyFrom(mapped[tensor.name])
    converted.ir_version = max(model.ir_version, IR_OF_OPSET[opset])
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(converted, name, getattr(model, name))
    del converted.metadata_props[:]
    converted.metadata_props.extend(model.metadata_props)
    known = {info.name for info in model.graph.value_info}
    kept = [
        onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in converted.graph.value_info if v.name in known
    ]
    del converted.graph.value_info[:]  # the converter writes down every shape that it infers
    converted.graph.value_info.extend(kept)
    declared = {info.name: info for info in (*model.graph.input, *model.graph.output)}
    for info in (*converted.graph.input, *converted.graph.output):
        info.CopyFrom(declared[info.name])
    return converted, f"opset raised from {current} to {opset}, which format {form} needs"


def fix_initializers(model: onnx.ModelProto) -> str | None:
    """Make initializers that are also inputs into constants; a note where that changes the model's inputs.

    Before IR 4 every initializer had to be listed so; from IR 4 on it is a default that a caller may override, and
    onnxruntime folds nothing into it.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    listed = [value.name for value in model.graph.input if value.name in weights]
    kept = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in model.graph.input if v.name not in weights]
    if listed:
        del model.graph.input[:]
        model.graph.input.extend(kept)
    overridable = model.ir_version >= 4
    model.ir_version = max(model.ir_version, 4)
    return f"{len(listed)} overridable initializers became constants" if listed and overridable else None


def add_provenance(model: onnx.ModelProto, source: Source, options: Mapping[str, Any]) -> None:
    """Who made the file, from what, with which options; `--check` and a second run read it."""
    entries = {
        "version": tool_version(),
        "source_sha256": source.sha256,
        "options": json.dumps(options, sort_keys=True),
    }
    for key, value in entries.items():
        model.metadata_props.add(key=PREFIX + key, value=value)


def provenance(model: onnx.ModelProto) -> dict[str, str]:
    """Our entries of the metadata, without the prefix; empty where the file is not ours."""
    return {item.key.removeprefix(PREFIX): item.value for item in model.metadata_props if item.key.startswith(PREFIX)}


@contextlib.contextmanager
def scratch(source: Source, beside: Path | None) -> Iterator[Scratch | None]:
    """A folder for what does not fit into memory, beside this path, gone at the end; None where all of it fits.

    ModelError where there is no such path: the result does not fit into memory either.
    """
    if not source.mapped:
        yield None
        return
    if beside is None:
        raise ModelError(f"{source.path}: is too large to be compressed in memory; give an output")
    with staging(beside) as folder:
        yield Scratch(folder)


def check_apart(path: Path, source: Path, word: str) -> None:
    """ModelError where a file that will be written, by this option, is the input or holds its external data."""
    if not path.exists() or not source.exists():
        return
    if path.samefile(source):
        raise ModelError(f"{path}: is the input itself; give another --{word}")
    model = onnx.ModelProto()
    with contextlib.suppress(OSError, DecodeError):  # which reading it tells
        model.ParseFromString(source.read_bytes())
    weights = (source.parent / name for name in _external_files(model))
    if any(file.exists() and path.samefile(file) for file in weights):
        raise ModelError(f"{path}: holds weights of the input; give another --{word}")


def check_target(path: Path, source: Path | None, force: bool) -> None:
    """ModelError where the output may not be written: it is the input, it exists, or its folder does not."""
    if source is not None:
        check_apart(path, source, "output")
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; give a file name with --output")
    if path.exists() and not path.is_file():
        raise ModelError(f"{path}: is a device or a pipe, and a model is moved into its place; give a file's name")
    if not path.parent.is_dir():
        raise ModelError(f"{path.parent}: no such folder; create it first")
    if path.exists() and not force:
        raise ModelError(f"{path}: exists; give --force to replace it, or another --output")
    if not os.access(path.parent, os.W_OK):
        raise ModelError(f"{path.parent}: is not writable; give another --output")


def write(model: onnx.ModelProto, path: Path, external: bool) -> int:
    """Write the model beside the target and move it there in one step; the bytes written.

    With external data the weights go to PATH.HASH.data, so that an old model's weights stay where they are until the new
    model is in its place. Raises ModelError where the disk or the folder refuses.
    """
    external = external or model.ByteSize() >= PROTOBUF_LIMIT_BYTES
    try:
        with staging(path) as folder:
            staged = folder / path.name
            whole = _moved_out(model, folder / f"{path.name}.{_digest(model)}.data") if external else model
            staged.write_bytes(whole.SerializeToString(deterministic=True))
            files = sorted(folder.iterdir(), key=lambda file: file == staged)  # the model last
            size = sum(file.stat().st_size for file in files)
            with locked(path.parent, wait=True):
                for file in files:
                    settle(file, path.with_name(file.name))
                for old in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * DIGITS}.data"):
                    if old.name not in {file.name for file in files}:
                        old.unlink()
            return size
    except OSError as error:
        raise ModelError(f"{path}: cannot be written: {error.strerror or error}") from error


def _moved_out(model: onnx.ModelProto, weights: Path) -> onnx.ModelProto:
    """A copy of the model whose larger initializers are in the file `weights` (onnx's own looks for it where one stands)."""
    copy = copy_of(model)
    with weights.open("wb") as file:
        for tensor in copy.graph.initializer:
            if is_mapped(tensor):
                data: bytes | memoryview = values_of(tensor).data
            elif len(tensor.raw_data) >= EXTERNAL_BYTES:
                data = tensor.raw_data
            else:
                continue
            refer(tensor, weights.name, file.tell(), file.write(data))
    if not weights.stat().st_size:
        weights.unlink()
    return copy


def _digest(model: onnx.ModelProto) -> str:
    """Of all weights: files of the same weights have the same name."""
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(loaded(tensor).SerializeToString(deterministic=True))
    return digest.hexdigest()[:DIGITS]
