"""Every kind of graph: compressed or left alone with its reason, with the right answer; never a traceback."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

import onnx_lwdf
from onnx_lwdf import model_io
from onnx_lwdf.activations.images import scenes
from onnx_lwdf.errors import ModelError, OptionError
from onnx_lwdf.graph import Graph
from onnx_lwdf.layers import find_layers
from onnx_lwdf.runtime import Array
from tests.nets import FAST, answers, residual, samples, sqnr_db, with_weights

IMAGE = "(float[N,3,9,10] x) => (float[N,4,A,B] y)"
SIZES = {"N": 2, "C": 5, "H": 9, "W": 9, "L": 9, "K": 7}
LEAST_DB = 20  # these nets have 25 to 50 at 8 bits, on white noise and not on the images that the ranges are from
RNG = np.random.default_rng(0)
F32 = np.float32


def weight(*shape: int) -> Array:
    return RNG.normal(0, 1 / np.sqrt(max(np.prod(shape[1:]), 1)), shape)


W, V = weight(6, 3, 1, 1), weight(4, 6, 1, 1)  # of most nets: x -> 6 channels -> 4 channels
CODES, GRID = RNG.integers(-127, 127, (4, 3, 1, 1)).astype(np.int8), {"s": F32(0.05), "z": np.uint8(128)}
WEIGHT_GRID = {"ws": F32(0.01), "wz": np.int8(0)}

# name -> signature, body, tensors, options of the header, reasons of what is kept
Row = tuple[str, str, dict[str, Array], dict[str, str], set[str]]
TABLE: dict[str, Row] = {}


def row(
    name: str, head: str, body: str, tensors: dict[str, Array], kept: set[str] = frozenset(), **header: str
) -> None:
    TABLE[name] = head, body, tensors, header, kept


def between(name: str, operators: str, tensors: dict[str, Array], kept: set[str] = frozenset(), **header: str) -> None:
    """A layer, operators from a to b, another layer."""
    row(name, IMAGE, f"a = Conv (x, w) {operators} y = Conv (b, v)", {"w": W, "v": V, **tensors}, kept, **header)


def before_weight(name: str, operator: str, tensors: dict[str, Array], kept: set[str] = frozenset()) -> None:
    row(name, IMAGE, f"u = {operator} a = Conv (x, u) y = Conv (a, v)", {"v": weight(4, 4, 1, 1), **tensors}, kept)


LINE, VOLUME = "(float[N,3,32] x) => (float[N,4,M] y)", "(float[N,2,6,6,6] x) => (float[N,4,A,B,C] y)"
ROWS, TRANSPOSED_ROWS = "(float[4,6] x) => (float[4,5] y)", "(float[6,4] x) => (float[4,5] y)"
row(
    "1-D",
    LINE,
    "a = Conv <strides=[2]> (x, w) y = Conv <dilations=[2]> (a, v)",
    {"w": weight(6, 3, 3), "v": weight(4, 6, 3)},
)
row("3-D", VOLUME, "a = Conv (x, w) y = Conv (a, v)", {"w": weight(6, 2, 3, 3, 3), "v": weight(4, 6, 1, 1, 1)})
for pad in ("SAME_UPPER", "SAME_LOWER", "VALID"):
    conv = f'Conv <auto_pad="{pad}", strides=[2,2]>'
    row(pad, IMAGE, f"a = {conv} (x, w) y = {conv} (a, v)", {"w": weight(6, 3, 3, 3), "v": weight(4, 6, 3, 3)})
row("Pad", IMAGE, "p = Pad (x, n) y = Conv (p, w)", {"w": weight(4, 3, 3, 3), "n": np.array([0, 0, 0, 0, 0, 0, 1, 2])})
row(
    "Pad crops",
    IMAGE,
    "p = Pad (x, n) y = Conv (p, w)",
    {"w": weight(4, 3, 3, 3), "n": np.array([0, 0, -1, 0, 0, 0, 1, 2])},
)
row(
    "Pad mirrors",
    IMAGE,
    'p = Pad <mode="reflect"> (x, n) y = Conv (p, w)',
    {"w": weight(4, 3, 3, 3), "n": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
)
row(
    "Pad of axes",
    IMAGE,
    "p = Pad (x, n, , i) y = Conv (p, w)",
    {"w": weight(4, 3, 3, 3), "n": np.array([1, 1, 1, 1]), "i": np.array([2, 3])},
    opset="18",
)
row(
    "ConvTranspose",
    IMAGE,
    "a = Conv (x, w) y = ConvTranspose <strides=[2,2], output_padding=[1,1], pads=[1,1,1,1]> (a, v, b)",
    {"w": W, "v": weight(6, 4, 3, 3), "b": weight(4)},
    {"onnxruntime has no integer ConvTranspose; format qdq keeps it in float"},
)
for transposed in (0, 1):
    for factor in (1.0, 0.5):
        for bias in ((), (1, 5), (5,), (1,)):
            row(
                f"Gemm transB={transposed} alpha={factor} bias {bias}",
                ROWS,
                f"y = Gemm <transB={transposed}, alpha={factor}, beta={1.5 - factor / 2}> (x, w, b)",
                {"w": weight(5, 6) if transposed else weight(6, 5), "b": weight(*bias)},
            )
row("Gemm without bias", ROWS, "y = Gemm <alpha=0.5, beta=0.5> (x, w)", {"w": weight(6, 5)})
row(
    "Gemm left alone",
    "(float[4,6] x, float[6,4] z) => (float[4,5] y, float[4,5] u, float[4,5] t)",
    "y = Gemm (x, w, b) u = Gemm <transA=1> (z, w) t = Gemm (x, w)",
    {"w": weight(6, 5), "b": weight(4, 5)},
    {"the bias differs by row", "the input is transposed (transA)"},
)
row(
    "MatMul",
    "(float[N,7,6] x) => (float[N,7,5] y)",
    "a = MatMul (x, w) c = Add (b, a) d = Relu (c) y = MatMul (d, v)",
    {"w": weight(6, 8), "b": weight(8), "v": weight(8, 5)},
)
row("MatMul of a vector", "(float[6] x) => (float[5] y)", "y = MatMul (x, w)", {"w": weight(6, 5)})
row(
    "MatMul left alone",
    "(float[N,2,6,6] x) => (float[N,2,6,6] y)",
    "a = MatMul (w, x) b = MatMul (a, v) y = MatMul (b, w)",
    {"w": weight(6, 6), "v": weight(2, 6, 6)},
    {"the constant is on the left side", "the weight has 3 dimensions, not 2"},
)
row(
    "attention",
    "(float[N,7,8] x) => (float[N,7,8] y)",
    "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv) t = Transpose <perm=[0,2,1]> (k) s = MatMul (q, t)"
    "p = Softmax (s) o = MatMul (p, v) y = MatMul (o, wo)",
    {name: weight(8, 8) for name in ("wq", "wk", "wv", "wo")},
    {"the weight is not constant"},
)
row(
    "LSTM and GRU",
    "(float[5,N,6] x) => (float[5,1,N,4] y, float[5,1,N,4] z)",
    "a = MatMul (x, w) y, h, c = LSTM <hidden_size=4> (a, li, lr) z = GRU <hidden_size=4> (a, gi, gr)",
    {"w": weight(6, 6), "li": weight(1, 16, 6), "lr": weight(1, 16, 4), "gi": weight(1, 12, 6), "gr": weight(1, 12, 4)},
    {"the weights of recurrent layers stay float"},
)
row(
    "If",
    IMAGE,
    "a = Conv (x, w) s = ReduceSum <keepdims=0> (a) c = Greater (s, zero)"
    "y = If (c) <then_branch = one () => (float[N,4,A,B] t) { t = Conv (a, v) },"
    "           else_branch = two () => (float[N,4,A,B] e) { r = Relu (a) e = Conv (r, v) }>",
    {"w": W, "v": V, "zero": F32(0)},
    {"inside a If"},
)
row(
    "Loop",
    "(float[N,4] x) => (float[N,4] y)",
    "a = MatMul (x, w) y = Loop (n, , a) <body = step (int64 i, bool c, float[N,4] s) => (bool go, float[N,4] o) {"
    "go = Identity (c) u = MatMul (s, w) o = Tanh (u) }>",
    {"w": weight(4, 4), "n": np.array(3)},
    {"inside a Loop"},
)
row(
    "Scan",
    "(float[N,5,4] x) => (float[4] f, float[5,4] y)",
    "a = MatMul (x, w) q = ReduceMean <axes=[0], keepdims=0> (a) f, y = Scan <num_scan_inputs=1, body ="
    "step (float[4] s, float[4] e) => (float[4] t, float[4] o) { u = MatMul (e, w) t = Add (s, u) o = Identity (t) }> (z, q)",
    {"w": weight(4, 4), "z": np.zeros(4)},
    {"inside a Scan"},
)
row(
    "shared weight",
    "(float[N,4,8,8] x) => (float[N,4,8,8] y)",
    "a = Conv (x, w) b = Relu (a) y = Conv (b, w)",
    {"w": weight(4, 4, 1, 1)},
)
row(
    "shared by rows and columns",
    "(float[N,4] x) => (float[N,4] y)",
    "a = Gemm (x, w) y = Gemm <transB=1> (a, w)",
    {"w": weight(4, 4)},
)
row(
    "shared bias",
    IMAGE,
    "a = Conv (x, w, b) c = Relu (a) y = Conv (c, v, b)",
    {"w": weight(4, 3, 1, 1), "v": weight(4, 4, 1, 1), "b": weight(4)},
)
row(
    "weight is an output",
    "(float[N,3,8,8] x) => (float[N,4,8,8] y, float[6,3,1,1] w, float[6] b)",
    "a = Conv (x, w, b) y = Conv (a, v)",
    {"w": W, "v": V, "b": weight(6)},
    {"the weight is an output of the model"},
)
row("input is an output", "(float[N,3,8,8] x) => (float[N,6,8,8] y, float[N,3,8,8] x)", "y = Conv (x, w)", {"w": W})
row("overridable", "(float[N,3,8,8] x, float[6,3,1,1] w) => (float[N,6,8,8] y)", "y = Conv (x, w)", {"w": W})
before_weight("Identity", "Identity (w)", {"w": weight(4, 3, 1, 1)})
before_weight("Reshape", "Reshape (w, t)", {"w": weight(4, 3), "t": np.array([4, 3, 1, 1])})
before_weight("Transpose", "Transpose <perm=[3,2,0,1]> (w)", {"w": weight(1, 1, 3, 4)})
before_weight("Cast", "Cast <to=1> (w)", {"w": weight(4, 3, 1, 1).astype(np.float16)})
before_weight("Mul", "Mul (w, f)", {"w": weight(4, 3, 1, 1), "f": F32(0.5)})
before_weight(
    "DequantizeLinear", "DequantizeLinear (w, ws, wz)", {"w": CODES, **WEIGHT_GRID}, {"the weight is already quantized"}
)
row(
    "Split",
    IMAGE,
    "u, t = Split <axis=0> (w) a = Conv (x, u) b = Conv (x, t) y = Concat <axis=1> (a, b)",
    {"w": weight(4, 3, 1, 1)},
)
row(
    "partly quantized",
    IMAGE,
    "q = QuantizeLinear (x, s, z) a = QLinearConv (q, s, z, w, ws, wz, s, z) b = DequantizeLinear (a, s, z) y = Conv (b, v)",
    {"w": CODES, **WEIGHT_GRID, **GRID, "v": weight(4, 4, 1, 1)},
    {"already quantized"},
)
row(
    "float16 at the ends",
    "(float16[N,3,8,8] x) => (float16[N,6,8,8] y)",
    "c = Cast <to=1> (x) a = Conv (c, w) y = Cast <to=10> (a)",
    {"w": W},
)
row(
    "bytes",
    "(uint8[N,8,8,3] x) => (float[N,6,8,8] y)",
    "c = Cast <to=1> (x) t = Transpose <perm=[0,3,1,2]> (c) y = Conv (t, w)",
    {"w": W},
)
row(
    "indices",
    "(int64[N,5] x) => (float[N,5,4] y)",
    "e = Gather (t, x) y = MatMul (e, w)",
    {"t": weight(10, 6), "w": weight(6, 4)},
)
row(
    "two inputs, two outputs, a scalar",
    "(float[N,3,8,8] x, float[N,6] z, float k) => (float[N,6,8,8] y, float[N,6] u)",
    "a = Conv (x, w) u = MatMul (z, m) r = Unsqueeze (u, i) b = Add (a, r) y = Mul (b, k)",
    {"w": W, "m": weight(6, 6), "i": np.array([2, 3])},
)
row("open channels", "(float[N,C,L] x) => (float[N,4,M] y)", "y = Conv (x, w)", {"w": weight(4, 5, 3)})
row("open features", "(float[N,K] x) => (float[N,4] y)", "y = Gemm <transB=1> (x, w)", {"w": weight(4, 7)})
row(
    "empty tensors",
    "(float[N,3,8,8] x) => (float[N,6,8,8] y, float[N,0,8,8] t, float[0] u)",
    "y = Conv (x, w) t = Conv (x, e) u = Identity (n)",
    {"w": W, "e": np.zeros((0, 3, 1, 1)), "n": np.zeros(0)},
    {"the weight is empty"},
)
between("SiLU", "s = Sigmoid (a) b = Mul (a, s)", {})
between("HardSwish", "b = HardSwish (a)", {})
between(
    "HardSwish in parts",
    "p = Add (a, three) c = Clip (p, zero, six) m = Mul (a, c) b = Div (m, six)",
    {"three": F32(3), "zero": F32(0), "six": F32(6)},
)
between("Gelu", "b = Gelu (a)", {}, opset="20", ir="9")
between("Gelu in parts", "d = Div (a, r) e = Erf (d) f = Add (e, o) b = Mul (a, f)", {"r": F32(1.4142), "o": F32(1)})
between("PRelu", "b = PRelu (a, s)", {"s": np.full((6, 1, 1), 0.2)})
between(
    "squeeze and excitation",
    "r = Relu (a) g = GlobalAveragePool (r) c = Conv (g, i) d = Conv (c, o) e = HardSigmoid (d) b = Mul (r, e)",
    {"i": weight(2, 6, 1, 1), "o": weight(6, 2, 1, 1)},
)
# Normalizations that need no stored statistics, as operators and as exporters write them out.
AFFINE = {"g": RNG.uniform(0.5, 1.5, (6, 1, 1)), "s": RNG.normal(0, 0.5, (6, 1, 1))}
ONES, ZEROS, FLAT = np.ones(3, F32), np.zeros(3, F32), {name: value.ravel() for name, value in AFFINE.items()}
between("GroupNormalization", "b = GroupNormalization <num_groups=3> (a, g, s)", FLAT, opset="21")
between("InstanceNormalization", "b = InstanceNormalization (a, g, s)", FLAT)
between(
    "GroupNormalization in parts",
    "r = Reshape (a, n) i = InstanceNormalization (r, one, zero) h = Shape (a) q = Reshape (i, h) m = Mul (q, g)"
    "b = Add (m, s)",
    {"n": np.array([0, 3, -1]), "one": ONES, "zero": ZEROS, **AFFINE},
)
between(
    "LayerNormalization",
    "t = Transpose <perm=[0,2,3,1]> (a) l = LayerNormalization (t, g, s) b = Transpose <perm=[0,3,1,2]> (l)",
    FLAT,
)
between(
    "LayerNormalization in parts",
    "m = ReduceMean <axes=[1]> (a) d = Sub (a, m) p = Pow (d, two) q = ReduceMean <axes=[1]> (p) e = Add (q, tiny)"
    "r = Sqrt (e) n = Div (d, r) k = Mul (n, g) b = Add (k, s)",
    {"two": F32(2), "tiny": F32(1e-5), **AFFINE},
)
between("Resize", 'b = Resize <mode="nearest"> (a, , f)', {"f": np.array([1, 1, 2, 2], F32)})
between("an operator of onnxruntime", "b = com.microsoft.QuickGelu (a)", {}, domains=', "com.microsoft" : 1')
row(
    "Add and Mul of itself",
    "(float[N,3,8,8] x) => (float[N,6,8,8] y)",
    "a = Conv (x, w) b = Mul (a, a) y = Add (b, b)",
    {"w": W},
)
row("MatMul and itself", "(float[N,6] x) => (float[N,6] y)", "a = MatMul (x, w) y = Add (a, a)", {"w": weight(6, 6)})
row(
    "scalars behind",
    "(float[N,3,8,8] x) => (float[N,6,8,8] y)",
    "a = Conv (x, w) b = Add (a, k) c = Mul (k, b) y = Sub (c, k)",
    {"w": W, "k": F32(2)},
)
row(
    "more channels behind",
    "(float[N,3,8,8] x) => (float[N,6,8,8] y)",
    "a = Conv (x, w) y = Add (a, k)",
    {"w": weight(1, 3, 1, 1), "k": weight(6, 1, 1)},
)


def model_of(name: str) -> onnx.ModelProto:
    head, body, tensors, header, _ = TABLE[name]
    options = {"ir": "8", "opset": "17", "domains": "", **header}
    text = f"""<ir_version: {options["ir"]}, opset_import: ["" : {options["opset"]}{options["domains"]}]>"""
    return with_weights(f"{text} net {head} {{ {body} }}", {n: np.asarray(v) for n, v in tensors.items()})


def feeds_of(model: onnx.ModelProto) -> dict[str, Array]:
    rng, weights = np.random.default_rng(1), {tensor.name for tensor in model.graph.initializer}
    feeds = {}
    for value in (value for value in model.graph.input if value.name not in weights):
        kind = value.type.tensor_type
        shape = [dim.dim_value or SIZES[dim.dim_param] for dim in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        most = 255 if dtype == np.uint8 else 9
        drawn = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, most, shape)
        feeds[value.name] = np.asarray(drawn).astype(dtype)
    return feeds


def assert_same_answers(
    source: onnx.ModelProto, model: onnx.ModelProto, feeds: Mapping[str, Array] | None = None
) -> None:
    for side in ("input", "output"):
        names = [value.name for value in getattr(model.graph, side)]
        weights = {tensor.name for tensor in source.graph.initializer} if side == "input" else ()
        assert names == [value.name for value in getattr(source.graph, side) if value.name not in weights]
    feeds = feeds or feeds_of(source)
    for exact, answer in zip(answers(source, feeds), answers(model, feeds), strict=True):
        assert exact.shape == answer.shape
        assert exact.dtype == answer.dtype
        assert exact.size == 0 or sqnr_db(exact, answer) > LEAST_DB


@pytest.mark.parametrize("activations", [8, "float"])
@pytest.mark.parametrize("name", TABLE)
def test_graph(name, activations):
    if name == "empty tensors" and ort.__version__.startswith("1.19."):
        pytest.skip("onnxruntime 1.19 divides by the number of channels, and ends the process")
    source, kept = model_of(name), set(TABLE[name][-1])
    options = {} if name == "bytes" else {"input_range": (-4.0, 4.0)}
    result = onnx_lwdf.compress(source, activation_bits=activations, samples=16, jobs=1, **options)
    reasons = {layer.reason for layer in result.report.kept}
    assert reasons == {reason for reason in kept if activations == 8 or "no integer" not in reason}
    assert result.report.compressed
    # Excitations follow an image's brightness, of which white noise has none.
    excited = {"x": 8 * scenes(2, 3, 9, 10, np.random.default_rng(1)) - 4}
    assert_same_answers(source, result.model, excited if name == "squeeze and excitation" else None)


def test_an_already_quantized_model_is_refused():
    body = "q = QuantizeLinear (x, s, z) a = QLinearConv (q, s, z, w, ws, wz, s, z) y = DequantizeLinear (a, s, z)"
    text = f'<ir_version: 8, opset_import: ["" : 17]> net {IMAGE} {{ {body} }}'
    with pytest.raises(ModelError, match="nothing to compress: already quantized"):
        onnx_lwdf.compress(with_weights(text, {"w": CODES, **WEIGHT_GRID, **GRID}))


def test_what_onnxruntime_fused_is_named(tmp_path):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    ort.InferenceSession(residual().SerializeToString(), options, providers=["CPUExecutionProvider"])
    source = onnx.load(tmp_path / "fused.onnx")
    fused = [node for node in source.graph.node if node.op_type == "FusedConv"]
    assert fused
    result = onnx_lwdf.compress(source, **FAST)
    named = [layer for layer in result.report.kept if "onnxruntime's optimizer" in layer.reason]
    assert [layer.op for layer in named] == ["com.microsoft::FusedConv"] * len(fused)
    assert_same_answers(source, result.model)


@pytest.mark.parametrize("form", ["qdq", "packed"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_sizes_that_nobody_declared(side, form, tmp_path):
    """onnxruntime needs none, so exporters leave them out; what stands there stays, where the operator set is raised too."""
    source = residual()
    source.opset_import[0].version = 13
    (info,) = getattr(source.graph, side)
    info.type.tensor_type.ClearField("shape")
    given = {"input_shape": {"x": (1, 3, 16, 16)}} if side == "input" else {}
    result = onnx_lwdf.compress(source, tmp_path / "out.onnx", format=form, bits=6, **given, **FAST)
    assert result.report.compressed
    for name in ("input", "output"):
        assert list(getattr(result.model.graph, name)) == list(getattr(source.graph, name))
    assert onnx_lwdf.check(tmp_path / "out.onnx") == ()
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 3, 16, 16)).astype(np.float32)}
    assert sqnr_db(answers(source, feeds)[0], answers(result.model, feeds)[0]) > LEAST_DB
    if side == "input":
        with pytest.raises(OptionError, match="no shape; give --input-shape x:"):
            onnx_lwdf.compress(source)


def test_local_functions_are_entered():
    text = f"""
    <ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    net {IMAGE} {{ a = my.Conv (x, w)  b = my.BatchNormalization (a)  y = my.Conv (b, v) }}
    <domain: "my", opset_import: ["" : 17]> Conv (p, q) => (r) {{ n = Neg (p)  r = Conv (n, q) }}
    <domain: "my", opset_import: ["" : 17]> BatchNormalization (p) => (r) {{ r = Add (p, p) }}
    """
    source = with_weights(text, {"w": W, "v": V})
    result = onnx_lwdf.compress(source, samples=16, jobs=1, input_range=(-4.0, 4.0))
    assert len(result.report.compressed) == 2
    assert_same_answers(source, result.model)


STRANGE = {
    "repeated or empty": (["", "", ""], {}),
    "anything": (
        ["a b\n[x]/*?", "é\x1b[2J", "..//"],
        {"x": "im\nage:0", "y": "out/[]*", "w": "w\x07", "v": "é.scale", "a": "a.scale", "b": "a.codes"},
    ),
    "ours": (
        ["folded.1", "a/QuantizeLinear", "tap"],
        {"a": "x.stored", "b": "x.codes", "w": "v.scale", "v": "constant", "x": "tap"},
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_names(name):
    nodes, tensors = STRANGE[name]
    source = with_weights(
        f'<ir_version: 8, opset_import: ["" : 17]> net {IMAGE} {{ a = Conv (x, w) b = Relu (a) y = Conv (b, v) }}',
        {"w": W, "v": V},
    )
    for node, name_of_node in zip(source.graph.node, nodes, strict=True):
        node.name = name_of_node
        for names in (node.input, node.output):
            names[:] = [tensors.get(tensor, tensor) for tensor in names]
    for named in (*source.graph.initializer, *source.graph.input, *source.graph.output):
        named.name = tensors.get(named.name, named.name)
    result = onnx_lwdf.compress(source, samples=16, jobs=1, input_range=(-4.0, 4.0))
    assert_same_answers(source, result.model)


NEWEST = min(onnx.defs.onnx_opset_version(), 25)


@pytest.mark.parametrize("opset", [7, 8, 10, 14, 18, 21, NEWEST])
def test_every_operator_set(opset):
    """From the oldest, whose initializers are listed as inputs, to the newest; nothing but the number changes."""
    source = residual()
    for node in source.graph.node:
        if node.op_type == "Clip" and opset < 11:
            del node.input[1:]
            node.attribute.extend(helper.make_attribute(*pair) for pair in (("min", 0.0), ("max", 6.0)))
    unused = {name for name in ("zero", "six") if opset < 11}
    kept = [tensor for tensor in source.graph.initializer if tensor.name not in unused]
    copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del source.graph.initializer[:]
    source.graph.initializer.extend(copies)
    source.opset_import[0].version = opset
    source.ir_version = helper.find_min_ir_version_for(source.opset_import)
    if source.ir_version < 4:
        source.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in copies)
    result = onnx_lwdf.compress(source, samples=16, jobs=1, input_range=(-4.0, 4.0))
    assert len(result.report.compressed) == 5
    assert_same_answers(source, result.model)


OVER_FREQUENCIES = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,1,16,16] x) => (float[N,5] y) {
    a = Conv <pads = [1,1,1,1]> (x, w0, b0)
    r = Relu (a)
    m = MatMul (r, w1)
    BESIDE
    c = Conv (s, w2, b2)
    p = GlobalAveragePool (c)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, w3, b3)
}
"""


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("read_by_both", [False, True])
def test_a_matmul_over_the_last_axis_is_none_over_the_channels(bits, read_by_both):
    """As many channels as columns: nothing but the axis tells them apart."""
    rng = np.random.default_rng(0)
    beside = "d = Conv (r, w4, b4)\n    s = Add (m, d)" if read_by_both else "s = Relu (m)"
    text = OVER_FREQUENCIES.replace("BESIDE", beside)
    model = with_weights(
        text,
        {
            "w0": rng.normal(0, 0.5, (16, 1, 3, 3)),
            "b0": rng.normal(0.2, 0.5, 16),
            "w1": rng.normal(0, 0.3, (16, 16)) * np.geomspace(0.1, 1, 16)[:, None],
            "w2": rng.normal(0, 0.3, (8, 16, 1, 1)),
            "b2": rng.normal(0, 0.2, 8),
            "w3": rng.normal(0, 0.5, (5, 8)),
            "b3": rng.normal(0, 0.1, 5),
            **({"w4": rng.normal(0, 0.3, (16, 16, 1, 1)), "b4": rng.normal(0, 0.1, 16)} if read_by_both else {}),
        },
    )
    result = onnx_lwdf.compress(model, bits=bits, **FAST)
    feeds = samples(model, 16)
    assert sqnr_db(answers(model, feeds)[0], answers(result.model, feeds)[0]) > (30 if bits == 8 else 18)
    assert [layer.op for layer in result.report.kept] == (["MatMul"] if read_by_both else [])


