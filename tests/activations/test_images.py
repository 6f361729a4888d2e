import numpy as np
import pytest

from onnx_lwdf.activations import images
from onnx_lwdf.activations.images import scenes


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (5, 90), (1, 40), (1, 1)])
def test_scenes_are_images(height, width):
    made = scenes(3, 2, height, width, rng())
    assert made.shape == (3, 2, height, width)
    assert made.dtype == np.float32
    assert made.min() >= 0
    assert made.max() <= 1
    np.testing.assert_array_equal(made, scenes(3, 2, height, width, rng()))


def test_scenes_have_a_falling_spectrum():
    made = scenes(8, 3, 64, 64, rng())
    power = np.abs(np.fft.rfft(made - made.mean(axis=-1, keepdims=True), axis=-1)).mean((0, 1, 2)) ** 2
    slope = np.polyfit(np.log(np.arange(2, 24)), np.log(power[2:24]), 1)[0]
    assert -3 < slope < -1  # photographs: about -2


def test_scenes_have_few_large_steps_among_many_small_ones():
    """Neighbouring pixels of photographs differ by far less than a Gaussian field's: the kurtosis of a Gaussian is 3."""
    step = np.diff(scenes(8, 1, 96, 96, rng()), axis=-1)
    assert (step**4).mean() / (step**2).mean() ** 2 > 6


def test_the_topmost_shape_is_the_last_that_covers_a_pixel():
    centre, reach = rng(1).random((40, 2)) * (12, 17), rng(2).uniform(0.5, 4, (40, 2))
    expected = np.zeros((12, 17), int)
    for row in range(12):
        for column in range(17):
            for i in range(40):
                if (((np.array([row, column]) - centre[i]) / reach[i]) ** 2).sum() <= 1:
                    expected[row, column] = i
    np.testing.assert_array_equal(images._topmost(12, 17, centre, reach), expected)


def test_large_images_have_larger_shapes_in_place_of_more():
    """Twice the side, as many edges along a row; with shapes of the same sizes there would be twice as many."""
    assert _edges(640) < 1.5 * _edges(320)


def _edges(side):
    return np.count_nonzero(np.abs(np.diff(images._leaves((1, side, side), rng()))) > 0.1) / side


def test_a_blur_is_a_gaussian():
    image = np.zeros((1, 33, 47))
    image[0, 16, 23] = 1
    row, column = np.mgrid[:33, :47]
    exact = np.exp(-((row - 16) ** 2 + (column - 23) ** 2) / (2 * 2.5**2)) / (2 * np.pi * 2.5**2)
    np.testing.assert_allclose(images._blurred(image, 2.5)[0], exact, atol=1e-6)  # sampled and periodic: 1e-8 apart


def test_a_field_has_no_mean_and_a_unit_deviation():
    field = images._field(40, 50, 5.0, rng())
    assert abs(field.mean()) < 1e-9
    assert field.std() == pytest.approx(1)
    assert np.abs(np.diff(field)).max() < 1  # smooth: white noise has steps of several deviations
