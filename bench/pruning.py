#!/usr/bin/env python3
"""Second-order pruning beside magnitude pruning, over sparsity, with the sparsities of equal quality.

    python bench/pruning.py [MODEL.onnx --images DIR --mean R,G,B --std R,G,B] [--csv FILE] [--figure FILE.png]

Without a model the shipped Fashion-MNIST network is judged by its accuracy, which needs the test images. With a model,
judges are the images: top-1 agreement with float and SQNR of the outputs. Three curves: `obs` is the tool's default, its
budget spent by measured influence; `magnitude` prunes every layer by the same share, as papers do, with the mean
correction of the bias; `bare` is the same without it. The last lines read off how sparse each may be at equal quality.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

import onnx_lwdf
from onnx_lwdf.activations.data import load
from onnx_lwdf.activations.inputs import read_inputs
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import bias_of, find_layers, set_bias
from onnx_lwdf.precondition.fold import fold
from onnx_lwdf.runtime import open_session, run

ROOT = Path(__file__).parent.parent
DEFAULT = ROOT / "models" / "fmnist-resnet-bn.onnx"
SPARSITIES = tuple(round(0.1 * i, 1) for i in range(1, 9))
METHODS = ("obs", "magnitude", "bare")


@dataclass(frozen=True)
class Row:
    method: str
    sparsity: float
    quality: float  # percent: accuracy, or agreement with float
    sqnr_db: float


def outputs(model: onnx.ModelProto, samples: np.ndarray) -> np.ndarray:
    session = open_session(model)
    name = session.get_inputs()[0].name
    return np.concatenate([run(session, {name: samples[i : i + 16]})[0] for i in range(0, len(samples), 16)])


def pruned(source: onnx.ModelProto, method: str, sparsity: float, options: dict[str, object]) -> onnx.ModelProto:
    """One model; magnitude at the same share in every layer that `obs` would prune too."""
    if method == "obs":
        return onnx_lwdf.compress(source, sparsity=sparsity, **options).model
    plan = onnx_lwdf.inspect(source, onnx_lwdf.Config(weight_bits=None, activation_bits=None, sparsity=0.5))
    shares = {layer.name: sparsity for layer in plan.compressed}
    model = onnx_lwdf.compress(source, sparsity_for=shares, method="magnitude", recalibrate=False, **options).model
    return without_correction(source, model) if method == "bare" else model


def without_correction(source: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the biases of the float model, BatchNormalization folded in."""
    folded, target = Graph(onnx.ModelProto.FromString(source.SerializeToString())), Graph(model)
    fold(folded)
    biases = {layer.name: bias_of(folded, layer) for layer in find_layers(folded)[0]}
    for layer in find_layers(target)[0]:
        set_bias(target, layer, biases[layer.name])
    return target.snapshot()


def measure(
    source: onnx.ModelProto, samples: np.ndarray, labels: np.ndarray | None, options: dict[str, object]
) -> list[Row]:
    exact = outputs(source, samples).astype(np.float64)
    wanted = exact.argmax(1) if labels is None else labels
    rows = [Row("float", 0.0, 100 * float((exact.argmax(1) == wanted).mean()), np.inf)]
    for method in METHODS:
        for sparsity in SPARSITIES:
            answer = outputs(pruned(source, method, sparsity, options), samples)
            noise = float(((exact - answer) ** 2).sum())
            decibels = 10 * np.log10(float((exact**2).sum()) / noise)
            rows.append(Row(method, sparsity, 100 * float((answer.argmax(1) == wanted).mean()), float(decibels)))
            print(f"{method:10s} {sparsity:.1f} {rows[-1].quality:6.2f} {decibels:6.2f} dB", file=sys.stderr)
    return rows


def crossings(rows: Sequence[Row], levels: Sequence[float]) -> list[tuple[float, dict[str, float]]]:
    """For every level of quality the largest sparsity at which each method still has it, by linear interpolation."""
    found = []
    for level in levels:
        reached = {}
        for method in METHODS:
            points = [(0.0, rows[0].quality), *((r.sparsity, r.quality) for r in rows if r.method == method)]
            reached[method] = 0.0
            for (s0, q0), (s1, q1) in itertools.pairwise(points):
                if q1 < level <= q0:
                    reached[method] = s0 + (s1 - s0) * (q0 - level) / (q0 - q1)
                    break
                reached[method] = s1
        found.append((level, reached))
    return found


def show(rows: Sequence[Row], write: Callable[[str], None]) -> None:
    write("| sparsity | " + " | ".join(METHODS) + " |\n|---|" + "---|" * len(METHODS) + "\n")
    for sparsity in SPARSITIES:
        cells = [r for r in rows if r.sparsity == sparsity]
        write(
            f"| {100 * sparsity:.0f} % | "
            + " | ".join(f"{r.quality:.1f} %, {r.sqnr_db:.1f} dB" for r in cells)
            + " |\n"
        )
    top = rows[0].quality
    write(f"\nfloat: {top:.2f} %\n\n| quality | " + " | ".join(METHODS) + " | obs / magnitude | obs / bare |\n")
    write("|---|" + "---|" * (len(METHODS) + 2) + "\n")
    for level, reached in crossings(rows, [top - lost for lost in (1, 5, 10, 20, 40)]):
        ratios = [reached["obs"] / reached[name] if reached[name] else np.inf for name in METHODS[1:]]
        cells = [f"{100 * reached[name]:.0f} %" for name in METHODS] + [f"{ratio:.2f}" for ratio in ratios]
        write(f"| {level:.1f} % | " + " | ".join(cells) + " |\n")


def draw(rows: Sequence[Row], path: Path) -> None:
    from matplotlib import pyplot

    for method in METHODS:
        points = [(100 * r.sparsity, r.quality) for r in rows if r.method == method]
        pyplot.plot(*zip(*points, strict=True), marker="o", label=method)
    pyplot.xlabel("sparsity, %")
    pyplot.ylabel("quality, %")
    pyplot.legend()
    pyplot.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--figure", type=Path)
    for word in ("mean", "std"):
        parser.add_argument(f"--{word}", type=lambda text: tuple(map(float, text.split(","))))
    args = parser.parse_args()
    source = onnx.load(args.model)
    options: dict[str, object] = {"input_mean": args.mean, "input_std": args.std, "fail_under": -100.0}
    labels = None
    if args.images is None:
        sys.path.insert(0, str(ROOT))
        from tests.fashion_mnist import load as fashion_mnist

        samples, labels = fashion_mnist()
    else:
        graph = Graph(onnx.load(args.model))
        config = onnx_lwdf.Config(input_mean=args.mean, input_std=args.std)
        (spec, *_), _ = read_inputs(graph, config, fold(graph))
        samples = load(args.images, [spec])[spec.name]
    rows = measure(source, samples, labels, options)
    show(rows, sys.stdout.write)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows(
                [("method", "sparsity", "quality", "sqnr_db"), *(vars(r).values() for r in rows)]
            )
    if args.figure:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
