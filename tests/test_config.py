"""Options are validated once, with the option's own words."""

from __future__ import annotations

import json

import numpy as np
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
        ({"sparsity": 1.0}, "sparsity is 1; it must be at least 0 and below 1"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"sparsity_for": {"x": 1.5}}, "sparsity-for 'x' is 1.5"),
        ({"sparsity": 0.5, "nm": (2, 4)}, "sparsity excludes nm"),
        ({"nm": (4, 4)}, "nm is 4:4; N must be at least 1 and below M"),
        ({"nm": (0, 4)}, "nm is 0:4"),
        ({"sparsity": 0.5, "method": "gptq"}, "'gptq' does not prune; use auto or one of magnitude, obs"),
        ({"weight_bits": None}, "integer activations need integer weights"),
        ({"weight_bits": None, "activation_bits": None, "bits_for": {"x": 4}}, "give --bits"),
        ({"format": "dense", "activation_bits": None}, "stores float weights"),
        ({"format": "folded", "weight_bits": None, "activation_bits": None}, "stores integer weights"),
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
        ({"channels": 1.0}, "channels is 1"),
        ({"channels": -0.5}, "below 1"),
        ({"samples": 0}, "samples is 0"),
        ({"jobs": 0}, "jobs is 0"),
        ({"weight_bits": 6.0}, "weight-bits is 6.0; it must be a whole number"),
        ({"samples": "8"}, "samples is '8'; it must be a whole number"),
        ({"sparsity": None}, "sparsity is None; it must be a number"),
        ({"max_size": "25%"}, "max-size is '25%'; it must be a number"),
        ({"recalibrate": "no"}, "recalibrate is 'no'; it must be True or False"),
        ({"keep_first_last": 1}, "keep-first-last is 1; it must be True or False"),
        ({"nm": "2:4"}, "nm is '2:4'; it must be a list of 2 values"),
        ({"nm": (2, 4, 8)}, "a list of 2 values"),
        ({"input_range": (0,)}, "a list of 2 values"),
        ({"sparsity_for": "Conv=.5"}, "must map names to values"),
        ({"input_shape": {"x": "1,3"}}, "input-shape 'x' is '1,3'; it must be a list"),
        ({"exclude": "Conv"}, "exclude is 'Conv'; it must be a list"),
        ({"exclude": [1]}, "exclude holds 1; it must hold words"),
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
    pruned = Config(weight_bits=None, activation_bits=None, sparsity=0.5)
    assert (pruned.stored_format, pruned.bits_name) == ("sparse", "s50")
    assert Config(sparsity=0.125).bits_name == "w8a8.s12.5"
    assert Config(nm=(2, 4)).bits_name == "w8a8.2of4"
    assert Config(sparsity_for={"x": 0.5}).prunes
    assert not Config(sparsity_for={"x": 0.0}).prunes
    assert Config(weight_bits=None, activation_bits=None, channels=0.3).stored_format == "dense"
    assert Config(weight_bits=None, activation_bits=None, channels=0.3).bits_name == "c30"
    mixed = Config(auto_bits=True, max_size=0.25)
    assert (mixed.stored_format, mixed.bits_name, mixed.lowest_weight_bits) == ("packed", "auto.a8", 2)
    assert (mixed.most_bytes(1001), Config(max_size=300.0).most_bytes(1001), Config().most_bytes(1001)) == (
        250,
        300,
        None,
    )
    assert Config(auto_bits=True, max_size=0.25, activation_bits=None).bits_name == "auto"
    assert not Config().keeps_first_last
    assert Config(weight_bits=6).keeps_first_last
    assert not Config(weight_bits=6, keep_first_last=False).keeps_first_last
    assert Config(activations_from="some/folder").source == "data"


def test_the_recorded_options_do_not_depend_on_the_machine():
    assert Config(jobs=3, seed=2).to_dict() == {"weight_bits": 8, "activation_bits": 8, "seed": 2}


@pytest.mark.parametrize("name", ["qdq", "folded", "packed"])
def test_formats_of_codes_refuse_float_weights(name):
    for activations in FORMATS[name].activations:
        assert "integer weights" in (refusal(name, FLOAT, activations) or "")


def test_float_weights_go_with_float_activations():
    assert automatic(FLOAT, FLOAT, zeros=True, packs=False) == "sparse"
    assert automatic(FLOAT, FLOAT, zeros=False, packs=False) == "dense"
    assert refusal("sparse", FLOAT, FLOAT) is None
    assert "integer weights" in (refusal("sparse", FLOAT, INTEGER) or "")


def test_numbers_of_numpy_are_taken_for_what_they_are():
    given = Config(
        weight_bits=np.int64(6),
        seed=np.int32(3),
        sparsity=np.float32(0.5),
        max_size=np.float64(0.25),
        bits_for={"x": np.uint8(4)},
        input_shape={"x": np.array([1, 3, 8, 8])},
        input_mean=np.array([1, 2, 3], np.float32),
        input_std=np.ones(3),
    )
    plain = Config(
        weight_bits=6,
        seed=3,
        sparsity=0.5,
        max_size=0.25,
        bits_for={"x": 4},
        input_shape={"x": (1, 3, 8, 8)},
        input_mean=(1.0, 2.0, 3.0),
        input_std=(1.0, 1.0, 1.0),
    )
    assert given == plain
    assert json.dumps(given.to_dict()) == json.dumps(plain.to_dict())
