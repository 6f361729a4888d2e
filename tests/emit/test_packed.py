"""Packed codes: the ONNX reference evaluator and onnxruntime rebuild what went in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lwdf.emit import packed
from onnx_lwdf.grid import code_range
from tests.emit.rebuilding import kernels, rebuild

# Long enough that the operators pay; none, some and all of the lengths' remainders by 8.
SHAPES = [(81, 5, 5, 7), (16384,), (121, 123), (133, 3, 41), (2, 8193)]


def random_codes(shape: tuple[int, ...], bits: int) -> np.ndarray:
    low, high = code_range(bits)
    codes = np.random.default_rng(0).integers(low, high + 1, shape).astype(np.int8)
    codes.flat[:2] = low, high
    return codes


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_come_back(shape, bits):
    codes = random_codes(shape, bits)
    emitted = rebuild(packed.store, codes, bits)
    for answer in emitted.answers:
        np.testing.assert_array_equal(answer, codes)
        assert answer.dtype == np.int8
    assert set(kernels(emitted.model)) <= {"Identity"}


@pytest.mark.parametrize("bits", range(2, 8))
def test_no_bit_is_wasted(bits):
    pieces = packed.pack(random_codes((64, 32), bits), bits)
    assert sum(piece.data.size for piece in pieces) == 64 * 32 * bits // 8


@given(st.integers(2, 7), st.lists(st.integers(-64, 63), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_pieces_hold_every_code(bits, numbers):
    low, high = code_range(bits)
    codes = np.clip(np.array(numbers, np.int8), low, high)
    pieces = packed.pack(codes, bits)
    for place, code in enumerate(codes):  # bit by bit, as the module's docstring says
        total = 0
        for piece in pieces:
            row, byte = divmod(place, len(piece.data))
            total += (int(piece.data[byte]) >> row * piece.width) % 2**piece.width << piece.lower
        assert total - 2 ** (bits - 1) == code


def test_a_layer_too_small_to_gain_and_floats_stay_as_they_are():
    assert rebuild(packed.store, random_codes((8, 9), 4), 4).operators == []
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    assert rebuild(packed.store, values, 32).operators == []
    assert rebuild(packed.store, random_codes((64, 64), 8), 8).operators == []
    assert rebuild(packed.store, random_codes((64, 64), 4), 4).operators != []


def test_the_operators_are_standard():
    standard = {"BitShift", "BitwiseAnd", "BitwiseOr", "Cast", "Sub", "Reshape", "Slice"}
    assert set(rebuild(packed.store, random_codes((121, 123), 7), 7).operators) == standard
