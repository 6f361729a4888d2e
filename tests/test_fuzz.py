"""Whatever the network: the same function before solving, small errors after it, the same inputs and outputs.

`make fuzz` runs ten thousand networks; FUZZ_EXAMPLES says how many.
"""

from __future__ import annotations

import gc
import os

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import numpy_helper

import onnx_lwdf
import onnx_lwdf.activations.images
import onnx_lwdf.activations.inputs
import tests.networks
from onnx_lwdf import activations
from onnx_lwdf.config import Config
from onnx_lwdf.preparation import prepare
from onnx_lwdf.runtime import Array, open_session, run
from tests.nets import answers, sqnr_db
from tests.networks import images, networks, normalized

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 100,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
BATCHES = 16
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@pytest.fixture(autouse=True, scope="module")
def images_are_remembered():
    """Inputs have some hundred shapes, and their images come from few seeds: each draw is made once, half of the time saved.

    What is imported by now is never garbage: each of the collections of a run need not walk it, another quarter.
    """
    drawn: dict[str, tuple[Array, dict[str, object]]] = {}

    def scenes(count: int, channels: int, height: int, width: int, rng: np.random.Generator) -> Array:
        key = f"{(count, channels, height, width)} {rng.bit_generator.state}"
        if key not in drawn:
            drawn[key] = activations.images.scenes(count, channels, height, width, rng), rng.bit_generator.state
        made, rng.bit_generator.state = drawn[key]
        return made.copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations.inputs, "scenes", scenes)
        patch.setattr(tests.networks, "scenes", scenes)
        gc.freeze()
        yield
        gc.unfreeze()


def feeds_of(model: onnx.ModelProto, seed: int = 1) -> dict[str, Array]:
    batch, *shape = (dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim)
    return {"x": images(*shape, batch or 3, seed=seed)}


def compressed(model: onnx.ModelProto, **options: object) -> onnx.ModelProto:
    """Compressed, with all that a pipeline relies on in its place."""
    result = onnx_lwdf.compress(model, jobs=1, **{"samples": 16, **normalized(model), **options}).model
    onnx.checker.check_model(result, full_check=True)
    for side in ("input", "output"):
        assert getattr(result.graph, side) == getattr(model.graph, side)
    assert {item.key: item.value for item in result.metadata_props}["theirs"] == "kept"
    assert result.producer_name == model.producer_name
    return result


def decibels(model: onnx.ModelProto, result: onnx.ModelProto) -> float:
    """Over several batches: where a single image happens to leave a network silent, any bias is noise beside its answer."""
    batches = [feeds_of(model, seed) for seed in range(1, BATCHES + 1)]
    pairs = list(zip(pooled_answers(model, batches), pooled_answers(result, batches), strict=True))
    assert all(exact.shape == answer.shape for exact, answer in pairs)
    return min((sqnr_db(exact, answer) for exact, answer in pairs if exact.any()), default=np.inf)


def pooled_answers(model: onnx.ModelProto, batches: list[dict[str, Array]]) -> list[Array]:
    """Each output, [batches, ...]."""
    session = open_session(model)
    return [np.stack(answer) for answer in zip(*(run(session, feeds) for feeds in batches), strict=True)]


def noise(model: onnx.ModelProto, other: onnx.ModelProto) -> float:
    """The worst output's, over its power."""
    return 10 ** (-decibels(model, other) / 10)


def expected_noise(model: onnx.ModelProto) -> float:
    """The mean noise with the weights of layers moved at random by up to half a step of their channel's 8-bit grid."""
    rng, axes = np.random.default_rng(0), {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
    outputs = {node.input[1]: axes[node.op_type] for node in model.graph.node if node.op_type in axes}
    noises = []
    for _ in range(16):
        moved = onnx.ModelProto()
        moved.CopyFrom(model)
        for tensor in moved.graph.initializer:
            if tensor.name in outputs:
                value = numpy_helper.to_array(tensor)
                others = tuple(axis for axis in range(value.ndim) if axis != outputs[tensor.name])
                step = np.abs(value).max(others, keepdims=True) / 127
                value = value + rng.uniform(-step / 2, step / 2, value.shape).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        noises.append(noise(model, moved))
    return float(np.mean(noises))


@fuzz
@given(networks())
def test_preconditioning_is_exact(model):
    feeds = feeds_of(model)
    folded = prepare(model, Config(samples=4, **normalized(model))).graph.snapshot()
    for exact, answer in zip(answers(model, feeds), answers(folded, feeds), strict=True):
        np.testing.assert_allclose(answer, exact, rtol=0, atol=1e-4 * np.abs(exact).max())


@fuzz
@given(networks())
def test_weights_of_eight_bits(model):
    """A step of max |w| / 127 makes a noise of step^2 / 12: 37 dB for weights within 6 deviations, 34 where sums cancel to half
    their power. The noises of layers add up. Where sums cancel to far less, or a BatchNormalization amplifies what is next
    to nothing, no more noise than ten times (an error of three deviations) that of weights moved within their steps."""
    layers = sum(node.op_type in LAYERS for node in model.graph.node)
    result = compressed(model, activation_bits="float")
    bound = 34 - 10 * np.log10(layers)
    assert decibels(model, result) > bound or noise(model, result) < 10 * expected_noise(model)


@fuzz
@given(networks())
def test_weights_and_activations_of_eight_bits(model):
    """Ranges and means are from as many images as the default has; one of another kind may leave them, but no answer is
    worse than none.
    """
    assert decibels(model, compressed(model, samples=128)) >= 0
