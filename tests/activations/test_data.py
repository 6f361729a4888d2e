"""Samples from files: pixels are normalized, other numbers are taken as they are, and what is broken is refused in a line."""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from onnx_lwdf.activations.data import load
from onnx_lwdf.activations.inputs import InputSpec
from onnx_lwdf.activations.normalization import AS_BYTES, CONVENTIONS
from onnx_lwdf.errors import OptionError

TORCHVISION = CONVENTIONS[0]
IMAGE = InputSpec("x", (3, 4, 5), None, np.dtype(np.float32), 0, False, True, TORCHVISION, inferred=True)
WHOLE = replace(IMAGE, dtype=np.dtype(np.uint8), normalization=AS_BYTES)
INDICES = InputSpec("ids", (2,), None, np.dtype(np.int64), 9, False, False, None, inferred=False)
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), np.uint8)


def normalized(pixels):
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (TORCHVISION.mean, TORCHVISION.std))
    return (pixels - mean) / std


@pytest.mark.parametrize(
    ("stored", "spec", "expected"),
    [
        (PIXELS, IMAGE, normalized(PIXELS)),
        (PIXELS.transpose(0, 2, 3, 1), replace(IMAGE, shape=(4, 5, 3), channels_last=True), None),
        (PIXELS, WHOLE, PIXELS),
        (PIXELS.astype(np.float64), WHOLE, PIXELS),
        (PIXELS.astype(np.float64), IMAGE, PIXELS),
        (np.array([[3, 8], [0, 1]]), INDICES, np.array([[3, 8], [0, 1]])),
        (np.array([[True], [False]]), replace(INDICES, shape=(1,)), np.array([[1], [0]])),
    ],
    ids=["pixels", "channels last", "bytes", "whole floats", "floats", "indices", "flags"],
)
def test_arrays(tmp_path, stored, spec, expected):
    if expected is None:
        expected = normalized(PIXELS).transpose(0, 2, 3, 1)
    np.save(tmp_path / "a.npy", stored)
    np.savez(tmp_path / "a.npz", anything=stored)
    np.savez(tmp_path / "b.npz", **{spec.name: stored, "other": stored})
    for inputs, file in (([spec], "a.npy"), ([spec], "a.npz"), ([spec, replace(spec, name="other")], "b.npz")):
        found = load(tmp_path / file, inputs)
        assert list(found) == [one.name for one in inputs]
        for values in found.values():
            assert values.dtype == spec.dtype
            np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)  # float32


def test_images_of_8_and_of_16_bits_are_the_same_pictures(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (4, 5), np.uint8)
    for channels, spec in ((1, replace(IMAGE, shape=(1, 4, 5), normalization=AS_BYTES)), (3, WHOLE)):
        for name, image in (("8", grey), ("16", grey.astype(np.uint16) * 257)):
            folder = tmp_path / f"{name} {channels}"
            folder.mkdir()
            Image.fromarray(image).save(folder / "a.png")
            np.testing.assert_array_equal(load(folder, [spec])["x"], np.stack([[grey] * channels]))


def chunk(word, data):
    body = word + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def bomb():
    header = struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def saved(path, write, *arrays, **more):
    write(path, *arrays, **more)
    return bytearray(path.read_bytes())


def broken(folder, name):
    """The path of a file, or a folder of one, that holds no samples."""
    path = folder / name
    good = saved(folder / "good.npz", np.savez, x=PIXELS)
    if name == "empty.npy":
        path.write_bytes(b"")
    elif name == "words.npy":
        np.save(path, np.full(PIXELS.shape, "a"))
    elif name == "complex.npy":
        np.save(path, PIXELS.astype(np.complex64))
    elif name == "huge.npy":
        np.save(path, np.full(PIXELS.shape, 1e300))
    elif name == "objects.npz":
        np.savez(path, x=np.full(PIXELS.shape, None))
    elif name == "member.npz":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x", "hello")
    elif name == "sum.npz":
        good[150:180] = b"\xff" * 30
        path.write_bytes(good)
    elif name == "short.npz":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x.npy", bytes(saved(folder / "good.npy", np.save, PIXELS)[:150]))
    elif name == "bomb":
        path.mkdir()
        (path / "a.png").write_bytes(bomb())
    return path


BROKEN = {
    "empty.npy": "cannot be read",
    "words.npy": "holds no numbers",
    "complex.npy": "holds no numbers",
    "huge.npy": "NaN or infinite",
    "objects.npz": "cannot be read",
    "member.npz": "no array of numbers",
    "sum.npz": "cannot be read",
    "short.npz": "cannot be read",
    "bomb": "cannot be read",
    "absent.npy": "neither a source",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(tmp_path, name):
    with pytest.raises(OptionError, match=BROKEN[name]) as caught:
        load(broken(tmp_path, name), [IMAGE])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "spec"),
    [(PIXELS + 0.5, WHOLE), (PIXELS.astype(np.int64) - 1, WHOLE), (np.array([[0.5, 1]]), INDICES)],
)
def test_what_the_input_cannot_hold_is_refused(tmp_path, values, spec):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(OptionError, match=rf"holds values that are no {spec.dtype} for input '{spec.name}'"):
        load(tmp_path / "a.npy", [spec])
