#!/usr/bin/env python3
"""The methods of data-free quantization on one network, over bits: each is a row of our own solver and source tables.

    python bench/methods.py [MODEL.onnx] [--images DIR --mean R,G,B --std R,G,B] [--out FOLDER]

Judges are top-1 agreement with float and SQNR of the outputs, over the images; without a folder of images synthetic ones
judge (drawn with another seed than those that compression used). Writes methods.md and methods.svg into the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import onnx

import onnx_lwdf
from onnx_lwdf import calibration, layerwise, preparation
from onnx_lwdf.activations.data import load
from onnx_lwdf.activations.inputs import InputSpec, read_inputs
from onnx_lwdf.graph import Graph
from onnx_lwdf.precondition import candidates, channels
from onnx_lwdf.precondition.fold import fold
from onnx_lwdf.precondition.transform import Transform
from onnx_lwdf.ranges import F64, ActivationGrid, grid_for
from onnx_lwdf.runtime import open_session, run

DEFAULT = Path(__file__).parent.parent / "models" / "mobilenetv2-torchvision-bn.onnx"
JUDGED = 128  # synthetic images
WIDTHS = ((8, 8), (6, 6), (5, 5), (4, 8), (4, 4))  # bits of weights and activations
STEPS = sys.modules["onnx_lwdf.compress"]

Replacement = tuple[ModuleType, str, Any]  # a step of ours, and what stands in its place


@dataclass(frozen=True)
class Method:
    """Options of `compress`, and the steps of ours that the method does not have."""

    what: str
    options: Mapping[str, Any] = field(default_factory=dict)
    instead: Sequence[Replacement] = ()


def _observed_range(
    values: F64,
    weights: F64,
    bits: int,
    low: float | None = None,
    high: float | None = None,
    symmetric: bool = False,
) -> ActivationGrid:
    """The signature of `search_grid`: from the smallest to the largest sample."""
    least, most = float(values.min()), float(values.max())
    return grid_for(
        least if low is None else max(least, low), most if high is None else min(most, high), bits, symmetric
    )


def _no_correction(weight: F64, stored: F64, mean: F64, stored_mean: F64) -> F64:
    return np.zeros(weight.shape[:2])


def _no_transform(
    graph: Graph, groups: object, plan: object, samples: Any, statistics: Any, gradients: Any, pixels: object
) -> Any:
    return samples, statistics, gradients


def _no_gradients(*_: object) -> Mapping[str, Any]:
    """Without them nothing is weighed at the outputs, and no channel is copied."""
    return {}


def _no_order(graph: object, layers: object, limits: object, samples: object, statistics: object, feed: object) -> Any:
    return layers, samples, statistics


def _no_pixels(graph: object, layers: Sequence[Any], plan: object, inputs: Sequence[Any], config: object) -> Any:
    return layers, inputs


def _not_stretched(group: object, ceiling: float, samples: object, reaches: object) -> list[Transform]:
    return []


def _own_steps(
    graph: object, sites: object, grids: Mapping[str, ActivationGrid], gradients: object, fixed: object
) -> Mapping[str, ActivationGrid]:
    return grids


UNWIDENED: Replacement = (calibration, "REACH", 1.0)
OBSERVED: Sequence[Replacement] = ((calibration, "search_grid", _observed_range), UNWIDENED)
UNCORRECTED: Replacement = (layerwise, "mean_correction", _no_correction)
LOCAL: Replacement = (STEPS, "sensitivities", _no_gradients)
UNORDERED: Replacement = (STEPS, "order_channels", _no_order)
NORMALIZED: Replacement = (preparation, "read_pixels", _no_pixels)
UNSHARED: Replacement = (calibration, "share_steps", _own_steps)
OLDER: Sequence[Replacement] = (LOCAL, UNORDERED, NORMALIZED, UNSHARED)  # than these steps are the methods beside ours
UNTRANSFORMED: Sequence[Replacement] = ((STEPS, "transform_groups", _no_transform), *OLDER)
EQUALIZED: Sequence[Replacement] = (
    (channels, "MOST_CHANNELS", 0),  # of matrix transforms: diagonals remain
    (candidates, "_stretched", _not_stretched),
    *OLDER,
)

ONE_SCALE: Mapping[str, Any] = {"vector_size": 0}  # per output channel: rtn and squant know no other grid

METHODS: Mapping[str, Method] = {
    "nearest": Method(
        "nearest rounding; activation ranges from the smallest to the largest sample",
        {"method": "rtn", "recalibrate": False},
        (*OBSERVED, UNCORRECTED, *UNTRANSFORMED),
    ),
    "DFQ": Method(
        "equalization, nearest rounding, bias correction; Gaussian draws from the statistics give means and ranges",
        {"method": "rtn", "recalibrate": False, "activations_from": "gaussian"},
        (*OBSERVED, *EQUALIZED),
    ),
    "SQuant": Method(
        "roundings flipped until the error sums cancel; Gaussian draws give the ranges",
        {"method": "squant", "recalibrate": False, "activations_from": "gaussian"},
        (*OBSERVED, UNCORRECTED, *UNTRANSFORMED),
    ),
    "paper": Method(
        "equalization, Gaussian draws as layer inputs, each layer solved on them, ranges of least error, bias correction",
        {"recalibrate": False, "activations_from": "gaussian", **ONE_SCALE},
        (UNWIDENED, *EQUALIZED),
    ),
    "ours, one scale": Method("the defaults with one scale per output channel alone", ONE_SCALE),
    "ours": Method("the defaults: below 8 bits runs of 16 inputs have multipliers"),
}


@contextlib.contextmanager
def replaced(steps: Sequence[Replacement]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module, step, other in steps:
            stack.enter_context(mock.patch.object(module, step, other))
        yield


@dataclass(frozen=True)
class Row:
    method: str
    weight: int
    activation: int
    agreement: float  # percent
    sqnr_db: float


def outputs(model: onnx.ModelProto, samples: np.ndarray) -> np.ndarray:
    session = open_session(model)
    name = session.get_inputs()[0].name
    return np.concatenate([run(session, {name: samples[i : i + 8]})[0] for i in range(0, len(samples), 8)])


def measure(source: onnx.ModelProto, samples: np.ndarray, write: Callable[[str], object]) -> list[Row]:
    exact = outputs(source, samples).astype(np.float64)
    rows = []
    for name, method in METHODS.items():
        for weight, activation in WIDTHS:
            with replaced(method.instead):
                done = onnx_lwdf.compress(source, weight_bits=weight, activation_bits=activation, **method.options)
            answer = outputs(done.model, samples)
            decibels = 10 * np.log10(float((exact**2).sum()) / float(((exact - answer) ** 2).sum()))
            same = 100 * float((exact.argmax(1) == answer.argmax(1)).mean())
            rows.append(Row(name, weight, activation, same, float(decibels)))
            write(f"{name:16s} w{weight}a{activation} {same:5.1f} % {decibels:6.2f} dB\n")
    return rows


def text(rows: Sequence[Row], name: str, judges: str) -> str:
    """The Markdown page: the table, and what each method is."""
    widths = [f"W{weight}A{activation}" for weight, activation in WIDTHS]
    lines = [
        "# Methods of data-free quantization beside each other",
        "",
        "Made by `bench/methods.py`: every method is made of this project's own steps, so that only the method differs.",
        f"{name}, {judges}: top-1 agreement with float / SQNR of the outputs. Everywhere integer kernels, pair-safe codes,",
        "one scale per output channel, of least weighted error; first and last layer at 8 bits below W8A8.",
        "",
        f"| method | {' | '.join(widths)} |",
        "|---|" + "---|" * len(widths),
    ]
    for method in METHODS:
        cells = [f"{row.agreement:.1f} % / {row.sqnr_db:.1f} dB" for row in rows if row.method == method]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += ["", "![agreement over bits](methods.svg)", ""]
    lines += [f"- **{method}**: {METHODS[method].what}." for method in METHODS]
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = path.stem  # the same rows give the same bytes
    figure, axis = pyplot.subplots()
    for method in METHODS:
        axis.plot(
            [f"W{row.weight}A{row.activation}" for row in rows if row.method == method],
            [row.agreement for row in rows if row.method == method],
            marker="o",
            label=method,
        )
    axis.set_ylabel("top-1 agreement with float, %")
    axis.set_ylim(0, 100)
    axis.legend()
    figure.savefig(path, metadata={"Date": None})


def judges_of(spec: InputSpec, images: Path | None) -> tuple[np.ndarray, str]:
    if images is not None:
        samples = load(images, [spec])[spec.name]
        return samples, f"{len(samples)} images"
    return spec.draw(JUDGED, np.random.default_rng(99)), f"{JUDGED} synthetic images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    for word in ("mean", "std"):
        parser.add_argument(f"--{word}", type=lambda text: tuple(map(float, text.split(","))))
    args = parser.parse_args()
    source = onnx.load(args.model)
    graph = Graph(onnx.load(args.model))
    config = onnx_lwdf.Config(input_mean=args.mean, input_std=args.std)
    (spec, *_), _ = read_inputs(graph, config, fold(graph))
    samples, judges = judges_of(spec, args.images)
    rows = measure(source, samples, sys.stderr.write)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "methods.md").write_text(text(rows, args.model.stem, judges), encoding="utf-8")
    draw(rows, args.out / "methods.svg")


if __name__ == "__main__":
    main()
