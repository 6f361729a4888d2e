"""Every tensor of a site gets the site's grid, and the power of the error is chosen by the noise at the outputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnx_lwdf import calibration
from onnx_lwdf.activations.inputs import read_inputs
from onnx_lwdf.activations.sampler import draw_chunks, synthesize
from onnx_lwdf.calibration import calibrate, grid_noise
from onnx_lwdf.config import Config
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, find_layers, set_weight, weight_of
from onnx_lwdf.precondition.fold import fold
from onnx_lwdf.ranges import ActivationGrid
from onnx_lwdf.sites import behind_activation, find_sites
from tests.nets import residual


@pytest.fixture(scope="module")
def parts():
    graph = Graph(residual())
    statistics = fold(graph)
    layers, _ = find_layers(graph)
    config = Config(weight_bits=6, activation_bits=6, samples=32)
    plan = dict.fromkeys((layer.name for layer in layers), Bits(6, 6))
    sites = find_sites(graph, layers, plan)
    inputs, _ = read_inputs(graph, config, statistics)
    chunks = draw_chunks(inputs, config)
    tensors = [*(layer.input for layer in layers), *(site.tensors[0] for site in sites)]
    samples = synthesize(graph, layers, tensors, statistics, chunks, config)
    return graph, layers, plan, sites, samples, inputs, chunks[0], config


@pytest.mark.parametrize(
    ("bits", "second", "taken"),
    [(6, 0.89, 3.0), (6, 0.91, 2.0), (6, 1.1, 2.0), (8, 0.89, 3.0), (8, 1.1, 3.0), (8, 1.12, 2.0)],
)
def test_the_power_is_chosen_by_the_noise(parts, bits, second, taken, monkeypatch):
    """A wider range for the unbounded tensors unless that leaves clearly more noise; below 8 bits, if clearly less."""
    graph, layers, plan, sites, samples, inputs, feed, config = parts
    sites = [replace(site, bits=bits) for site in sites]
    free = [site for site in sites if site.low is None and site.high is None]
    answers = {2.0: calibration._grids(graph, layers, sites, samples, inputs, config, 2.0, {}, {})}
    answers[3.0] = answers[2.0] | calibration._grids(graph, layers, free, samples, inputs, config, 3.0, {}, {})
    noises = iter([(1.0, 1.0), (second, 1.0)])
    monkeypatch.setattr(calibration, "grid_noise", lambda *_: next(noises))
    found = calibrate(graph, layers, plan, sites, samples, inputs, feed, config)
    assert found == answers[taken]
    assert found.keys() == {tensor for site in sites for tensor in site.tensors}
    bounded = {tensor for site in sites if site.low is not None for tensor in site.tensors}
    assert all(found[name] == answers[2.0][name] for name in bounded)
    inner = found.keys() - bounded - {spec.name for spec in inputs}
    assert any(answers[3.0][name].scale > answers[2.0][name].scale for name in inner)


def test_noise_falls_by_a_factor_of_sixteen_with_steps_of_a_fourth(parts):
    """Fine grids add noise in proportion to their squared step, and none at all where no tensor is quantized."""
    graph, layers, plan, sites, samples, _, feed, config = parts
    seen = {name: 4 * float(np.abs(values).max()) for name, values in samples.values.items()}  # no clipping

    def noise(levels):
        grids = {}
        for site in sites:
            far = seen[site.tensors[0]]
            grid = ActivationGrid(float(np.float32(2 * far / levels)), levels // 2, bits=8)
            grids.update(dict.fromkeys(site.tensors, grid))
        return grid_noise(graph, layers, plan, sites, grids, samples, feed, config)[0]

    # Steps of four times the size. A few hundred rounding errors make the ratio vary.
    assert 8 < noise(60) / noise(240) < 32
    free = {name: Bits(6, None) for name in plan}
    assert grid_noise(graph, layers, free, [], {}, samples, feed, config)[0] < 1e-9  # float32's rounding


@pytest.mark.parametrize("scaled", ["c2", "a2"])
def test_importance_knows_no_scale(parts, scaled):
    """Behind a Relu or Clip a channel's scale is free: rows times f, columns behind divided by f, values times f."""
    graph, layers, _, _, samples, *_ = parts
    writer = next(layer for layer in layers if behind_activation(graph, layer.output) == scaled)
    reader = next(layer for layer in layers if layer.input == scaled)
    before = weighted(graph, layers, writer, samples)
    twin = Graph(graph.snapshot())
    factor = np.geomspace(0.25, 4, len(samples.values[scaled]))
    twins = {layer.name: layer for layer in find_layers(twin)[0]}
    set_weight(twin, twins[writer.name], weight_of(graph, writer) * factor.reshape(writer.groups, -1, 1))
    columns = np.tile(factor.reshape(reader.groups, 1, -1), (1, 1, reader.kernel_size))
    set_weight(twin, twins[reader.name], weight_of(graph, reader) / columns)
    after = weighted(twin, list(twins.values()), twins[writer.name], samples)
    np.testing.assert_allclose(after / after.sum(), before / before.sum(), rtol=1e-5, atol=1e-9)  # float32 weights


def weighted(graph, layers, layer, samples):
    return weight_of(graph, layer) ** 2 * calibration._importance(graph, layers, layer, samples)
