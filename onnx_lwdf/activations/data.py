"""Samples from files: a folder of images, an `.npy` array, or an `.npz` with one array per input.

Arrays of bytes are pixels and are normalized like images; other numbers are the model's input as it is.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from onnx_lwdf.activations.images import F32
from onnx_lwdf.activations.inputs import InputSpec
from onnx_lwdf.errors import OptionError
from onnx_lwdf.runtime import Array

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
UNREADABLE = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error)  # what NumPy raises for broken files
NUMBERS = "fiub"  # kinds of arrays
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by channels


def load(path: Path, inputs: Sequence[InputSpec]) -> Mapping[str, Array]:
    """Input name -> [N, *shape] of its type; OptionError where the path does not hold samples for these inputs."""
    if path.is_dir():
        return {_only(inputs, path).name: _read_images(path, _only(inputs, path))}
    if path.suffix not in (".npy", ".npz") or not path.is_file():
        raise OptionError(
            f"activations-from {str(path)!r} is neither a source (aligned, gaussian) nor a folder of images, .npy or .npz"
        )
    arrays = _read_arrays(path)
    if len(inputs) == 1 and len(arrays) == 1:
        return {inputs[0].name: _shaped(next(iter(arrays.values())), inputs[0], path)}
    if path.suffix == ".npy":
        _only(inputs, path)
    missing = [spec.name for spec in inputs if spec.name not in arrays]
    if missing:
        raise OptionError(f"{str(path)!r} has no array for input {missing[0]!r}; it has {', '.join(arrays)}")
    return {spec.name: _shaped(arrays[spec.name], spec, path) for spec in inputs}


def _read_arrays(path: Path) -> dict[str, Array]:
    """What an .npz holds by name, or an .npy under an empty one."""
    try:
        stored = np.load(path, allow_pickle=False)
        if isinstance(stored, np.ndarray):
            arrays = {"": stored}
        else:
            with stored:
                arrays = {name: stored[name] for name in stored.files}
    except UNREADABLE as error:
        raise OptionError(f"activations-from {str(path)!r} cannot be read: {error}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in NUMBERS:
            what = f"{name!r}, which is no array of numbers" if name else "no numbers"
            raise OptionError(f"activations-from {str(path)!r} holds {what}")
    return arrays


def _only(inputs: Sequence[InputSpec], path: Path) -> InputSpec:
    if len(inputs) != 1:
        raise OptionError(f"the model has {len(inputs)} inputs; {str(path)!r} must be an .npz with an array for each")
    return inputs[0]


def _read_images(folder: Path, spec: InputSpec) -> Array:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files or not spec.image:
        reason = "the model's input is not an image" if files else "no images there"
        raise OptionError(f"activations-from {str(folder)!r}: {reason}")
    channels, height, width = spec.chw
    if channels not in MODES:
        raise OptionError(f"activations-from {str(folder)!r}: the model's input has {channels} channels; give an .npy")
    return spec.place(np.stack([_pixels(path, (width, height), MODES[channels]) for path in files]))


def _pixels(path: Path, size: tuple[int, int], mode: str) -> F32:
    """One image in [0, 1], [C, H, W]."""
    try:
        with Image.open(path) as image:
            resized = _eight_bits(image).convert(mode).resize(size, Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise OptionError(f"image {str(path)!r} cannot be read: {error}") from error
    array = np.asarray(resized, np.float32) / np.float32(255)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16-bit grey levels, which Pillow would cut off at 255, by their upper bytes."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))


def _shaped(array: Array, spec: InputSpec, path: Path) -> Array:
    if array.shape[1:] != spec.shape or not len(array):
        raise OptionError(
            f"{str(path)!r} holds {array.shape}; input {spec.name!r} needs [N, {', '.join(map(str, spec.shape))}]"
        )
    if array.dtype == np.uint8 and spec.image:
        pixels = array.astype(np.float32) / np.float32(255)
        return spec.place(pixels.transpose(0, 3, 1, 2) if spec.channels_last else pixels)
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is refused below
        values = array.astype(spec.dtype)
    fits = np.isfinite(values).all() if spec.dtype.kind == "f" else np.array_equal(values, array)
    if not fits:
        kept = "NaN or infinite values" if spec.dtype.kind == "f" else f"values that are no {spec.dtype}"
        raise OptionError(f"{str(path)!r} holds {kept} for input {spec.name!r}")
    return values
