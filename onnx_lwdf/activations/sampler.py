"""From the source's name to samples of every layer's input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from onnx_lwdf.activations.data import load
from onnx_lwdf.activations.inputs import InputSpec
from onnx_lwdf.activations.sources import SOURCES
from onnx_lwdf.activations.taps import CHUNK, Feed, Samples, sample
from onnx_lwdf.config import Config
from onnx_lwdf.errors import OptionError
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Layer
from onnx_lwdf.statistics import Statistics


def synthesize(
    graph: Graph,
    layers: Sequence[Layer],
    tensors: Iterable[str],
    statistics: Statistics,
    chunks: Sequence[Feed],
    config: Config,
) -> Samples:
    """Samples of the inputs of layers and of the values of tensors, from the configured source."""
    rng = np.random.default_rng([config.seed, 1])
    source = SOURCES[config.source]
    return sample(graph.model, layers, tensors, chunks, rng, statistics, source, graph.keep, whole=config.channels > 0)


def draw_chunks(inputs: Sequence[InputSpec], config: Config) -> list[Feed]:
    """The model's input samples in chunks of equal size: drawn, or loaded where the source is a path."""
    fixed = max((spec.batch or 0 for spec in inputs), default=0)
    if config.source == "data":
        samples = load(Path(config.activations_from), inputs)
        count = len(next(iter(samples.values())))
        size = fixed or min(CHUNK, count)
        if count < size:
            raise OptionError(f"{config.activations_from!r} holds {count} samples; the model takes {size} at a time")
        return [
            {name: value[i : i + size] for name, value in samples.items()} for i in range(0, count - size + 1, size)
        ]
    rng = np.random.default_rng([config.seed, 0])
    size = min(CHUNK, config.samples)
    taken = size if any(spec.batch is None for spec in inputs) else min(fixed, size) or size
    chunks = -(-config.samples // taken)
    return [{spec.name: spec.draw(size, rng) for spec in inputs} for _ in range(chunks)]
