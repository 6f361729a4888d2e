"""Float beside compressed in onnxruntime, on synthetic inputs that no layer was solved on.

SQNR = 10 log10(sum float^2 / sum (float - compressed)^2)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from onnx_lwdf.activations.taps import Feed
from onnx_lwdf.errors import ModelError
from onnx_lwdf.runtime import Array, copy_of, open_session, run, trim


@dataclass(frozen=True, slots=True)
class Fidelity:
    """SQNR in dB by tensor name; +inf where nothing differs."""

    outputs: Mapping[str, float]  # those that hold real numbers, of the same shape in both models
    layers: Mapping[str, float]  # by layer name

    @property
    def worst(self) -> float:
        """Of the outputs; +inf where none has an error to measure."""
        return min(self.outputs.values(), default=math.inf)

    def lost(self, sources: Mapping[str, Set[str]]) -> dict[str, float]:
        """The outputs with more error than signal: zeros would be nearer. `sources`: output -> the layers that it comes from.

        Where those are sound, the output is the tail of an activation, such as a score that is nowhere above 1e-6. Layers
        of zeros have no signal to lose: a detector that finds nothing on synthetic images.
        """
        bad = {name for name, db in self.layers.items() if not db >= 0 and db != -math.inf}
        return {name: db for name, db in self.outputs.items() if db < 0 and (bad & sources[name] or not sources[name])}

    def harmed(self, sources: Mapping[str, Set[str]], least: float) -> list[str]:
        """The layers below `least` dB that read from none such; `sources`: layer -> the layers that it reads from.

        A layer of zeros has no signal to compare with.
        """
        bad = {name for name, db in self.layers.items() if not db >= least and db != -math.inf}
        return [name for name in self.layers if name in bad and not bad & sources[name]]


def verify(
    original: onnx.ModelProto,
    preconditioned: onnx.ModelProto,
    compressed: onnx.ModelProto,
    layers: Mapping[str, str],
    feeds: Sequence[Feed],
    kept: Mapping[str, npt.NDArray[np.bool_]],
) -> Fidelity:
    """Compare the model's outputs with the original's, and layers with those of the preconditioned float model.

    `layers` maps layer names to their output tensors, `kept` tensors to the channels (axis 1) of the float model's that
    the compressed one still has, where it has not all.
    The outputs come from the file as it will run, with integer kernels. Raises ModelError where they are not finite.
    """
    outputs = [value.name for value in original.graph.output]
    exact = list(_answers(original, outputs, feeds))  # the session is closed: one at a time is what memory has to hold
    measured = _compare(outputs, exact, _answers(compressed, outputs, feeds), {})
    lost = [name for name, db in measured.items() if math.isnan(db)]
    if lost:
        raise ModelError(f"the compressed model's output {lost[0]!r} is not finite; nothing was written")
    trim()
    inner = [name for name in dict.fromkeys(layers.values()) if name not in outputs]
    ours, theirs = (_answers(copy_of(model, inner), inner, feeds) for model in (compressed, preconditioned))
    known = measured | _compare(inner, theirs, ours, kept)
    return Fidelity(measured, {name: known[tensor] for name, tensor in layers.items() if tensor in known})


def _answers(model: onnx.ModelProto, names: Sequence[str], feeds: Sequence[Feed]) -> Iterator[Sequence[Array]]:
    """What the model makes of each feed, by name."""
    if not names:
        return
    session = open_session(model, arena=False)
    del model  # the session has what it needs; a copy ends here
    for feed in feeds:
        yield run(session, feed, names)


def _compare(
    names: Sequence[str],
    reference: Iterable[Sequence[Array]],
    candidate: Iterable[Sequence[Array]],
    kept: Mapping[str, npt.NDArray[np.bool_]],
) -> dict[str, float]:
    """SQNR by tensor name. An index or a flag has no error to measure, nor has a list of as many rows as were found."""
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for expected, found in zip(reference, candidate, strict=True):
        for name, a, b in zip(names, expected, found, strict=True):
            exact = a[:, kept[name]] if name in kept else a
            if exact.dtype.kind != "f" or exact.shape != b.shape:
                signal.pop(name, None)
            if name not in signal:
                continue
            exact = exact.astype(np.float64)
            endless = ~np.isfinite(exact)  # such as the logit of a class that is masked
            if not np.array_equal(exact[endless], b[endless], equal_nan=True):
                noise[name] = math.nan
            exact[endless] = 0
            signal[name] += float((exact**2).sum())
            noise[name] += float(((exact - np.where(endless, 0, b)) ** 2).sum())
    return {name: decibels(power, noise[name]) for name, power in signal.items()}


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); +inf without noise, NaN where either is not finite."""
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
