"""Against sums that are written out, chunk by chunk."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lwdf.activations.moments import UNKNOWN_DOUBT, Moments, Sums

GROUPS, INPUTS, POSITIONS = 2, 20, 500


def chunks(count: int, shared: float, seed: int = 0) -> list[np.ndarray]:
    """[groups, in, positions] each; `shared` of a channel's deviation is common to all channels of its group."""
    rng = np.random.default_rng(seed)
    common, own = (rng.standard_normal((count, GROUPS, size, POSITIONS)) for size in (1, INPUTS))
    values = 3 + shared * common + (1 - shared) * own
    return list(values)


def summed(values: list[np.ndarray]) -> Moments:
    parts = [(x.mean(2), x @ x.swapaxes(1, 2) / x.shape[2]) for x in values]
    sums = Sums(*parts[0])
    for part in parts[1:]:
        sums.add(*part)
    return sums.moments()


def test_mean_and_second_moments_are_those_of_all_positions():
    values = chunks(4, 0.5)
    found, whole = summed(values), np.concatenate(values, axis=2)
    np.testing.assert_allclose(found.mean, whole.mean(2), rtol=1e-12)
    np.testing.assert_allclose(found.hessian, np.einsum("gip,gjp->gij", whole, whole) / whole.shape[2], rtol=1e-12)


def test_variances_are_whole_and_covariances_lack_the_share_of_chance():
    found = Moments(np.array([[1.0, 2.0]]), np.array([[[2.0, 3.0], [3.0, 8.0]]]), np.array([0.25]))
    np.testing.assert_allclose(found.covariance, [[[1.0, 0.75], [0.75, 4.0]]])


def test_variances_are_never_negative():
    found = Moments(np.array([[1.0]]), np.array([[[1 - 1e-9]]]), np.array([0.0]))
    assert found.covariance[0, 0, 0] == 0


@pytest.mark.parametrize(("shared", "least", "most"), [(0.0, 0.5, 1.0), (0.9, 0.0, 0.01)])
def test_unrelated_channels_correlate_by_chance_and_related_ones_do_not(shared, least, most):
    """Squares of means of chance alone are their variance, give or take a sixth over 190 pairs; shared ones leave no doubt."""
    assert all(least <= doubt <= most for doubt in summed(chunks(8, shared)).doubt)


def test_doubt_is_the_variance_of_the_mean_correlations_between_chunks_to_their_squares():
    """Covariances within chunks, in units of the first chunk's deviations, off the diagonal (Schaefer and Strimmer, 2005)."""
    values = chunks(5, 0.1)
    whole_mean = [x.mean(2, keepdims=True) for x in values]
    within = np.stack([(x - m) @ (x - m).swapaxes(1, 2) / POSITIONS for x, m in zip(values, whole_mean, strict=True)])
    deviation = np.sqrt(np.einsum("gii->gi", within[0]))
    correlations = within / (deviation[:, :, None] * deviation[:, None, :])
    off = ~np.eye(INPUTS, dtype=bool)
    chance = correlations[:, :, off].var(0, ddof=1).sum(1) / len(values)
    expected = np.clip(chance / (correlations.mean(0)[:, off] ** 2).sum(1), 0, 1)
    np.testing.assert_allclose(summed(values).doubt, expected, rtol=1e-9)


def test_a_single_chunk_tells_nothing_of_chance():
    np.testing.assert_array_equal(summed(chunks(1, 0.5)).doubt, UNKNOWN_DOUBT)


def test_an_input_that_does_not_vary_has_no_part_in_the_doubt():
    values = chunks(4, 0.5)
    plain = summed(values).doubt
    still = [np.concatenate([x, np.full((GROUPS, 1, POSITIONS), 7.0)], axis=1) for x in values]
    np.testing.assert_allclose(summed(still).doubt, plain, rtol=1e-9)
