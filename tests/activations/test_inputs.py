"""The input's normalization comes out of the first BatchNormalization's stored statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_lwdf.activations.images import scenes
from onnx_lwdf.activations.inputs import find_inputs, read_inputs
from onnx_lwdf.activations.normalization import CONVENTIONS, ESTIMATED, Normalization
from onnx_lwdf.activations.sampler import draw_chunks
from onnx_lwdf.config import Config
from onnx_lwdf.errors import OptionError
from onnx_lwdf.graph import Graph
from onnx_lwdf.precondition.fold import fold
from tests.nets import residual, trained, with_weights

MODELS = Path(__file__).parent.parent.parent / "models"


def read(model, **options):
    graph = Graph(model)
    statistics = fold(graph)
    (spec,), warnings = read_inputs(graph, Config(**options), statistics)
    return spec, warnings


def trained_with(normalization: Normalization, layout: str = "NCHW") -> onnx.ModelProto:
    """A first layer whose BatchNormalization stored what images of this normalization give."""
    rng = np.random.default_rng(5)
    weight = rng.normal(0, 0.5, (24, 3, 3, 3))
    images = normalization.apply(scenes(128, 3, 32, 32, np.random.default_rng(99)))
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(2, 3))  # [N, C, H, W, 3, 3]
    output = np.einsum("ncyxij,ocij->noyx", windows, weight)
    tensors = {
        "w": weight,
        "g": np.ones(24),
        "b": np.zeros(24),
        "m": output.mean((0, 2, 3)),
        "v": output.var((0, 2, 3)),
        "w2": rng.normal(size=(4, 24, 1, 1)),
    }
    shape, first = ("N,3,32,32", "") if layout == "NCHW" else ("N,32,32,3", "t = Transpose <perm = [0,3,1,2]> (x)")
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[{shape}] x) => (float[N,4,30,30] y) {{
        {first}
        a = Conv ({"t" if first else "x"}, w)
        b1 = BatchNormalization (a, g, b, m, v)
        r = Relu (b1)
        y = Conv (r, w2)
    }}
    """
    return with_weights(text, tensors)


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda c: c.name)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_every_convention_is_recognized(convention, layout):
    spec, warnings = read(trained_with(convention, layout))
    assert spec.normalization == convention
    assert spec.inferred
    assert spec.channels_last == (layout == "NHWC")
    assert not warnings


def test_an_unknown_normalization_is_estimated():
    odd = Normalization("odd", (60.0, 90.0, 120.0), (20.0, 20.0, 20.0))
    spec, _ = read(trained_with(odd))
    assert spec.normalization is not None
    assert spec.normalization.name == ESTIMATED
    np.testing.assert_allclose(spec.normalization.mean, odd.mean, atol=15)
    np.testing.assert_allclose(spec.normalization.std, odd.std, rtol=0.2)
    assert spec.normalization.range[0] <= odd.range[0]  # a generous range: no real pixel may be cut off
    assert spec.normalization.range[1] >= odd.range[1]


def test_real_networks():
    spec, _ = read(onnx.load(MODELS / "mobilenetv2-torchvision-bn.onnx"))
    assert spec.normalization == CONVENTIONS[0]
    spec, _ = read(onnx.load(MODELS / "fmnist-mbv2-bn.onnx"))
    assert spec.normalization is not None
    assert spec.normalization.name == ESTIMATED
    low, high = spec.normalization.range
    assert low <= (0 - 0.2860) / 0.3530  # the true range of Fashion-MNIST's pixels
    assert high >= (1 - 0.2860) / 0.3530


def test_without_batchnorm_the_assumption_is_said():
    spec, warnings = read(onnx.load(MODELS / "fmnist-mbv2-folded.onnx"))
    assert not spec.inferred
    assert "--input-mean" in warnings[0]


