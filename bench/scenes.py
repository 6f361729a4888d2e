#!/usr/bin/env python3
"""How well synthetic images meet the statistics that BatchNormalization stored: the judge of activations/images.py.

    python bench/scenes.py NETWORK.onnx ... [--count 32] [--seeds 3]

Images go through the float network as it is. Of every tensor that a BatchNormalization put out, the divergence of each
channel's mean and deviation from the stored ones, as Gaussians, in nats: the median over channels, the mean over
tensors. Once with every part of the images, and once without each of them. No photograph has a say.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx

from onnx_lwdf.activations import images
from onnx_lwdf.config import Config
from onnx_lwdf.graph import Graph
from onnx_lwdf.preparation import prepare
from onnx_lwdf.runtime import copy_of, open_session, run
from onnx_lwdf.statistics import ChannelStatistics, divergence

LEFT_OUT: Mapping[str, Mapping[str, float]] = {
    "all": {},
    "no things": {"OWN_COLOUR": 1.0},
    "no bent outlines": {"BEND": 0.0},
    "no subject": {"FOCUSED": 0.0},
    "no light": {"LIGHT": 0.0},
    "no noise": {"NOISE": 0.0},
    "no grating": {"GRATING": 0.0},
    "bare leaves": {"OWN_COLOUR": 1.0, "BEND": 0.0, "FOCUSED": 0.0, "LIGHT": 0.0, "NOISE": 0.0},
}
BATCH = 16
SMALLEST_SHARE = 1e-4  # of a tensor's median deviation: channels below are dead


def divergences(path: Path, count: int, seeds: int) -> dict[str, float]:
    """Row of LEFT_OUT -> nats, the mean over the seeds."""
    prepared = prepare(onnx.load(path), Config())
    (spec,) = prepared.inputs
    graph = Graph(copy_of(prepared.graph.snapshot()))
    names = list(prepared.statistics)
    graph.set_outputs(names)
    graph.commit()
    session = open_session(graph.model)
    found = {}
    for label, constants in LEFT_OUT.items():
        each = []
        for seed in range(seeds):
            with patch.multiple(images, **{"NOISE": images.NOISE, **constants}):  # it wants one at least
                drawn = spec.draw(count, np.random.default_rng(seed))
            sums = {name: np.zeros((2, len(prepared.statistics[name].mean))) for name in names}
            batches = [drawn[i : i + BATCH] for i in range(0, len(drawn), BATCH)]
            for batch in batches:
                for name, value in zip(names, run(session, {spec.name: batch}, names), strict=True):
                    exact, axes = value.astype(np.float64), (0, *range(2, value.ndim))
                    sums[name] += np.stack([exact.mean(axes), (exact**2).mean(axes)]) / len(batches)
            each.append(np.mean([_divergence(*sums[name], prepared.statistics[name]) for name in names]))
        found[label] = float(np.mean(each))
    return found


def _divergence(mean: np.ndarray, power: np.ndarray, stored: ChannelStatistics) -> float:
    """KL(N(seen) || N(stored)), the median over the channels that are alive."""
    alive = stored.deviation > SMALLEST_SHARE * np.median(stored.deviation)
    deviation = np.sqrt(np.maximum(power - mean**2, 1e-12))
    return float(np.median(divergence(mean[alive], deviation[alive], stored.mean[alive], stored.deviation[alive])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=32, help="images of each seed")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    columns = [divergences(path, options.count, options.seeds) for path in options.networks]
    print("| | " + " | ".join(path.stem for path in options.networks) + " |")
    print("|---|" + "---|" * len(columns))
    for label in LEFT_OUT:
        print(f"| {label} | " + " | ".join(f"{column[label]:.3f}" for column in columns) + " |")


if __name__ == "__main__":
    main()
