"""Options are validated once, with the option's own words."""

from __future__ import annotations

import pytest

from onnx_lwdf.config import Config
from onnx_lwdf.emit import FLOAT, FORMATS, INTEGER, automatic, refusal
from onnx_lwdf.errors import OptionError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_bits": 1}, "weight-bits is 1"),
        ({"activation_bits": 9}, "activation-bits is 9"),
        ({"bits_for": {"x": 0}}, "bits-for 'x' is 0"),
        ({"method": "magic"}, "one of auto, rtn"),
        ({"format": "folded"}, "float activations"),
        ({"format": "qdq", "activation_bits": None}, "integer activations"),
        ({"format": "sparse-initializer"}, "float activations"),
        ({"format": "dense", "activation_bits": None}, "float weights"),
        ({"seed": -1}, "seed is -1"),
        ({"fail_under": float("nan")}, "finite"),
        ({"input_range": (0.0, float("inf"))}, "finite"),
        ({"input_range": (1.0, 0.0)}, "below"),
        ({"input_mean": (1.0,)}, "go together"),
        ({"input_mean": (1.0,), "input_std": (0.0,)}, "positive"),
        ({"input_mean": (1.0,), "input_std": (1.0,), "input_range": (0.0, 1.0)}, "excludes"),
        ({"input_shape": {"x": (1, 0)}}, "at least 1"),
        ({"samples": 0}, "samples is 0"),
        ({"jobs": 0}, "jobs is 0"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(OptionError, match=words):
        Config(**options)


def test_what_a_configuration_means():
    assert Config().stored_format == "qdq"
    assert Config(activation_bits=None).stored_format == "folded"
    assert Config(weight_bits=6, activation_bits=8).bits_name == "w6a8"
    assert Config(weight_bits=6, activation_bits=None).bits_name == "w6"
    assert not Config().keeps_first_last
    assert Config(weight_bits=6).keeps_first_last
    assert not Config(weight_bits=6, keep_first_last=False).keeps_first_last
    assert Config(activations_from="some/folder").source == "data"


def test_the_recorded_options_do_not_depend_on_the_machine():
    assert Config(jobs=3, seed=2).to_dict() == {"weight_bits": 8, "activation_bits": 8, "seed": 2}


@pytest.mark.parametrize("name", ["qdq", "folded", "packed"])
def test_formats_of_codes_refuse_float_weights(name):
    activations = FORMATS[name].activations[0]
    assert "stores integer weights" in (refusal(name, FLOAT, activations) or "")


def test_float_weights_go_with_float_activations():
    assert automatic(FLOAT, FLOAT) == "sparse"
    assert refusal("sparse", FLOAT, FLOAT) is None
    assert "integer weights" in (refusal("sparse", FLOAT, INTEGER) or "")
