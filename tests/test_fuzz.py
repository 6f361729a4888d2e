"""Whatever the network: the same function before solving, small errors after it, the same inputs and outputs.

`make fuzz` runs ten thousand networks; FUZZ_EXAMPLES says how many.
"""

from __future__ import annotations

import os

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings

import onnx_lwdf
from onnx_lwdf.compress import prepare
from onnx_lwdf.config import Config
from onnx_lwdf.runtime import Array
from tests.nets import answers, sqnr_db
from tests.networks import NORMALIZED, images, networks

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 100,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def feeds_of(model: onnx.ModelProto) -> dict[str, Array]:
    batch, *shape = (dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim)
    return {"x": images(*shape, batch or 3, seed=1)}


def compressed(model: onnx.ModelProto, **options: object) -> onnx.ModelProto:
    """Compressed, with all that a pipeline relies on in its place."""
    result = onnx_lwdf.compress(model, samples=16, jobs=1, **NORMALIZED, **options).model
    onnx.checker.check_model(result, full_check=True)
    for side in ("input", "output"):
        assert getattr(result.graph, side) == getattr(model.graph, side)
    assert {item.key: item.value for item in result.metadata_props}["theirs"] == "kept"
    assert result.producer_name == model.producer_name
    return result


def decibels(model: onnx.ModelProto, result: onnx.ModelProto) -> float:
    feeds = feeds_of(model)
    pairs = list(zip(answers(model, feeds), answers(result, feeds), strict=True))
    assert all(exact.shape == answer.shape for exact, answer in pairs)
    return min((sqnr_db(exact, answer) for exact, answer in pairs if exact.any()), default=np.inf)


@fuzz
@given(networks())
def test_preconditioning_is_exact(model):
    feeds = feeds_of(model)
    folded = prepare(model, Config(samples=4, **NORMALIZED)).graph.snapshot()
    for exact, answer in zip(answers(model, feeds), answers(folded, feeds), strict=True):
        np.testing.assert_allclose(answer, exact, rtol=0, atol=1e-4 * np.abs(exact).max())


@fuzz
@given(networks())
def test_weights_of_eight_bits(model):
    """A step of max |w| / 127 makes a noise of step^2 / 12: 37 dB for weights within 6 deviations, 34 where sums cancel to half
    their power. The noises of layers add up."""
    layers = sum(node.op_type in LAYERS for node in model.graph.node)
    assert decibels(model, compressed(model, activation_bits="float")) > 34 - 10 * np.log10(layers)


@fuzz
@given(networks())
def test_weights_and_activations_of_eight_bits(model):
    """Ranges are from sixteen images; one of another kind may leave them, but no answer is worse than none."""
    assert decibels(model, compressed(model)) > 0