@pytest.mark.parametrize("attributes", ["ceil_mode = 1, count_include_pad = 1, pads = [1,1,1,1]", "dilations = [2,2]"])
def test_pools_without_an_integer_kernel_stay_what_they_are(attributes):
    rng = np.random.default_rng(0)
    text = """
    <ir_version: 9, opset_import: ["" : 19]>
    net (float[N,3,16,16] x) => (float[N,5] y) {
        a = Conv <pads = [1,1,1,1]> (x, w0, b0)
        r = Relu (a)
        q = AveragePool <kernel_shape = [3,3], strides = [2,2], ATTRIBUTES> (r)
        c = Conv (q, w1, b1)
        p = GlobalAveragePool (c)
        y = Flatten (p)
    }
    """.replace("ATTRIBUTES", attributes)
    model = with_weights(
        text,
        {
            "w0": rng.normal(0, 0.3, (8, 3, 3, 3)),
            "b0": rng.normal(3, 0.5, 8),
            "w1": rng.normal(0, 0.5, (5, 8, 1, 1)),
            "b1": rng.normal(0, 0.1, 5),
        },
    )
    result = onnx_lwdf.compress(model, **FAST)
    feeds = samples(model, 16)
    exact = answers(model, feeds)[0]
    fused, plain = (answers(result.model, feeds, optimize=optimize)[0] for optimize in (True, False))
    assert sqnr_db(exact, plain) > 30
    assert sqnr_db(plain, fused) > 40  # a code on a tie
    weights_alone = onnx_lwdf.compress(model, activation_bits="float", **FAST).model
    assert "Max" not in {node.op_type for node in weights_alone.graph.node}  # nothing is there to be fused


