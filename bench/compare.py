#!/usr/bin/env python3
"""onnx-lwdf beside onnxruntime's static quantizer on the same network, in one run.

    python bench/compare.py [MODEL.onnx] [--images DIR --mean R,G,B --std R,G,B] [--rounds 20]

Prints for each file: top-1 agreement with float and SQNR of the outputs, latency as a ratio to float, size, seconds and
peak memory of the whole process that made it, and the integer kernels that run. Without a folder of images, synthetic
images judge (drawn with another seed than those that compression used). onnxruntime's quantizer has no data-free mode:
it calibrates on uniform noise, which is what a user without data gives it.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table

import onnx_lwdf
from onnx_lwdf.activations.data import load
from onnx_lwdf.activations.inputs import InputSpec, read_inputs
from onnx_lwdf.graph import Graph
from onnx_lwdf.precondition.fold import fold

DEFAULT = Path(__file__).parent.parent / "models" / "mobilenetv2-torchvision-bn.onnx"
LEAST_DB = -100.0  # what is bad is shown, too
JUDGED = 128  # synthetic images
CALIBRATED = 32  # noise images for onnxruntime


class _Noise(CalibrationDataReader):
    """Uniform noise over the input's range."""

    def __init__(self, spec: InputSpec) -> None:
        rng = np.random.default_rng(0)
        low, high = spec.normalization.range if spec.normalization else (-1.0, 1.0)
        shape = (1, *spec.shape)
        self.feeds: Iterator[dict[str, np.ndarray]] = iter(
            [{spec.name: rng.uniform(low, high, shape).astype(np.float32)} for _ in range(CALIBRATED)]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


@dataclass(frozen=True)
class Made:
    name: str
    path: Path
    seconds: float
    peak_mib: float


def _ours(source: Path, target: Path, weight: int, activation: int) -> None:
    onnx_lwdf.compress(source, target, weight_bits=weight, activation_bits=activation, force=True, fail_under=LEAST_DB)


def _static(source: Path, target: Path, spec: InputSpec) -> None:
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    kinds = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8}
    quantize_static(prepared, target, _Noise(spec), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)


def _child(
    work: Callable[..., None], args: tuple[object, ...], answers: multiprocessing.Queue[tuple[float, float]]
) -> None:
    start = time.perf_counter()
    work(*args)
    answers.put((time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def make(name: str, path: Path, work: Callable[..., None], *args: object) -> Made:
    """Run the work in a process of its own: its seconds and its peak memory."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_child, args=(work, args, answers))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name} failed")
    return Made(name, path, *answers.get())


def judge(spec: InputSpec, images: Path | None, config: onnx_lwdf.Config) -> np.ndarray:
    if images is not None:
        return load(images, [spec])[spec.name]
    return spec.draw(JUDGED, np.random.default_rng([config.seed, 99]))


def session(path: Path) -> tuple[ort.InferenceSession, collections.Counter[str]]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        opened = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
    return opened, collections.Counter(node.op_type for node in nodes)


def outputs(opened: ort.InferenceSession, name: str, samples: np.ndarray) -> np.ndarray:
    return np.concatenate([opened.run(None, {name: samples[i : i + 8]})[0] for i in range(0, len(samples), 8)])


def latencies(sessions: list[ort.InferenceSession], feed: dict[str, np.ndarray], rounds: int) -> np.ndarray:
    """Seconds [rounds, sessions]; the sessions take turns, so that a drift of the machine meets all."""
    times = np.zeros((rounds + 3, len(sessions)))
    for row in times:
        for k, opened in enumerate(sessions):
            start = time.perf_counter()
            opened.run(None, feed)
            row[k] = time.perf_counter() - start
    return times[3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=DEFAULT)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    for word in ("mean", "std"):
        parser.add_argument(f"--{word}", type=lambda text: tuple(map(float, text.split(","))))
    args = parser.parse_args()
    config = onnx_lwdf.Config(input_mean=args.mean, input_std=args.std)
    graph = Graph(onnx.load(args.model))
    (spec, *_), _ = read_inputs(graph, config, fold(graph))
    samples = judge(spec, args.images, config)
    with tempfile.TemporaryDirectory() as folder:
        made = [Made("float", args.model, 0.0, 0.0)]
        path = Path(folder) / "static.onnx"
        made.append(make("onnxruntime static w8a8", path, _static, args.model, path, spec))
        for weight, activation in ((8, 8), (6, 6), (4, 8)):
            path = Path(folder) / f"w{weight}a{activation}.onnx"
            made.append(make(f"onnx-lwdf w{weight}a{activation}", path, _ours, args.model, path, weight, activation))
        show(made, spec, samples, args.rounds)


def show(made: list[Made], spec: InputSpec, samples: np.ndarray, rounds: int) -> None:
    opened = [session(item.path) for item in made]
    times = latencies([one for one, _ in opened], {spec.name: samples[:1]}, rounds)
    ratios = np.median(times / times[:, :1], axis=0)
    exact = outputs(opened[0][0], spec.name, samples).astype(np.float64)
    title = f"{made[0].path.name}, {len(samples)} images"
    table = Table("file", "agree %", "SQNR dB", "latency / float", "size", "s", "MiB", "integer kernels", title=title)
    for item, (one, kernels), ratio in zip(made, opened, ratios, strict=True):
        answer = outputs(one, spec.name, samples)
        noise = float(((exact - answer) ** 2).sum())
        integer = sum(n for op, n in kernels.items() if op.startswith("QLinear") or op == "QGemm")
        table.add_row(
            item.name,
            f"{100 * (exact.argmax(1) == answer.argmax(1)).mean():.1f}",
            f"{10 * np.log10((exact**2).sum() / noise):.2f}" if noise else "exact",
            f"{ratio:.3f}",
            f"{item.path.stat().st_size / made[0].path.stat().st_size:.3f}",
            f"{item.seconds:.1f}" if item.seconds else "",
            f"{item.peak_mib:.0f}" if item.seconds else "",
            str(integer),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
