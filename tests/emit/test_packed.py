"""Packed codes: the ONNX reference evaluator and onnxruntime rebuild what went in."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lwdf.emit import packed
from onnx_lwdf.emit.stored import Runs, Values
from onnx_lwdf.graph import Graph
from onnx_lwdf.runtime import open_session, run
from tests.emit.rebuilding import kernels, rebuild

# Long enough that the operators pay; none, some and all of the lengths' remainders by 8.
SHAPES = [(81, 5, 5, 7), (16384,), (121, 123), (133, 3, 41), (2, 8193)]


def random_codes(shape: tuple[int, ...], bits: int) -> np.ndarray:
    low, high = (-127 if bits == 8 else -(2 ** (bits - 1))), 2 ** (bits - 1) - 1
    codes = np.random.default_rng(0).integers(low, high + 1, shape).astype(np.int8)
    codes.flat[:2] = low, high
    return codes


def moved(codes: np.ndarray, axis: int) -> np.ndarray:
    """Another range of as many codes for every channel."""
    shape = [1] * codes.ndim
    shape[axis] = -1
    return (codes + np.random.default_rng(1).integers(-60, 60, codes.shape[axis]).reshape(shape)).astype(np.int8)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_come_back(shape, bits):
    codes = random_codes(shape, bits)
    emitted = rebuild(packed.store, codes, bits)
    for answer in emitted.answers:
        np.testing.assert_array_equal(answer, codes)
        assert answer.dtype == np.int8
    assert set(kernels(emitted.model)) <= {"Identity"}


@pytest.mark.parametrize("bits", range(2, 7))
@pytest.mark.parametrize("axis", [0, 1])
def test_every_channel_has_its_own_range(bits, axis):
    codes = moved(random_codes((121, 123), bits), axis)
    for answer in rebuild(packed.store, codes, bits, axis).answers:
        np.testing.assert_array_equal(answer, codes)


@pytest.mark.parametrize("bits", range(2, 7))
@pytest.mark.parametrize(
    ("axis", "shape"), [(0, (121, 123)), (1, (121, 123)), (1, (128, 123)), (0, (61, 32, 3, 5)), (1, (40, 57, 3, 3))]
)
def test_multipliers_of_runs_come_back(axis, shape, bits):
    """Inputs along the other axis, in runs of 16 the last of which is shorter, or not."""
    counts = [*shape]
    counts[1 - axis] = -(-shape[1 - axis] // 16)
    multiplier = np.random.default_rng(2).integers(1, 1 + min(8, 127 // 2**bits), counts).astype(np.int8)
    runs = Runs(multiplier, 1 - axis, 16)
    each = np.empty(shape, np.int8)
    for place in np.ndindex(shape):
        run = list(place)
        run[1 - axis] //= 16
        each[place] = multiplier[tuple(run)]
    values = random_codes(shape, bits) * each
    emitted = rebuild(packed.store, values, bits, axis, runs)
    for answer in emitted.answers:
        np.testing.assert_array_equal(answer, values)
    assert set(kernels(emitted.model)) <= {"Identity"}


def test_tensors_of_one_width_share_one_chain():
    """Three of 3 bits, whose codes fill no byte, and one of 6 between them: all come back, in order."""
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 18]> net (int64[1] x) => () { }')
    graph = Graph(model)
    tensors = [
        Values(f"w{number}", moved(random_codes(shape, bits), 0), bits, 0, onnx.TensorProto.FLOAT)
        for number, (shape, bits) in enumerate([((83, 101), 3), ((90, 7, 3, 3), 6), ((51, 203), 3), ((3001,), 3)])
    ]
    names = [graph.add("Identity", [held.tensor], "rebuilt") for held in packed.store(graph, tensors)]
    kind = onnx.TensorProto.FLOAT
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, kind, values.data.shape)
        for name, values in zip(names, tensors, strict=True)
    )
    graph.outputs = names
    graph.commit()
    assert [node.op_type for node in model.graph.node].count(
        "Split"
    ) == 3  # one a width, one for the fourth row of 6 bits
    onnx.checker.check_model(model, full_check=True)
    for answer, values in zip(run(open_session(model), {"x": np.zeros(1, np.int64)}), tensors, strict=True):
        np.testing.assert_array_equal(answer, values.data)


@pytest.mark.parametrize("bits", range(2, 8))
def test_no_bit_is_wasted(bits):
    pieces = packed.pack(np.zeros(64 * 32, np.uint8), bits)
    assert sum(piece.data.size for piece in pieces) == 64 * 32 * bits // 8


@given(st.integers(2, 7), st.lists(st.integers(0, 127), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_pieces_hold_every_code(bits, numbers):
    codes = np.minimum(np.array(numbers, np.uint8), 2**bits - 1)
    pieces = packed.pack(codes, bits)
    for place, code in enumerate(codes):  # bit by bit, as the module's docstring says
        total = 0
        for piece in pieces:
            row, byte = divmod(place, piece.data.shape[-1])
            if piece.width < 6:
                part = (int(piece.data[byte]) >> row * piece.width) % 2**piece.width
            elif row < 3:
                part = int(piece.data[row, byte]) % 64
            else:
                part = sum(int(piece.data[k, byte]) // 64 * 4**k for k in range(3))
            total += part << piece.lower
        assert total == code


def test_a_layer_too_small_to_gain_and_floats_stay_as_they_are():
    assert rebuild(packed.store, random_codes((8, 9), 4), 4).operators == []
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    assert rebuild(packed.store, values, 32).operators == []
    assert rebuild(packed.store, random_codes((64, 64), 8), 8).operators == []
    assert rebuild(packed.store, random_codes((64, 64), 4), 4).operators != []


def test_the_operators_are_standard():
    standard = {"BitShift", "BitwiseAnd", "BitwiseOr", "Cast", "Add", "Concat", "Reshape", "Split"}
    assert set(rebuild(packed.store, random_codes((121, 123), 7), 7).operators) == standard
