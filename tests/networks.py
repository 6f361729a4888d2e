"""Random convolutional networks for property tests: branches, residuals, concatenations, shared weights, groups, odd shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnx_lwdf.activations.images import scenes
from onnx_lwdf.activations.normalization import ASSUMED, ASSUMED_GREY, Normalization
from onnx_lwdf.runtime import Array
from tests.nets import trained

F32 = onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class Tensor:
    name: str
    channels: int
    height: int
    width: int


@dataclass
class Network:
    """A network that grows; every draw comes from Hypothesis, every weight from a seeded generator."""

    draw: Callable[..., object]
    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)

    def choose(self, *options: object) -> object:
        return self.draw(st.sampled_from(options))

    def add(self, op: str, inputs: list[str], shape: tuple[int, int, int], **attributes: object) -> Tensor:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{op}_{len(self.nodes)}", **attributes))
        self.tensors.append(Tensor(name, *shape))
        return self.tensors[-1]

    def weight(self, *shape: int, mean: float = 0.0) -> str:
        name = f"w{len(self.weights)}"
        deviation = 1 / np.sqrt(max(np.prod(shape[1:]), 1))
        self.weights[name] = (mean + deviation * self.rng.standard_normal(shape)).astype(np.float32)
        return name

    def shared(self, *shape: int) -> str:
        """A weight of this shape, another layer's where there is one and the draw says so."""
        there = [name for name, value in self.weights.items() if value.shape == shape]
        return there[0] if there and self.draw(st.booleans()) else self.weight(*shape)


def conv(net: Network, x: Tensor) -> Tensor:
    kernel, stride, dilation = net.choose(1, 3, 3), net.choose(1, 1, 2), net.choose(1, 1, 2)
    groups = net.choose(*(g for g in (1, 1, 2, x.channels) if x.channels % g == 0))
    out = groups * net.draw(st.integers(1, 8 // groups if groups < 8 else 1))
    reach = dilation * (kernel - 1)
    pads = net.choose([reach // 2] * 4, [0, reach, reach, 0])
    inputs = [x.name, net.shared(out, x.channels // groups, kernel, kernel)]
    inputs += [net.weight(out)] if net.draw(st.booleans()) else []
    sizes = (1 + (n + pads[0] + pads[2] - reach - 1) // stride for n in (x.height, x.width))
    attributes = {"strides": [stride] * 2, "dilations": [dilation] * 2, "pads": pads, "group": groups}
    return net.add("Conv", inputs, (out, *sizes), **attributes)


def transposed(net: Network, x: Tensor) -> Tensor:
    out = net.draw(st.integers(1, 6))
    if x.height > 16 or x.width > 16:
        return x
    return net.add(
        "ConvTranspose", [x.name, net.weight(x.channels, out, 2, 2)], (out, 2 * x.height, 2 * x.width), strides=[2, 2]
    )


def batchnorm(net: Network, x: Tensor) -> Tensor:
    values = [net.weight(x.channels, mean=mean) for mean in (1.5, 0.3, 0.0, 1.0)]
    return net.add("BatchNormalization", [x.name, *values], (x.channels, x.height, x.width))


def activation(net: Network, x: Tensor) -> Tensor:
    shape, op = (x.channels, x.height, x.width), net.choose("Relu", "Relu", "Clip", "LeakyRelu", "HardSwish", "SiLU")
    if op == "SiLU":
        return net.add("Mul", [x.name, net.add("Sigmoid", [x.name], shape).name], shape)
    if op != "Clip":
        return net.add(op, [x.name], shape)
    net.weights |= {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    return net.add("Clip", [x.name, "zero", "six"], shape)


def pool(net: Network, x: Tensor) -> Tensor:
    if min(x.height, x.width) < 2:
        return x
    shape = x.channels, x.height // 2, x.width // 2
    return net.add(net.choose("MaxPool", "AveragePool"), [x.name], shape, kernel_shape=[2, 2], strides=[2, 2])


def join(net: Network, x: Tensor) -> Tensor:
    """A residual sum or a concatenation with an earlier tensor of fitting size."""
    same = [t for t in net.tensors if (t.height, t.width) == (x.height, x.width)]
    other = net.choose(*same)
    if other.channels == x.channels and net.draw(st.booleans()):
        return net.add("Add", [other.name, x.name], (x.channels, x.height, x.width))
    if other.channels + x.channels > 16:
        return x
    return net.add("Concat", [x.name, other.name], (x.channels + other.channels, x.height, x.width), axis=1)


def scale(net: Network, x: Tensor) -> Tensor:
    constant = net.weight(x.channels, 1, 1, mean=1.0)
    return net.add(net.choose("Mul", "Add", "Sub"), [x.name, constant], (x.channels, x.height, x.width))


STEPS = (
    conv,
    conv,
    conv,
    conv,
    batchnorm,
    batchnorm,
    activation,
    activation,
    activation,
    join,
    join,
    pool,
    scale,
    transposed,
)


@st.composite
def networks(draw: Callable[..., object]) -> onnx.ModelProto:
    net = Network(draw, np.random.default_rng(draw(st.integers(0, 2**16))))
    height, width = draw(st.integers(5, 12)), draw(st.integers(5, 12))
    source = Tensor("x", draw(st.sampled_from((1, 3))), height, width)
    net.tensors.append(source)
    here = conv(net, source)
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=10)):
        behind = draw(st.integers(0, 3)) == 0  # a branch from anywhere
        here = step(net, net.choose(*net.tensors[1:]) if behind else here)
    outputs = [here.name]
    if draw(st.booleans()):
        pooled = net.add("GlobalAveragePool", [here.name], (here.channels, 1, 1))
        flat = net.add("Flatten", [pooled.name], (here.channels, 1, 1))
        op = draw(st.sampled_from(("Gemm", "MatMul")))
        outputs = [net.add(op, [flat.name, net.weight(here.channels, 4)], (4, 1, 1)).name]
    if draw(st.booleans()):
        outputs.append(net.choose(*(t.name for t in net.tensors[1:] if t.name not in outputs)))
    rows = {node.output[0] for node in net.nodes if node.op_type in ("Flatten", "Gemm", "MatMul")}
    fixed = draw(st.sampled_from((0, 1, 2)))
    used = {name for node in net.nodes for name in node.input}
    graph = helper.make_graph(
        net.nodes,
        "network",
        [helper.make_tensor_value_info("x", F32, ["N", source.channels, height, width])],
        [helper.make_tensor_value_info(name, F32, [None] * (2 if name in rows else 4)) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in net.weights.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="them")
    model.metadata_props.add(key="theirs", value="kept")
    trained(model, {"x": images(source.channels, height, width, 32, seed=7)})
    if fixed:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = fixed
    return model


def normalized(model: onnx.ModelProto) -> dict[str, tuple[float, ...]]:
    """The options that say how the network's input is normalized."""
    known = _normalization(model.graph.input[0].type.tensor_type.shape.dim[1].dim_value)
    return {"input_mean": known.mean, "input_std": known.std}


def images(channels: int, height: int, width: int, count: int, seed: int) -> Array:
    """What `normalized` says of the network's inputs."""
    return _normalization(channels).apply(scenes(count, channels, height, width, np.random.default_rng(seed)))


def _normalization(channels: int) -> Normalization:
    return ASSUMED_GREY if channels == 1 else ASSUMED
