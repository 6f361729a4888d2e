"""A storage alone in a model: what is rebuilt from what the file holds."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from onnx_lwdf.emit.stored import Runs, Store, Values
from onnx_lwdf.graph import Graph
from onnx_lwdf.runtime import open_session, run


@dataclass(frozen=True)
class Emitted:
    """A model whose output is the stored tensor."""

    model: onnx.ModelProto
    answers: list[np.ndarray]  # of onnxruntime and of the reference evaluator, where each can run it

    @property
    def operators(self) -> list[str]:
        return [node.op_type for node in self.model.graph.node if node.op_type != "Identity"]


def rebuild(store: Store, values: np.ndarray, bits: int, axis: int | None = None, runs: Runs | None = None) -> Emitted:
    """Store the values, and run what rebuilds them."""
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 18]> net (int64[1] x) => () { }')
    graph = Graph(model)
    kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    (held,) = store(graph, [Values("weight", values, bits, axis, kind, runs)])
    name = graph.add("Identity", [held.tensor], "rebuilt")
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, values.shape))
    graph.outputs = [name]
    graph.commit()
    feed = {"x": np.zeros(1, np.int64)}
    answers = [run(open_session(model), feed)[0]]
    if not model.graph.sparse_initializer:  # neither the full check nor the evaluator knows them
        onnx.checker.check_model(model, full_check=True)
        answers.append(ReferenceEvaluator(model).run(None, feed)[0])
    return Emitted(model, answers)


def kernels(model: onnx.ModelProto) -> list[str]:
    """The operators that onnxruntime runs at every inference."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        open_session(model, optimized_path=path)
        return [node.op_type for node in onnx.load(path).graph.node]
