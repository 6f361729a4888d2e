"""A network of more than 2 GiB, made here, compressed by the command: seconds, memory, and what is left of its answers.

    python bench/large.py FOLDER [--gib 2.3] [--options "--activation-bits float"]

Residual blocks: x + mean over pieces of Relu(BatchNormalization(W x)). The weights are wide and read few channels, so that the
second moments of what they read stay small. They are seeded random numbers, written straight to a file; the statistics
are those of synthetic images.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_lwdf.activations.images import scenes

WIDTH = 256  # channels between blocks
CONVOLUTIONS, CONVOLUTION_PIECES = 4, 32  # a Conv: WIDTH -> WIDTH * pieces, 8 MiB
GEMM_PIECES = 256  # a Gemm: 64 MiB
LAYER_MIB = 4 * WIDTH * WIDTH * GEMM_PIECES / 2**20
SIDE, STRIDE = 32, 8
IMAGES = 64  # for the statistics
INTERVAL_S = 0.02
MIB = 2**20


class Network:
    """Nodes, tensors, the file of the large ones, and what the network puts out so far: rows of channels."""

    def __init__(self, weights: Path) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.weights, self.rng = weights, np.random.default_rng(0)
        weights.write_bytes(b"")

    def constant(self, name: str, value: np.ndarray) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, name: str, shape: tuple[int, ...]) -> tuple[str, np.ndarray]:
        """Its name, and its value [out, in]."""
        value = self.rng.standard_normal((shape[0], int(np.prod(shape[1:]))), np.float32)
        value /= np.float32(np.sqrt(value.shape[1]))
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        entries = {"location": self.weights.name, "offset": self.weights.stat().st_size, "length": value.nbytes}
        for key, entry in entries.items():
            tensor.external_data.add(key=key, value=str(entry))
        with self.weights.open("ab") as file:
            value.tofile(file)
        self.tensors.append(tensor)
        return name, value

    def add(self, op: str, inputs: list[str], name: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def normalized(self, tensor: str, values: np.ndarray, gain: float = 1.0) -> tuple[str, np.ndarray]:
        """Behind the tensor of these values [rows, channels]: a BatchNormalization that was trained on them."""
        mean, variance = values.mean(0), values.var(0)
        gamma = gain * np.sqrt(variance / variance.mean())  # a channel that says little is not made to speak up
        parts = {"gamma": gamma, "beta": np.zeros_like(mean), "mean": mean, "variance": variance}
        names = [self.constant(f"{tensor}.{word}", value) for word, value in parts.items()]
        found = gamma * (values - mean) / np.sqrt(variance + 1e-5)
        return self.add("BatchNormalization", [tensor, *names], f"{tensor}.bn"), found

    def block(self, op: str, x: str, values: np.ndarray, name: str, pieces: int) -> tuple[str, np.ndarray]:
        """x + mean over pieces, less its mean."""
        one = (1, 1) if op == "Conv" else ()
        weight, matrix = self.weight(f"{name}.weight", (WIDTH * pieces, WIDTH, *one))
        y = self.add(op, [x, weight], name, **({} if one else {"transB": 1}))
        y, found = self.normalized(y, values @ matrix.T, pieces**0.5)
        y, found = self.add("Relu", [y], f"{name}.relu"), np.maximum(found, 0)
        sizes = self.constant(f"{name}.sizes", np.array([0, WIDTH, pieces, *[-1] * bool(one)]))
        y = self.add("Reshape", [y, sizes], f"{name}.pieces")
        y = self.add("ReduceMean", [y], f"{name}.joined", axes=[2], keepdims=0)
        if one:
            side = SIDE // STRIDE
            y = self.add(
                "Reshape", [y, self.constant(f"{name}.map", np.array([0, WIDTH, side, side]))], f"{name}.mapped"
            )
        joined = found.reshape(-1, WIDTH, pieces).mean(2)
        y = self.add("Sub", [y, self.constant(f"{name}.center", joined.mean(dtype=np.float32))], f"{name}.centered")
        return self.add("Add", [x, y], f"{name}.sum"), values + joined - joined.mean()


def build(path: Path, gib: float) -> None:
    network = Network(path.with_suffix(".bin"))
    images = (scenes(IMAGES, 3, SIDE, SIDE, np.random.default_rng(1)) - 0.5) * 4  # -2 to 2
    places = SIDE // STRIDE
    patches = images.reshape(IMAGES, 3, places, STRIDE, places, STRIDE).transpose(0, 2, 4, 1, 3, 5)
    weight, matrix = network.weight("stem.weight", (WIDTH, 3, STRIDE, STRIDE))
    x = network.add("Conv", ["x", weight], "stem", strides=[STRIDE, STRIDE])
    x, values = network.normalized(x, patches.reshape(-1, 3 * STRIDE * STRIDE) @ matrix.T)
    for number in range(CONVOLUTIONS):
        x, values = network.block("Conv", x, values, f"conv{number}", CONVOLUTION_PIECES)
    x = network.add("Flatten", [network.add("GlobalAveragePool", [x], "pool")], "flat")
    x, values = network.normalized(x, values.reshape(IMAGES, -1, WIDTH).mean(1))
    for number in range(round((gib * 2**30 - network.weights.stat().st_size) / (LAYER_MIB * MIB))):
        x, values = network.block("Gemm", x, values, f"gemm{number}", GEMM_PIECES)
    network.add("Gemm", [x, network.weight("head.weight", (10, WIDTH))[0]], "y", transB=1)
    first, last = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["N", 3, SIDE, SIDE]), ("y", ["N", 10]))
    )
    graph = helper.make_graph(network.nodes, "large", [first], [last], network.tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def measured(command: list[str]) -> tuple[float, dict[str, int]]:
    """Seconds of a command, and the peaks of its memory in bytes by the words of /proc."""
    began, peaks = time.monotonic(), {"RssAnon": 0, "VmHWM": 0}
    process = subprocess.Popen(command)
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            word, _, rest = line.partition(":")
            if word in peaks:
                peaks[word] = max(peaks[word], 1024 * int(rest.split()[0]))
        time.sleep(INTERVAL_S)
    if process.returncode:
        sys.exit(process.returncode)
    return time.monotonic() - began, peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=2.3)
    parser.add_argument("--options", default="--samples 32", help="of the command")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path, report = arguments.folder / "large.onnx", arguments.folder / "large.json"
    build(path, arguments.gib)
    command = [str(Path(sys.executable).with_name("onnx-lwdf")), str(path), "-o", str(arguments.folder / "out.onnx")]
    options = ["--input-range=-2,2", "--force", "-q", "--report", str(report), *shlex.split(arguments.options)]
    seconds, peaks = measured([*command, *options])
    found = json.loads(report.read_text())["totals"]
    print(
        f"file {found['bytes_before'] / MIB:,.0f} -> {found['bytes_after'] / MIB:,.0f} MiB, largest layer {LAYER_MIB:,.0f} MiB"
    )
    print(
        f"{seconds:,.0f} s; memory {peaks['RssAnon'] / MIB:,.0f} MiB, with pages of files {peaks['VmHWM'] / MIB:,.0f} MiB"
    )
    print(f"output {found['output_db']:.1f} dB; worst layer {found['worst_layer']} {found['worst_layer_db']:.1f} dB")


if __name__ == "__main__":
    main()