@pytest.mark.parametrize("convention", CONVENTIONS[:2], ids=lambda c: c.name)
def test_a_folded_bottleneck_tells_what_to_assume(convention):
    """Trained with either convention, then folded: the bias fits the right one, and the wrong one does not fit it."""
    images = convention.apply(scenes(96, 3, 96, 96, np.random.default_rng(99)))
    rng = np.random.default_rng(3)
    shapes = {"w0": (16, 3, 3, 3), "b0": (16,), "w1": (16, 16, 1, 1), "w2": (4, 16, 1, 1), "w3": (4, 4, 1, 1)}
    tensors = {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()}
    tensors |= {"gamma": np.ones(16), "beta": np.zeros(16), "mean": np.zeros(16), "variance": np.ones(16)}
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,96,96] x) => (float[N,4,94,94] y) {
        a = Conv (x, w0, b0)
        r = Relu (a)
        c = Conv (r, w1)
        p = BatchNormalization (c, gamma, beta, mean, variance)
        e = Conv (p, w2)
        q = Relu (e)
        y = Conv (q, w3)
    }
    """
    graph = Graph(trained(with_weights(text, tensors), {"x": images}))
    fold(graph)
    (spec,), warnings = read_inputs(graph, Config(), {})
    assert spec.normalization == convention
    assert not spec.inferred
    assert f"assumed {convention.name}" in warnings[0]


@pytest.mark.parametrize(("mean", "std"), [((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)), ((72.93,), (90.015,))])
def test_images_have_the_mean_and_deviation_that_are_given(mean, std):
    """Within a quarter: black and white end what would be darker or brighter, which here lifts the mean by 0.2."""
    spec, _ = read(residual(), input_mean=mean, input_std=std)
    images = spec.draw(128, np.random.default_rng(0))
    np.testing.assert_allclose(images.mean((0, 2, 3)), 0, atol=0.25)
    np.testing.assert_allclose(images.std((0, 2, 3)), 1, atol=0.25)
    low, high = spec.normalization.range
    assert low - 1e-5 <= images.min() < images.max() <= high + 1e-5


@pytest.mark.parametrize(
    ("mean", "std"), [((0.0,), (255.0,)), ((127.5,), (127.5,)), ((103.939, 116.779, 123.68), (1.0,) * 3)]
)
def test_what_no_pixels_have_is_not_taken_for_the_mean_and_deviation_of_a_dataset(mean, std):
    """Nor do images change that are no synthetic ones."""
    spec, _ = read(residual(), input_mean=mean, input_std=std)
    images = scenes(4, *spec.chw, np.random.default_rng(0))
    np.testing.assert_array_equal(spec.draw(4, np.random.default_rng(0)), spec.place(images))
    dataset, _ = read(residual(), input_mean=(72.93,), input_std=(90.015,))
    np.testing.assert_allclose(dataset.place(images), (255 * images - 72.93) / 90.015, atol=1e-5)


def test_given_normalization_wins():
    spec, warnings = read(residual(), input_mean=(10.0,), input_std=(2.0,))
    assert spec.normalization == Normalization("given", (10.0,), (2.0,))
    assert not warnings
    spec, _ = read(residual(), input_range=(-2.0, 3.0))
    assert spec.normalization is not None
    np.testing.assert_allclose(spec.normalization.range, (-2, 3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_shape": {"q": (1, 3, 8, 8)}}, "no input"),
        ({"input_shape": {"x": (1, 3, 8)}}, "3 dimensions"),
        ({"input_mean": (1.0, 2.0), "input_std": (1.0, 1.0)}, "2 values"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(OptionError, match=words):
        read(residual(), **options)


def test_initializers_of_a_real_file_are_not_touched_by_reading():
    model = onnx.load(MODELS / "fmnist-mbv2-bn.onnx")
    before = numpy_helper.to_array(model.graph.initializer[0]).copy()
    graph = Graph(model)
    read_inputs(graph, Config(), {})
    np.testing.assert_array_equal(numpy_helper.to_array(model.graph.initializer[0]), before)


def test_sizes_that_are_open():
    """By name, left out, or written as -1; the channels are those of the layer that reads them."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,C,H,W] x) => (float[N,4,P,Q] y) { y = Conv (x, w) }
    """
    model = with_weights(text, {"w": np.ones((4, 1, 3, 3))})
    for size in ("N", None, -1):
        dims = model.graph.input[0].type.tensor_type.shape.dim
        for dim in dims:
            dim.Clear()
            if size is not None:
                setattr(dim, "dim_param" if size == "N" else "dim_value", size)
        (spec,) = find_inputs(Graph(model), Config())
        assert (spec.shape, spec.batch) == ((1, 224, 224), None)


@pytest.mark.parametrize("width", [1, 3])
def test_a_series_is_no_image_with_its_channels_last(width):
    """The layer that reads it tells where the channels are."""
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,16,64,{width}] x) => (float y) {{ y = Conv (x, w) }}
    """
    (spec,) = find_inputs(Graph(with_weights(text, {"w": np.ones((4, 16, 3, 1))})), Config())
    assert not spec.image
    assert not spec.channels_last


