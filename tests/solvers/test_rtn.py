from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnx_lwdf.solvers import rtn

from . import random_problem


def test_every_code_is_the_nearest_one() -> None:
    problem = random_problem(1, groups=2, bits=3)
    answer = rtn.solve(problem)
    codes = answer.rounding.codes.astype(np.float64)
    assert (codes.max(-1) - codes.min(-1)).max() == 7  # eight codes in a row
    every = codes.min(-1, keepdims=True) + np.arange(8)  # of the channels that use the smallest; the others need fewer
    errors = np.abs(problem.weight[..., None] - every[:, :, None] * answer.rounding.scale[..., None, None])
    used = (codes.max(-1, keepdims=True) - every >= 0)[:, :, None]
    least = errors.min(-1, where=used, initial=np.inf)
    np.testing.assert_allclose(np.abs(problem.weight - answer.weight), least, rtol=1e-12)


def test_important_inputs_choose_the_scale() -> None:
    """With all the importance on one weight, that weight is met exactly."""
    problem = random_problem(1, out=1, bits=4)
    importance = np.full(problem.weight.shape[2], 1e-6)
    importance[3] = 1.0
    answer = rtn.solve(replace(problem, hessian=np.diag(importance)[None]))
    errors = np.abs(problem.weight - answer.weight)[0, 0]
    assert errors[3] < 0.02 * answer.rounding.scale[0, 0]
