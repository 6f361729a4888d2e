#!/usr/bin/env python3
"""What compression costs in accuracy: a small network on labelled images, at several bit widths."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

import onnx_lwdf

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from fashion_mnist import load  # noqa: E402  # the tests' own reader of Debian's package or of the sample

MODEL = ROOT / "models" / "fmnist-mbv2-bn.onnx"
LEAST_DB = -100.0  # what is bad is shown, too
WIDTHS = ((8, 8), (6, 6), (5, 5), (4, 8), (4, 4))


def accuracy(model: onnx.ModelProto, images: np.ndarray, labels: np.ndarray) -> float:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: images[i : i + 250]})[0].argmax(1) for i in range(0, len(images), 250)]
    return 100 * float((np.concatenate(parts) == labels).mean())


def main() -> None:
    images, labels = load()
    table = Table("bits", "accuracy %", "bytes", title=f"{MODEL.name}, {len(labels):,} Fashion-MNIST test images")
    table.add_row("float", f"{accuracy(onnx.load(MODEL), images, labels):.2f}", f"{MODEL.stat().st_size:,}")
    for weight, activation in WIDTHS:
        result = onnx_lwdf.compress(MODEL, weight_bits=weight, activation_bits=activation, fail_under=LEAST_DB)
        size = f"{result.model.ByteSize():,}"
        table.add_row(f"w{weight}a{activation}", f"{accuracy(result.model, images, labels):.2f}", size)
    Console().print(table)


if __name__ == "__main__":
    main()
