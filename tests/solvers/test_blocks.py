"""Inputs in blocks: a problem of several groups that share the scales of their output channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from onnx_lwdf.solvers import SOLVERS
from onnx_lwdf.solvers.problem import LayerProblem, apart, channel_loss, summed, together

GROUPS, OUT, BLOCKS, WIDTH = 2, 5, 3, 8


def block_diagonal(hessian: np.ndarray) -> np.ndarray:
    """[groups * blocks, width, width] -> [groups, in, in] with zeros between blocks."""
    whole = np.zeros((GROUPS, BLOCKS * WIDTH, BLOCKS * WIDTH))
    for group in range(GROUPS):
        for block in range(BLOCKS):
            place = slice(block * WIDTH, (block + 1) * WIDTH)
            whole[group, place, place] = hessian[group * BLOCKS + block]
    return whole


def problems(bits: int | None = 4, **options: object) -> tuple[LayerProblem, LayerProblem]:
    """The same problem with H whole, and in blocks."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((GROUPS, OUT, BLOCKS * WIDTH))
    root = rng.standard_normal((GROUPS * BLOCKS, WIDTH, 2 * WIDTH))
    hessian = root @ root.swapaxes(1, 2)
    floor = rng.uniform(0, 0.02, (GROUPS, OUT))
    whole = LayerProblem(weight, block_diagonal(hessian), bits, floor, **options)
    blocked = replace(
        whole,
        weight=apart(weight, BLOCKS),
        hessian=hessian,
        scale_floor=np.repeat(floor, BLOCKS, axis=0),
        blocks=BLOCKS,
    )
    return whole, blocked


def test_together_undoes_apart_and_blocks_are_neighbours():
    weight = np.arange(GROUPS * OUT * BLOCKS * WIDTH, dtype=float).reshape(GROUPS, OUT, -1)
    parts = apart(weight, BLOCKS)
    np.testing.assert_array_equal(parts[BLOCKS + 1], weight[1, :, WIDTH : 2 * WIDTH])
    np.testing.assert_array_equal(together(parts, BLOCKS), weight)


def test_losses_of_blocks_add_up_to_that_of_the_whole():
    whole, blocked = problems()
    losses = channel_loss(blocked.weight, np.zeros_like(blocked.weight), blocked.hessian)
    expected = channel_loss(whole.weight, np.zeros_like(whole.weight), whole.hessian)
    np.testing.assert_allclose(summed(losses, BLOCKS), expected, rtol=1e-12)
    np.testing.assert_allclose(blocked.over_blocks(losses)[::BLOCKS], expected, rtol=1e-12)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", SOLVERS)
def test_blocks_share_one_scale(method, bits):
    rounding = SOLVERS[method].solve(problems(bits, pair_limit=128 if bits == 8 else None)[1]).rounding
    scale = rounding.scale.reshape(GROUPS, BLOCKS, OUT)
    np.testing.assert_array_equal(scale, np.repeat(scale[:, :1], BLOCKS, axis=1))
    joined = together(rounding.codes, BLOCKS).astype(int)
    assert np.ptp(joined, axis=-1).max() < 2**bits  # one range of codes, wherever it lies


def test_nearest_rounding_is_the_same_in_blocks():
    whole, blocked = (SOLVERS["rtn"].solve(problem) for problem in problems())
    np.testing.assert_array_equal(together(blocked.rounding.codes, BLOCKS), whole.rounding.codes)
    np.testing.assert_array_equal(blocked.rounding.scale[::BLOCKS], whole.rounding.scale)
    assert blocked.loss == pytest.approx(whole.loss)


@pytest.mark.parametrize("method", ["gptq", "descent"])
def test_second_order_rounding_loses_nothing_by_blocks_where_nothing_correlates_between_them(method):
    """Columns are visited in another order, and H is damped block by block: another optimum, as good within a tenth."""
    whole, blocked = (SOLVERS[method].solve(problem).loss for problem in problems())
    assert blocked == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("method", ["obs", "magnitude"])
@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"nm": (2, 4)}])
def test_zeros_are_counted_over_all_blocks(method, options):
    solution = SOLVERS[method].solve(problems(None, **options)[1])
    weight = together(solution.weight, BLOCKS)
    assert np.count_nonzero(weight == 0) == weight.size // 2
    if "nm" in options:
        assert (np.count_nonzero(weight.reshape(-1, 4), axis=1) == 2).all()
