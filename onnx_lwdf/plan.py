"""How many bits each layer gets, from what the user asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from onnx_lwdf.config import Config
from onnx_lwdf.errors import OptionError
from onnx_lwdf.graph import Graph, operator
from onnx_lwdf.layers import WEIGHTED, Bits, Layer, Skipped, matches
from onnx_lwdf.layerwise import largest_code, method_of
from onnx_lwdf.sharing import sharing
from onnx_lwdf.solvers import SOLVERS

KEPT_BITS = 8


def plan_bits(graph: Graph, layers: Sequence[Layer], skipped: Sequence[Skipped], config: Config) -> dict[str, Bits]:
    """Layer name -> bits: a pattern's, else 8 for the first and last layer where they are kept, and for what shares a weight
    with these, else the general ones.

    Raises OptionError where a pattern of `bits_for` or `exclude` names no layer.
    """
    for option, patterns in (("bits-for", config.bits_for), ("exclude", config.exclude)):
        check_patterns(option, patterns, [*layers, *skipped])
    ends = set().union(*first_and_last(graph)) if config.keeps_first_last else set()
    for same in sharing(graph, layers) if ends else ():
        outputs = {layer.node.output[0] for layer in same}
        ends |= outputs if outputs & ends else set()
    plan: dict[str, Bits] = {}
    for layer in layers:
        weight, activation, free = config.weight_bits, config.activation_bits, config.auto_bits
        if layer.node.output[0] in ends:
            weight, activation, free = weight and KEPT_BITS, activation and KEPT_BITS, False
        for pattern, bits in config.bits_for.items():
            if matches(pattern, layer.name, layer.op):
                weight, activation, free = bits, activation and bits, False
        plan[layer.name] = _coded(Bits(weight, activation, free=free), config)
    return plan


def _coded(bits: Bits, config: Config) -> Bits:
    """The bits with multipliers where the method can choose them."""
    method = SOLVERS.get(method_of(config, bits, pruned=False))
    size = config.vector_size if method is not None and method.vectors else 0
    return replace(bits, vector_size=size, largest=largest_code(bits.activation, config))


def check_patterns(option: str, patterns: Iterable[str], layers: Sequence[Layer | Skipped]) -> None:
    """OptionError where a pattern names no layer."""
    for pattern in patterns:
        if not any(matches(pattern, layer.name, layer.op) for layer in layers):
            raise OptionError(f"{option} {pattern!r} matches no layer; --dry-run lists their names")


def first_and_last(graph: Graph) -> tuple[set[str], set[str]]:
    """Outputs of the weighted nodes that have no weighted node before them, and of those that have none behind them."""
    before = _reached(graph, forward=True)
    behind = _reached(graph, forward=False)
    weighted = [node.output[0] for node in graph.nodes if operator(node) in WEIGHTED]
    first = {output for output in weighted if not before[output]}
    return first, {output for output in weighted if not behind[output]}


def _reached(graph: Graph, forward: bool) -> Mapping[str, bool]:
    """Node's first output -> whether another weighted node lies before it (forward) or behind it."""
    carried: dict[str, bool] = {}  # tensor -> a weighted node lies on its far side
    result: dict[str, bool] = {}
    for node in graph.nodes if forward else reversed(graph.nodes):
        sources, targets = (node.input, node.output) if forward else (node.output, node.input)
        found = any(carried.get(name, False) for name in sources)
        result[node.output[0]] = found
        for name in targets:
            carried[name] = carried.get(name, False) or found or operator(node) in WEIGHTED
    return result
