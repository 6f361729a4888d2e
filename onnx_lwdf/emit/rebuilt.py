"""Stored weights as onnxruntime rebuilds them at load: here one at a time, into files.

onnxruntime keeps all that it rebuilds in memory, and without that optimization it rebuilds all weights before the first
layer runs. A model that does not fit into memory is run with what each chain of operators over constants gives.
"""

from __future__ import annotations

import onnx

from onnx_lwdf.graph import Graph, operator
from onnx_lwdf.runtime import copy_of, open_session, run


def rebuilt(graph: Graph) -> onnx.ModelProto:
    """The graph's model, its weights rebuilt where the graph's large values are in files. DequantizeLinear remains."""
    if graph.scratch is None:
        return graph.model
    twin = graph.twin()
    known, ends = set(twin.initializers), dict[str, None]()
    for node in twin.nodes:
        read = [name for name in node.input if name]
        if read and operator(node) != "DequantizeLinear" and known.issuperset(read):
            known.update(node.output)
        else:
            ends.update(dict.fromkeys(name for name in read if name in known and name not in twin.initializers))
    for name in ends:
        part = Graph(copy_of(twin.model, [name]))
        part.commit()
        del part.model.graph.input[:]
        (value,) = run(open_session(part.model), {}, [name])
        twin.reroute(list(twin.consumers[name]), name, twin.add_constant(f"{name}.rebuilt", value))
    twin.commit()
    return twin.model
