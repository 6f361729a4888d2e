"""How a layer's weight is found: pure functions of arrays, one method a file, one visible table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onnx_lwdf.solvers import descent, gptq, magnitude, obs, rtn, squant
from onnx_lwdf.solvers.problem import LayerProblem, LayerSolution

Solver = Callable[[LayerProblem], LayerSolution]
Losses = Callable[[LayerProblem, Sequence[float]], list[float]]  # at rising sparsities


@dataclass(frozen=True, slots=True)
class Method:
    """A solver and what it can do. All of them round."""

    solve: Solver
    vectors: bool = False  # whether it takes multipliers for runs of inputs
    losses: Losses | None = None  # what pruning costs, for choosing the sparsity; None: it does not prune

    @property
    def prunes(self) -> bool:
        return self.losses is not None


SOLVERS: Mapping[str, Method] = {
    "rtn": Method(rtn.solve),  # nearest rounding
    "squant": Method(squant.solve),  # flips that cancel the error sums, without data
    "gptq": Method(gptq.solve, vectors=True),  # second-order rounding on H
    "descent": Method(descent.solve, vectors=True),  # second-order rounding, then coordinate descent on H
    "magnitude": Method(magnitude.solve, losses=magnitude.losses),  # the smallest weights go, nearest rounding
    "obs": Method(obs.solve, losses=obs.losses),  # second-order mask, refit and rounding within the mask
}
