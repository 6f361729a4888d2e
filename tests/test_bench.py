"""The rows of bench/methods.py are made of steps that the package has."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import onnx_lwdf
from tests.nets import answers, residual, samples

SCRIPT = Path(__file__).parent.parent / "bench" / "methods.py"


@pytest.fixture(scope="module")
def methods():
    spec = importlib.util.spec_from_file_location("methods", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["methods"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["methods"]


def test_every_method_differs_from_the_others_and_leaves_the_package_as_it_was(methods):
    model, found = residual(width=32), {}
    plain = onnx_lwdf.compress(model, bits=6, samples=32).model.SerializeToString(deterministic=True)
    for name, method in methods.METHODS.items():
        with methods.replaced(method.instead):
            done = onnx_lwdf.compress(model, bits=6, samples=32, **method.options)
        found[name] = answers(done.model, samples(model))[0]
    names = list(found)
    for place, name in enumerate(names):
        assert all(np.any(found[name] != found[other]) for other in names[:place]), name
    assert onnx_lwdf.compress(model, bits=6, samples=32).model.SerializeToString(deterministic=True) == plain
