"""Sparse storage: gaps against a walk through the weight, rebuilt values against what went in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lwdf.emit import dense, packed, sparse, sparse_initializer
from onnx_lwdf.emit.stored import Store
from tests.emit.rebuilding import kernels, rebuild


def pruned(shape: tuple[int, ...], density: float, bits: int) -> np.ndarray:
    """Codes of these bits, or floats at 32 bits, of which a share is not zero."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=shape) if bits == 32 else rng.integers(1, 2 ** (bits - 1), shape)
    return np.where(rng.random(shape) < density, values, 0).astype(np.float32 if bits == 32 else np.int8)


@given(st.lists(st.tuples(st.integers(0, 1100), st.integers(-127, 127)), max_size=8))
@settings(max_examples=100, deadline=None)
def test_gaps_lead_to_every_value(runs):
    flat = np.array([code for zeros, value in runs for code in [0] * zeros + [value]] or [0], np.int8)
    steps, kept = sparse.gaps(flat)
    walked, place = np.zeros_like(flat), 0
    for number, (step, value) in enumerate(zip(steps.tolist(), kept.tolist(), strict=True)):
        assert step > 0 or number == 0, "an index twice has no defined result"
        place += step
        walked[place] = value
    np.testing.assert_array_equal(walked, flat)


@pytest.mark.parametrize("bits", [4, 6, 8, 32])
@pytest.mark.parametrize("density", [0.002, 0.25, 1.0])
def test_values_come_back(density, bits):
    values = pruned((61, 67, 3), density, bits)
    emitted = rebuild(sparse.store, values, bits)
    for answer in emitted.answers:
        np.testing.assert_array_equal(answer, values)
        assert answer.dtype == values.dtype
    assert ("ScatterElements" in emitted.operators) == (density < 1)
    assert set(kernels(emitted.model)) <= {"Identity"}


@pytest.mark.parametrize("bits", [6, 8, 32])
def test_a_weight_of_zeros(bits):
    values = pruned((64, 64), 0.0, bits)
    emitted = rebuild(sparse.store, values, bits)
    np.testing.assert_array_equal(emitted.answers[0], values)
    assert emitted.model.ByteSize() < 600


def test_codes_below_8_bits_are_packed_among_the_nonzero_values_too():
    operators = rebuild(sparse.store, pruned((128, 128), 0.1, 4), 4).operators
    assert {"ScatterElements", "BitwiseAnd"} <= set(operators)


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("density", np.linspace(0.05, 0.95, 7))
@pytest.mark.parametrize("side", [4, 16, 64])
def test_sparse_is_never_larger_than_the_alternatives(side, density, bits):
    values = pruned((side, side), density, bits)

    def size(store: Store) -> int:
        return rebuild(store, values, bits).model.ByteSize()

    tolerance = 1000  # constants that layers share, and the price of operators at load
    assert size(sparse.store) <= min(size(dense.store), size(packed.store)) + tolerance


@pytest.mark.parametrize("bits", [8, 32])
def test_sparse_initializers_come_back(bits):
    values = pruned((64, 64, 1, 1), 0.05, bits)
    model = rebuild(sparse_initializer.store, values, bits)
    np.testing.assert_array_equal(model.answers[0], values)
    assert len(model.model.graph.sparse_initializer) == 1
    assert model.operators == []
    dense_model = rebuild(sparse_initializer.store, pruned((64, 64), 0.3, 8), 8).model
    assert not dense_model.graph.sparse_initializer, "eight bytes an index pay for few values only"
