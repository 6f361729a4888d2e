"""Bits chosen for a size or a fidelity: the file fits, to the byte, and more bytes are never predicted to be worse."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_lwdf
from onnx_lwdf.api import Gate
from onnx_lwdf.errors import OptionError
from onnx_lwdf.tradeoff import Point
from tests.nets import FAST, residual, with_weights
from tests.test_end_to_end import accuracy

MODELS = Path(__file__).parent.parent / "models"
SOURCE = MODELS / "fmnist-mbv2-bn.onnx"
QUICK = {"samples": 16, "jobs": 2}


@cache
def mixed(share: float, activation_bits: int | str) -> onnx_lwdf.Result:
    return onnx_lwdf.compress(SOURCE, max_size=share, activation_bits=activation_bits, **QUICK)


def chosen_of(result: onnx_lwdf.Result) -> Point:
    (chosen,) = (point for point in result.report.tradeoff if point.chosen)
    return chosen


@pytest.mark.parametrize(("share", "activation_bits"), [(0.3, 8), (0.24, 8), (0.24, "float")])
def test_the_file_fits_and_is_as_large_as_predicted(share, activation_bits):
    result = mixed(share, activation_bits)
    size = result.report.output["bytes"]
    assert 0.98 * share * SOURCE.stat().st_size < size <= share * SOURCE.stat().st_size
    assert chosen_of(result).bytes == pytest.approx(size, abs=64)  # a number may be a byte longer or shorter
    assert len({layer.weight_bits for layer in result.report.compressed}) > 1
    assert accuracy(result.model) > accuracy(onnx.load(SOURCE)) - 2.0


@pytest.mark.parametrize("share", [0.3, 0.24])
def test_the_prediction_is_near_what_is_measured(share):
    """Eight images measure to a few dB; restored means and deviations make low bits better than their first order."""
    result = mixed(share, 8)
    assert -3 < result.report.output_db - chosen_of(result).predicted_db < 8


def test_better_than_the_same_bits_everywhere_at_the_same_size():
    even = onnx_lwdf.compress(SOURCE, weight_bits=3, format="packed", keep_first_last=False, **QUICK).report
    result = mixed(float(even.output["bytes"]), 8).report
    assert result.output["bytes"] <= even.output["bytes"]
    assert result.output_db > even.output_db + 0.3  # measured: 0.6


def test_the_front_rises():
    points = mixed(0.24, 8).report.tradeoff
    assert 10 <= len(points) <= 13
    for one, other in pairwise(points):
        assert one.bytes < other.bytes
        assert one.predicted_db <= other.predicted_db


def test_a_fidelity_alone_gives_the_smallest_file_that_is_predicted_to_hold_it():
    report = onnx_lwdf.compress(SOURCE, bits="auto", fail_under=20, **QUICK).report
    chosen = next(point for point in report.tradeoff if point.chosen)
    assert chosen.predicted_db >= 20
    smaller = [point for point in report.tradeoff if point.bytes < chosen.bytes]
    assert smaller
    assert all(point.predicted_db < 20 for point in smaller)
    assert chosen.bytes < 0.27 * SOURCE.stat().st_size


def test_an_impossible_size_gives_the_smallest_file_and_says_its_size(tmp_path):
    with pytest.raises(
        Gate, match=r"above --max-size 30,753; [\d,]+ is the smallest that bits reach in format packed"
    ) as gate:
        onnx_lwdf.compress(SOURCE, tmp_path / "out.onnx", max_size=0.03, **QUICK)
    size = (tmp_path / "out.onnx").stat().st_size
    assert f"the file has {size:,} bytes" in str(gate.value)
    assert not onnx_lwdf.api.check(tmp_path / "out.onnx")
    assert gate.value.result.report.tradeoff[0].bytes == pytest.approx(size, abs=64)
    assert gate.value.exit_code == 3


def test_bits_that_were_given_are_only_gated():
    with pytest.raises(Gate, match="above --max-size 200; use fewer bits or --bits auto") as gate:
        onnx_lwdf.compress(residual(), bits=8, max_size=200.0, **FAST)
    assert gate.value.result.report.tradeoff == ()


def test_layers_with_bits_of_their_own_keep_them():
    result = onnx_lwdf.compress(SOURCE, max_size=0.26, bits_for={"/fc/Gemm": 7, "*features.12*": 6}, **QUICK)
    bits = {layer.name: layer.weight_bits for layer in result.report.compressed}
    assert bits["/fc/Gemm"] == 7
    assert bits["/features/features.12/Conv"] == 6


def test_with_pruning():
    result = onnx_lwdf.compress(SOURCE, bits="auto", max_size=0.26, sparsity=0.5, **QUICK)
    assert result.report.output["bytes"] <= 0.26 * SOURCE.stat().st_size
    assert max(layer.sparsity for layer in result.report.compressed) > 0.4


def test_an_output_that_is_no_real_number():
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    net (float[N,3,8,8] x) => (int64[N,1,8,8] y) {
        a = Conv (x, w0)
        b = Relu (a)
        c = Conv (b, w1)
        y = ArgMax <axis = 1> (c)
    }
    """
    rng = np.random.default_rng(0)
    source = with_weights(text, {"w0": rng.normal(0, 0.3, (128, 3, 1, 1)), "w1": rng.normal(0, 0.3, (128, 128, 1, 1))})
    report = onnx_lwdf.compress(source, max_size=16000.0, **FAST).report
    assert report.output["bytes"] <= 16000
    assert min(layer.weight_bits for layer in report.compressed) > 2


def test_same_bytes_with_any_number_of_jobs():
    again = onnx_lwdf.compress(SOURCE, max_size=0.24, **{**QUICK, "jobs": 1}).model
    assert again.SerializeToString(deterministic=True) == mixed(0.24, 8).model.SerializeToString(deterministic=True)


def test_dry_run_says_that_bits_are_to_be_chosen():
    config = onnx_lwdf.Config(auto_bits=True, max_size=0.2)
    assert {layer.reason for layer in onnx_lwdf.inspect(SOURCE, config).compressed} == {
        "or fewer bits, by what they cost"
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": "auto"}, "bits auto needs an aim; give --max-size or --fail-under"),
        ({"bits": "auto", "weight_bits": 4, "max_size": 0.5}, "leave weight-bits out"),
        ({"bits": "some"}, "bits is 'some'; it must be a number or 'auto'"),
        ({"max_size": 0.0}, "max-size is 0; it must be positive, such as 25% or 2MB"),
        ({"max_size": float("nan")}, "max-size is nan"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(OptionError, match=words):
        onnx_lwdf.compress(SOURCE, **options)
