"""Multipliers of runs of inputs: the law of their bounds, and what is stored of a whole network."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

import onnx_lwdf
from onnx_lwdf.errors import OptionError
from onnx_lwdf.vectors import Vectors, slack, vectors
from tests.emit.test_emit import wide
from tests.nets import FAST, answers, samples, sqnr_db, with_weights


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 20))
def test_runs_cover_each_input_once_and_stay_in_a_kernel_position(kernel: int, channels: int, size: int) -> None:
    runs, inputs = Vectors(size, kernel, 8), kernel * channels
    number = runs.spread(np.arange(len(runs.starts(inputs)), dtype=float), inputs).astype(int)
    expected = [(position, channel // size) for position in range(kernel) for channel in range(channels)]
    assert len(number) == inputs
    for one in range(inputs):
        for other in range(inputs):
            assert (number[one] == number[other]) == (expected[one] == expected[other])


@given(st.integers(2, 8), st.sampled_from([64, 127]))
def test_no_product_is_over_the_limit(bits: int, largest: int) -> None:
    runs = vectors(16, 32, 1, bits, largest)
    reach = 2 ** (bits - 1) + slack(bits)
    assert runs is None or (2 <= runs.most <= 8 and runs.most * reach <= largest)
    assert runs is not None or 2 * reach > largest


def test_where_multipliers_have_nothing_to_choose_there_are_none() -> None:
    assert vectors(0, 32, 1, 4, 64) is None
    assert vectors(16, 32, 1, None, 64) is None
    assert vectors(16, 1, 9, 4, 64) is None  # depthwise
    assert vectors(16, 16, 1, 4, 64) is None  # one run is a channel
    assert vectors(16, 16, 9, 4, 64) == Vectors(16, 9, 7)


def stored_integers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """What DequantizeLinear reads of the weights, [out, in, positions]."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    codes = [constants[node.input[0]] for node in nodes if node.input[0] in constants]
    found = [c for c in codes if c.dtype == np.int8 and c.ndim > 1]
    return {str(number): c.reshape(*c.shape[:2], -1) for number, c in enumerate(found)}


@pytest.mark.parametrize(
    ("options", "limit"),
    [({"bits": 4}, 127), ({"bits": 5}, 127), ({"weight_bits": 4}, 64), ({"weight_bits": 3, "target": "arm"}, 127)],
)
def test_a_run_has_few_codes_and_its_products_fit_the_kernels(options, limit):
    model = onnx_lwdf.compress(wide(), keep_first_last=False, **options, **FAST).model
    bits, multiplied = options.get("bits") or options["weight_bits"], 0
    for codes in stored_integers(model).values():
        if codes.shape[1] < 16:
            continue
        assert np.abs(codes.astype(int)).max() <= limit
        for start in range(0, codes.shape[1], 16):
            run = codes[:, start : start + 16]
            for place in np.ndindex(run.shape[0], run.shape[2]):
                values = run[place[0], :, place[1]].astype(int)
                divisor = max(1, int(np.gcd.reduce(values)))
                assert np.ptp(np.append(values, 0)) // divisor < 2**bits
                multiplied += divisor > 1
    assert multiplied > 20


@pytest.mark.parametrize("activations", [8, "float"])
def test_packed_multipliers_come_back(activations):
    options = {"weight_bits": 4, "activation_bits": activations, "keep_first_last": False, **FAST}
    dense, packed = (
        onnx_lwdf.compress(wide(), format=form, **options).model
        for form in ("folded" if activations == "float" else "qdq", "packed")
    )
    assert "Mul" in {node.op_type for node in packed.graph.node}
    feeds = samples(wide())
    np.testing.assert_array_equal(answers(dense, feeds)[0], answers(packed, feeds)[0])


def test_multipliers_gain():
    feeds = samples(wide())
    exact = answers(wide(), feeds)[0]
    without, with_them = (
        sqnr_db(exact, answers(onnx_lwdf.compress(wide(), weight_bits=4, vector_size=size, **FAST).model, feeds)[0])
        for size in (0, 16)
    )
    assert with_them > without + 1  # 93 % of these weights are zeros: a run with none of the others gets a fine grid


def test_what_is_pruned_has_no_multipliers():
    options = {"weight_bits": 4, "nm": (2, 4), **FAST}
    one, other = (onnx_lwdf.compress(wide(), vector_size=size, **options) for size in (0, 16))
    pruned = [layer.method == "obs" for layer in other.report.compressed]
    assert any(pruned)
    both = zip(stored_integers(one.model).values(), stored_integers(other.model).values(), pruned, strict=True)
    for a, b, same in both:
        assert not same or np.array_equal(a, b)


@pytest.mark.parametrize("size", [-1, 1, 3])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(OptionError, match=f"vector-size is {size}; it must be at least 4, or 0 for none"):
        onnx_lwdf.compress(wide(), vector_size=size, **FAST)


LAYOUTS = {  # input, node, weight, output
    "grouped": ("1,75,6,6", "Conv <pads = [1,1,1,1], group = 3> (x, w)", (12, 25, 3, 3), "1,12,6,6"),
    "three positions": ("1,40,6,6", "Conv <strides = [2,1]> (x, w)", (31, 40, 3, 1), "1,31,2,6"),
    "transposed": ("1,40,6,6", "ConvTranspose (x, w)", (40, 9, 3, 3), "1,9,8,8"),
    "matrix": ("50,40", "MatMul (x, w)", (40, 37), "50,37"),
    "Gemm": ("50,90", "Gemm (x, w)", (90, 37), "50,37"),
    "Gemm, transB": ("50,90", "Gemm <transB = 1> (x, w)", (37, 90), "50,37"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_weight(layout):
    """Packed as folded, to the bit, and closer than with one scale."""
    inputs, node, shape, outputs = LAYOUTS[layout]
    text = f'<ir_version: 8, opset_import: ["" : 18]> net (float[{inputs}] x) => (float[{outputs}] y) {{ y = {node} }}'
    rng = np.random.default_rng(0)
    model = with_weights(text, {"w": rng.normal(0, 1, shape) * np.exp(rng.normal(0, 1, shape))})  # runs differ
    options = {"weight_bits": 4, "activation_bits": "float", "keep_first_last": False, **FAST}
    feeds = samples(model)
    exact = answers(model, feeds)[0]
    folded, packed, plain = (
        answers(onnx_lwdf.compress(model, format=form, vector_size=size, **options).model, feeds)[0]
        for form, size in (("folded", 16), ("packed", 16), ("folded", 0))
    )
    np.testing.assert_array_equal(folded, packed)
    assert sqnr_db(exact, folded) > sqnr_db(exact, plain) + 0.2  # measured: 0.4 and more
