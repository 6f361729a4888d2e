"""Samples from files: a folder of images, an `.npy` array, or an `.npz` with one array per input.

Arrays of bytes are pixels and are normalized like images; arrays of floats are the model's input as it is.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from onnx_lwdf.activations.images import F32
from onnx_lwdf.activations.inputs import InputSpec
from onnx_lwdf.errors import OptionError
from onnx_lwdf.runtime import Array

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def load(path: Path, inputs: Sequence[InputSpec]) -> Mapping[str, F32]:
    """Input name -> float32 [N, *shape]; OptionError where the path does not hold samples for these inputs."""
    if path.is_dir():
        return {_only(inputs, path).name: _read_images(path, _only(inputs, path))}
    if path.suffix not in (".npy", ".npz") or not path.is_file():
        raise OptionError(
            f"activations-from {str(path)!r} is neither a source (aligned, gaussian) nor a folder of images, .npy or .npz"
        )
    try:
        stored = np.load(path, allow_pickle=False)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise OptionError(f"activations-from {str(path)!r} cannot be read: {error}") from error
    if isinstance(stored, np.ndarray):
        return {_only(inputs, path).name: _shaped(stored, _only(inputs, path), path)}
    with stored:
        arrays: dict[str, Array] = {name: stored[name] for name in stored.files}
    if len(inputs) == 1 and len(arrays) == 1:
        return {inputs[0].name: _shaped(next(iter(arrays.values())), inputs[0], path)}
    missing = [spec.name for spec in inputs if spec.name not in arrays]
    if missing:
        raise OptionError(f"{str(path)!r} has no array for input {missing[0]!r}; it has {', '.join(arrays)}")
    return {spec.name: _shaped(arrays[spec.name], spec, path) for spec in inputs}


def _only(inputs: Sequence[InputSpec], path: Path) -> InputSpec:
    if len(inputs) != 1:
        raise OptionError(f"the model has {len(inputs)} inputs; {str(path)!r} must be an .npz with an array for each")
    return inputs[0]


def _read_images(folder: Path, spec: InputSpec) -> F32:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files or not spec.image:
        reason = "the model's input is not an image" if files else "no images there"
        raise OptionError(f"activations-from {str(folder)!r}: {reason}")
    height, width, channels = spec.shape if spec.channels_last else (*spec.shape[1:], spec.shape[0])
    pixels = np.stack([_pixels(path, (width, height), "L" if channels == 1 else "RGB") for path in files])
    return spec.place(pixels)


def _pixels(path: Path, size: tuple[int, int], mode: str) -> F32:
    """One image in [0, 1], [C, H, W]."""
    try:
        with Image.open(path) as image:
            resized = image.convert(mode).resize(size, Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError) as error:
        raise OptionError(f"image {str(path)!r} cannot be read: {error}") from error
    array = np.asarray(resized, np.float32) / np.float32(255)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _shaped(array: Array, spec: InputSpec, path: Path) -> F32:
    if array.shape[1:] != spec.shape or not len(array):
        raise OptionError(
            f"{str(path)!r} holds {array.shape}; input {spec.name!r} needs [N, {', '.join(map(str, spec.shape))}]"
        )
    if array.dtype == np.uint8 and spec.image:
        pixels = array.astype(np.float32) / np.float32(255)
        return spec.place(pixels.transpose(0, 3, 1, 2) if spec.channels_last else pixels)
    values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise OptionError(f"{str(path)!r} holds NaN or infinite values for input {spec.name!r}")
    return values
