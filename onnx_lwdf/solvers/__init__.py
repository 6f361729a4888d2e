"""How a layer's weight is found: pure functions of arrays, one method a file, one visible table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from onnx_lwdf.solvers import descent, gptq, rtn, squant
from onnx_lwdf.solvers.problem import LayerProblem, LayerSolution

Solver = Callable[[LayerProblem], LayerSolution]

SOLVERS: Mapping[str, Solver] = {
    "rtn": rtn.solve,  # nearest rounding
    "squant": squant.solve,  # flips that cancel the error sums, without data
    "gptq": gptq.solve,  # second-order rounding on H
    "descent": descent.solve,  # second-order rounding, then coordinate descent on H
}
