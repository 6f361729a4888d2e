"""Every tensor of a site gets the site's grid, and how far grids reach is decided by the noise at the outputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnx_lwdf import calibration
from onnx_lwdf.activations.inputs import read_inputs
from onnx_lwdf.activations.sampler import draw_chunks, synthesize
from onnx_lwdf.calibration import calibrate, grid_noise
from onnx_lwdf.clipping import Clipped
from onnx_lwdf.config import Config
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, find_layers, set_weight, weight_of
from onnx_lwdf.precondition.fold import fold
from onnx_lwdf.ranges import ActivationGrid
from onnx_lwdf.sites import behind_activation, find_sites, shares_passed
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
    return graph, layers, plan, sites, samples, inputs, chunks, config


@pytest.fixture
def unclipped(monkeypatch):
    """Grids as they were searched: what the outputs say of each is `test_clipping.py`'s."""
    monkeypatch.setattr(calibration, "clipped", lambda _graph, _layers, _sites, grids, *_: Clipped(grids, {}))


@pytest.mark.usefixtures("unclipped")
@pytest.mark.parametrize(
    ("bits", "second", "taken"), [(6, 0.99, True), (6, 1.05, True), (6, 1.1, False), (8, 0.99, True), (8, 2.0, True)]
)
def test_grids_reach_further_with_eight_bits_or_where_noise_hardly_grows(parts, bits, second, taken, monkeypatch):
    graph, layers, plan, sites, samples, inputs, feeds, config = parts
    sites = [replace(site, bits=bits) for site in sites]
    ranges = {name: bounds for spec in inputs for name, bounds in spec.ranges.items()}
    searched = calibration._grids(graph, layers, sites, samples, ranges, config, {}, {})
    noises = iter([(1.0, 1.0), (second, 1.0)])
    monkeypatch.setattr(calibration, "grid_noise", lambda *_: next(noises))
    found = calibrate(graph, layers, plan, sites, samples, inputs, feeds, config).grids
    assert found.keys() == {tensor for site in sites for tensor in site.tensors}
    assert (found != searched) is taken
    passed = shares_passed(graph, layers)
    for site in sites:
        grid, before, share = found[site.tensors[0]], searched[site.tensors[0]], passed[site.tensors[0]]
        pooled = bits == 8 and share > 0 and graph.producer[site.tensors[0]].op_type == "GlobalAveragePool"
        width = before.scale * before.levels * (1 + share**2 / 2 if taken and not pooled else 1)
        if site.high is not None:
            width = min(width, site.high)
        # A zero point is a whole number of steps: the range moves by up to one.
        np.testing.assert_allclose(grid.scale * grid.levels, width, atol=1.01 * grid.scale)


@pytest.mark.usefixtures("unclipped")
def test_data_reach_as_far_as_they_reach(parts, monkeypatch):
    graph, layers, plan, sites, samples, inputs, feeds, config = parts
    config = replace(config, activations_from="images")
    monkeypatch.setattr(calibration, "grid_noise", lambda *_: pytest.fail("there is nothing to decide"))
    searched = calibration._grids(
        graph,
        layers,
        sites,
        samples,
        {name: bounds for spec in inputs for name, bounds in spec.ranges.items()},
        config,
        {},
        {},
    )
    assert calibrate(graph, layers, plan, sites, samples, inputs, feeds, config).grids == searched


def test_noise_falls_by_a_factor_of_sixteen_with_steps_of_a_fourth(parts):
    """Fine grids add noise in proportion to their squared step, and none at all where no tensor is quantized."""
    graph, layers, plan, sites, samples, _, feeds, config = parts
    seen = {name: 4 * float(np.abs(values).max()) for name, values in samples.values.items()}  # no clipping

    def noise(levels):
        grids = {}
        for site in sites:
            far = seen[site.tensors[0]]
            grid = ActivationGrid(float(np.float32(2 * far / levels)), levels // 2, bits=8)
            grids.update(dict.fromkeys(site.tensors, grid))
        return grid_noise(graph, layers, plan, sites, grids, samples, feeds, config)[0]

    # Steps of four times the size. A few hundred rounding errors make the ratio vary.
    assert 8 < noise(60) / noise(240) < 32
    free = {name: Bits(6, None) for name in plan}
    assert grid_noise(graph, layers, free, [], {}, samples, feeds, config)[0] < 1e-9  # float32's rounding


def test_layers_are_counted_on_the_longest_way(parts):
    """By hand: three layers, the last two of which a residual sum goes round, then two more."""
    graph, layers, *_ = parts
    passed = {name: round(5 * share, 9) for name, share in shares_passed(graph, layers).items()}
    found = {name: passed[name] for name in ("x", "a2", "c2", "s", "e1", "f", "y")}
    assert found == {"x": 0, "a2": 1, "c2": 2, "s": 3, "e1": 4, "f": 4, "y": 5}


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
