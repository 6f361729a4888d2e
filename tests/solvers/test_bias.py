from __future__ import annotations

import numpy as np

from onnx_lwdf.solvers.bias import mean_correction


def test_the_corrected_layer_has_the_float_layers_mean_output() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 4, 5))
    stored = np.rint(weight * 2) / 2
    inputs = rng.exponential(size=(3, 5, 200))  # [groups, in, samples]
    rounded = np.rint(inputs * 3) / 3
    correction = mean_correction(weight, stored, inputs.mean(-1), rounded.mean(-1))
    assert correction.shape == (3, 4)
    corrected = stored @ rounded + correction[..., None]
    np.testing.assert_allclose(corrected.mean(-1), (weight @ inputs).mean(-1), rtol=1e-12)


def test_nothing_changed_needs_no_correction() -> None:
    weight, mean = np.ones((2, 3, 4)), np.arange(8.0).reshape(2, 4)
    assert not mean_correction(weight, weight, mean, mean).any()
