"""Grids end earlier where the outputs gain by it, and the noise that says so is that of the whole network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from onnx_lwdf import clipping
from onnx_lwdf.activations.taps import Samples
from onnx_lwdf.clipping import clipped
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import Bits, find_layers
from onnx_lwdf.ranges import ActivationGrid
from onnx_lwdf.sites import find_sites
from tests.nets import residual, with_weights

BITS = 4
FULL = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,2,6,6] x) => (float[N,36] y) {
    a = Conv (x, w0, b0)
    b = Relu (a)
    c = Conv (b, w1, b1)
    d = CLIP
    e = Conv (d, w2, b2)
    y = Flatten (e)
}
"""


def network(clip: str) -> onnx.ModelProto:
    """Behind b a Clip may be full at 1."""
    tensors = {
        "w0": np.eye(2).reshape(2, 2, 1, 1),
        "w1": np.eye(2).reshape(2, 2, 1, 1),
        "w2": np.ones((1, 2, 1, 1)),
        "zero": np.array(0.0),
        "one": np.array(1.0),
    } | {f"b{i}": np.zeros(size) for i, size in enumerate((2, 2, 1))}
    return with_weights(FULL.replace("CLIP", clip), tensors)


def images(count: int = 16) -> dict[str, np.ndarray]:
    """A few values of 10 among many of up to 1: what is cut off of them moves no mean by much."""
    rng = np.random.default_rng(3)
    x = rng.uniform(0, 1, (count, 2, 6, 6)) * rng.uniform(0.5, 1, (count, 1, 1, 1))
    return {"x": np.where(rng.random(x.shape) < 0.005, 10.0, x).astype(np.float32)}


def setting(model: onnx.ModelProto):
    graph = Graph(model)
    layers, _ = find_layers(graph)
    return graph, layers, find_sites(graph, layers, dict.fromkeys((layer.name for layer in layers), Bits(8, BITS)))


def values(model: onnx.ModelProto, names: list[str], feed) -> list[np.ndarray]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    return ReferenceEvaluator(copy).run(names, feed)


def by_channel(value: np.ndarray) -> np.ndarray:
    return np.moveaxis(value, 1, 0).reshape(value.shape[1], -1)


@pytest.mark.parametrize(("clip", "narrower"), [("Clip (c, zero, one)", True), ("Identity (c)", False)])
def test_a_grid_ends_where_a_clip_behind_it_is_full(clip, narrower):
    model, feed = network(clip), images()
    graph, layers, sites = setting(model)
    (site,) = (site for site in sites if site.tensors == ("b",))
    (value,) = values(model, ["b"], feed)
    grid = ActivationGrid(10 / 15, 0, BITS)
    found = clipped(graph, layers, [site], {"b": grid}, Samples({}, {"b": by_channel(value)}), feed).grids["b"]
    # Values above 1 are all 1 behind the Clip: a grid that ends there loses nothing. A mean of all needs them.
    assert (found.scale * found.levels < 5) if narrower else (found == grid)


def test_its_noise_is_that_of_the_whole_network(monkeypatch):
    """The error that a grid makes, added to the tensor by an Add, in the reference evaluator."""
    model = residual()
    feed = {"x": np.random.default_rng(1).normal(0, 1, (16, *shape(model)[1:])).astype(np.float32)}
    graph, layers, sites = setting(model)
    seen: dict[str, float] = {}

    def noted(tail, grid, samples, site, symmetric):
        seen[site.tensors[0]] = tail.noise(grid, samples)
        return grid, 0.0

    monkeypatch.setattr(clipping, "_narrowed", noted)
    names = [site.tensors[0] for site in sites if site.tensors[0] != "x"]
    exact = dict(zip(names, values(model, names, feed), strict=True))
    sites = [site for site in sites if site.tensors[0] in exact]
    grids = {name: ActivationGrid(float(np.float32(np.abs(value).max() / 8)), 8, BITS) for name, value in exact.items()}
    grids |= {other: grids[site.tensors[0]] for site in sites for other in site.tensors}
    samples = Samples({}, {name: by_channel(value) for name, value in exact.items()})
    assert clipped(graph, layers, sites, grids, samples, feed).grids == grids
    assert seen.keys() == set(names)
    assert len(names) > 4
    (plain,) = ReferenceEvaluator(model).run(None, feed)
    for name, noise in seen.items():
        error = grids[name].quantize(exact[name].astype(np.float64)) - exact[name]
        error = error - by_channel(error).mean(1).reshape(1, -1, *[1] * (error.ndim - 2))
        (answer,) = ReferenceEvaluator(with_error(model, name, error)).run(None, feed)
        np.testing.assert_allclose(noise, ((answer - plain) ** 2).sum() / (plain**2).sum(), rtol=1e-3)  # float32


def shape(model: onnx.ModelProto) -> list[int]:
    return [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]


def with_error(model: onnx.ModelProto, tensor: str, error: np.ndarray) -> onnx.ModelProto:
    graph = Graph(onnx.ModelProto.FromString(model.SerializeToString()))
    readers = list(graph.consumers[tensor])
    graph.reroute(readers, tensor, graph.add("Add", [tensor, graph.add_constant("e", error.astype(np.float32))], "e"))
    graph.commit()
    return graph.model


def test_few_samples_are_enough_where_memory_is_small(monkeypatch):
    monkeypatch.setattr(clipping, "VALUES", 1)
    model, feed = network("Clip (c, zero, one)"), images()
    graph, layers, sites = setting(model)
    (value,) = values(model, ["b"], feed)
    grids = {"b": ActivationGrid(10 / 15, 0, BITS)}
    sites = [site for site in sites if site.tensors == ("b",)]
    found = clipped(graph, layers, sites, grids, Samples({}, {"b": by_channel(value)}), feed).grids
    assert found["b"].scale <= grids["b"].scale


def test_grids_stay_where_nothing_can_be_asked():
    model, feed = network("Clip (c, zero, one)"), images()
    graph, layers, sites = setting(model)
    (value,) = values(model, ["b"], feed)
    grids = {"b": ActivationGrid(10 / 15, 0, BITS)}
    (site,) = (site for site in sites if site.tensors == ("b",))
    known = Samples({}, {"b": by_channel(value)})
    assert clipped(graph, layers, [], grids, known, feed).grids == grids
    assert clipped(graph, layers, [site], grids, Samples({}, {}), feed).grids == grids
    assert (
        clipped(graph, layers, [replace(site, tensors=("x",))], grids, Samples({}, {"x": value}), feed).grids == grids
    )
    graph.captured.add("b")  # a node's own graph reads it
    assert clipped(graph, layers, [site], grids, known, feed).grids == grids
