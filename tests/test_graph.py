"""The index and the edits of a graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_lwdf.graph import Graph, node_name
from tests.nets import answers, residual, samples, with_weights


def test_constants_through_constant_identity_and_operators():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N,2] x) => (float[N,2] y) {
        c = Constant <value = float[2] {1.0, 2.0}> ()
        i = Identity (c)
        m = Mul (i, w)
        y = Add (x, m)
    }
    """
    graph = Graph(with_weights(text, {"w": np.array([3.0, 4.0])}))
    np.testing.assert_array_equal(graph.constant("c"), [1, 2])
    np.testing.assert_array_equal(graph.constant("i"), [1, 2])
    np.testing.assert_array_equal(graph.constant("m"), [3, 8])  # folded by onnx-graphsurgeon
    assert graph.constant("x") is None
    assert graph.constant("y") is None
    with pytest.raises(ValueError, match="read-only"):
        graph.constant("c")[0] = 5


def test_commit_without_edits_keeps_everything():
    model = residual()
    model.doc_string = "doc"
    model.metadata_props.add(key="k", value="v")
    model.graph.node[0].doc_string = "first"
    before = onnx.ModelProto()
    before.CopyFrom(model)
    Graph(model).commit()
    assert model == before


def test_commit_sorts_and_drops_what_is_dead():
    model = residual()
    graph = Graph(model)
    doubled = graph.add("Add", ["y", "y"], "twice")
    graph.add("Relu", ["a0"], "dead")
    graph.nodes.reverse()
    graph.outputs = [doubled]
    model.graph.output[0].name = doubled
    graph.commit()
    onnx.checker.check_model(model, full_check=True)
    assert "dead" not in {name for node in model.graph.node for name in node.output}
    original = residual()
    np.testing.assert_allclose(
        answers(model, samples(model))[0], 2 * answers(original, samples(original))[0], rtol=1e-6
    )


def test_set_input_copies_a_shared_initializer_and_overwrites_an_own_one():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[2] x) => (float[2] y) { a = Add (x, w)  b = Mul (a, w)  y = Add (b, v) }
    """
    model = with_weights(text, {"w": np.ones(2), "v": np.ones(2)})
    graph = Graph(model)
    add, _, last = graph.nodes
    graph.set_input(add, 1, np.zeros(2, np.float32), "w")
    graph.set_input(last, 1, np.full(2, 7, np.float32), "v")
    graph.commit()
    np.testing.assert_array_equal(numpy_helper.to_array(graph.initializers["w"]), [1, 1])
    np.testing.assert_array_equal(numpy_helper.to_array(graph.initializers["v"]), [7, 7])
    np.testing.assert_array_equal(answers(model, {"x": np.ones(2, np.float32)})[0], [8, 8])


def test_a_scalar_constant_stays_a_scalar():
    graph = Graph(residual())
    name = graph.add_constant("s", np.float32(3))
    assert list(graph.initializers[name].dims) == []  # onnxruntime's selectors ask for rank 0


def test_tensors_that_a_subgraph_reads_are_captured():
    then = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["a"], ["t"])], "then", [], [onnx.helper.make_empty_tensor_value_info("t")]
    )
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[2] x, bool k) => (float[2] y) { a = Relu (x)  b = Relu (a)  y = Relu (b) }
    """
    model = onnx.parser.parse_model(text)
    model.graph.node[2].CopyFrom(onnx.helper.make_node("If", ["k"], ["y"], then_branch=then, else_branch=then))
    graph = Graph(model)
    assert "a" in graph.captured
    assert graph.sole_consumer("a") is None
    graph.commit()
    assert [node.op_type for node in model.graph.node] == ["Relu", "If"]  # b led nowhere


def test_names():
    graph = Graph(residual())
    assert graph.unique("x") == "x_1"
    assert graph.unique("x") == "x_2"
    assert node_name(onnx.helper.make_node("Conv", ["a", "b"], ["c"])) == "Conv:c"
