from __future__ import annotations

import numpy as np

from onnx_lwdf.solvers.problem import Rounding, channel_loss, solution

from . import loss_by_definition, random_problem


def test_the_loss_is_the_mean_squared_output_error() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, 5, 300))  # [groups, in, samples]
    weight, stored = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 5))
    hessian = inputs @ inputs.swapaxes(1, 2) / 300
    expected = (((weight - stored) @ inputs) ** 2).mean(-1)
    np.testing.assert_allclose(channel_loss(weight, stored, hessian), expected, rtol=1e-9)


def test_a_solution_stores_codes_times_scale() -> None:
    problem = random_problem(0, groups=2)
    codes, scale = np.rint(problem.weight * 2), np.full((2, 4), 0.5)
    answer = solution(problem, Rounding(codes.astype(np.int8), scale), ("why",))
    np.testing.assert_array_equal(answer.weight, codes * 0.5)
    np.testing.assert_allclose(answer.loss, loss_by_definition(problem.weight, codes * 0.5, problem.hessian).sum())
    assert answer.notes == ("why",)