def test_made_up_names_are_nobody_elses():
    model = residual()
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    for node, name in zip(convs, ["", f"Conv:{convs[0].output[0]}", f"Conv:{convs[0].output[0]}#2"], strict=False):
        node.name = name
    layers = find_layers(Graph(model))[0]
    assert len({layer.name for layer in layers}) == len(layers) == 5
    assert {convs[1].name, convs[2].name} <= {layer.name for layer in layers}
    feeds = samples(model)
    result = onnx_lwdf.compress(model, **FAST)
    assert sqnr_db(answers(model, feeds)[0], answers(result.model, feeds)[0]) > 20


def test_an_operator_that_was_withdrawn_and_still_runs(tmp_path):
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    net (float[N,3,8,8] x) => (float[N,4,8,8] y) {
        a = Conv (x, w)
        b = GroupNormalization <num_groups = 2> (a, scale, shift)
        y = Conv (b, v)
    }
    """
    model = with_weights(text, {"w": W, "v": V, "scale": np.array([1.0, 0.7]), "shift": np.array([0.1, -0.2])})
    with pytest.raises(onnx.checker.ValidationError, match=model_io.WITHDRAWN):
        onnx.checker.check_model(model)
    result = onnx_lwdf.compress(model, tmp_path / "out.onnx", **FAST)
    feeds = samples(model)
    assert sqnr_db(answers(model, feeds)[0], answers(result.model, feeds)[0]) > LEAST_DB
    assert onnx_lwdf.check(tmp_path / "out.onnx") == ()