WHOLE = """
<ir_version: 8, opset_import: ["" : 17]>
net ({kind}[N,{shape}] x) => (float y) {{
    f = Cast <to = 1> (x)
    y = Identity (f)
}}
"""


@pytest.mark.parametrize(
    ("kind", "shape", "image", "low", "high", "warned"),
    [
        ("uint8", "3,16,16", True, 0, 255, False),
        ("uint8", "4,16,16", True, 0, 255, False),  # with transparency
        ("uint8", "16,16,4", True, 0, 255, False),
        ("int32", "16,16,3", True, 0, 255, False),
        ("int8", "3,16,16", True, -128, 127, False),
        ("int64", "1,16,16", False, 1, 1, True),  # a mask?
        ("uint8", "16,16", False, 0, 255, True),
        ("int8", "2,8,8", False, -128, 127, True),
    ],
)
def test_integers_are_pixels_where_they_can_be(kind, shape, image, low, high, warned):
    spec, warnings = read(onnx.parser.parse_model(WHOLE.format(kind=kind, shape=shape)))
    values = spec.draw(32, np.random.default_rng(0))
    assert values.dtype == np.dtype(kind)
    assert values.shape == (32, *map(int, shape.split(",")))
    assert (spec.image, bool(warnings)) == (image, warned)
    reach = 0.05 * (high - low)
    assert low <= values.min() <= low + reach
    assert high - reach <= values.max() <= high
    given, warnings = read(onnx.parser.parse_model(WHOLE.format(kind=kind, shape=shape)), input_range=(3.0, 9.0))
    assert not warnings
    assert set(np.unique(given.draw(32, np.random.default_rng(0)))) == set(range(3, 10))


SOUND = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,12,40] x) => (float[N,16,38] y) {
    a = Conv (x, w)
    y = BatchNormalization (a, g, b, m, v)
}
"""


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 5000.0), (-40.0, 20.0), (0.0, 0.05), (0.0, 1.0), (0.5, 1.5)])
def test_how_far_an_input_reaches_that_is_no_image(mean, deviation, smooth):
    """Sound of any scale: what the first BatchNormalization stored holds it."""
    rng = np.random.default_rng(0)
    tensors = {"w": rng.normal(0, 0.3, (16, 12, 3)), "g": np.ones(16), "b": np.zeros(16)}
    model = with_weights(SOUND, tensors | {"m": np.zeros(16), "v": np.ones(16)})
    values = rng.standard_normal((64, 12, 40))
    if smooth:
        values = np.repeat(values[:, :, :10], 4, axis=2)
    feeds = {"x": (mean + deviation * values).astype(np.float32)}
    spec, (warning,) = read(trained(model, feeds))
    drawn = spec.draw(64, rng)
    if abs(mean) < 1 and 0.5 < deviation < 2:
        assert spec.normalization is None
        assert "standard normal" in warning
    else:
        low, high = spec.normalization.range
        assert low < mean - 2 * deviation < mean + 2 * deviation < high
        assert high - low < 30 * deviation
        assert abs(drawn.mean() - mean) < 2 * deviation
        assert deviation / 2 < drawn.std() < 5 * deviation
    assert "give --input-range" in warning


def test_a_second_input_does_not_hide_how_the_image_is_normalized():
    """As detectors have: a threshold, or a scale, that comes in behind."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,3,16,16] x, float[1] threshold) => (float[N,8,14,14] y) {
        a = Conv (x, w)
        n = BatchNormalization (a, g, b, m, v)
        y = Mul (n, threshold)
    }
    """
    rng = np.random.default_rng(0)
    tensors = {"w": rng.normal(0, 0.3, (8, 3, 3, 3)), "g": np.ones(8), "b": np.zeros(8), "m": np.zeros(8)}
    model = with_weights(text, tensors | {"v": np.ones(8)})
    pixels = 255 * scenes(64, 3, 16, 16, rng)
    graph = Graph(trained(model, {"x": pixels, "threshold": np.ones(1, np.float32)}))
    specs, warnings = read_inputs(graph, Config(), fold(graph))
    assert specs[0].normalization.name == "zero to 255"
    (warning,) = warnings
    assert "'threshold' is not an image" in warning
    assert "--input-range" not in warning  # which would be the image's too
    chunks = draw_chunks(specs, Config(samples=64))
    assert [len(chunk["x"]) for chunk in chunks] == [16] * 4
