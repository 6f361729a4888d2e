"""What the user asked for, validated once."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from onnx_lwdf.activations.sources import SOURCES
from onnx_lwdf.emit import FLOAT, FORMATS, INTEGER, automatic, refusal
from onnx_lwdf.errors import OptionError
from onnx_lwdf.solvers import SOLVERS

BITS = range(2, 9)
SHORTEST_VECTOR = 4  # shorter ones take more than a bit for each weight


@dataclass(frozen=True, slots=True)
class Target:
    """What the integer kernels of a processor family ask of the codes."""

    pair_safe: bool  # |code[2k] + code[2k + 1]| <= 128: u8 x s8 cannot saturate in vpmaddubsw
    signed_activations: bool  # int8 instead of uint8
    symmetric_activations: bool  # zero point 0 of the signed grid


TARGETS: Mapping[str, Target] = {
    "generic": Target(pair_safe=True, signed_activations=False, symmetric_activations=False),
    "x86": Target(pair_safe=True, signed_activations=False, symmetric_activations=False),
    "x86-vnni": Target(pair_safe=False, signed_activations=False, symmetric_activations=False),
    "arm": Target(pair_safe=False, signed_activations=True, symmetric_activations=False),
    "tensorrt": Target(pair_safe=False, signed_activations=True, symmetric_activations=True),
}


Reader = Callable[[str, Any], Any]  # an option's name and value -> the value in Python's own types, or OptionError


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise OptionError(f"{name} is {value!r}; it must be a whole number") from None


def _number(name: str, value: Any) -> float:
    try:
        return float(value + 0)  # words have no sum
    except (TypeError, ValueError):
        raise OptionError(f"{name} is {value!r}; it must be a number") from None


def _text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    raise OptionError(f"{name} holds {value!r}; it must hold words")


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise OptionError(f"{name} is {value!r}; it must be True or False")


def _several(read: Reader, count: int | None = None) -> Reader:
    def values(name: str, given: Any) -> tuple[Any, ...]:
        listed = None if isinstance(given, (str, Mapping)) or not hasattr(given, "__iter__") else list(given)
        if listed is None or (count is not None and len(listed) != count):
            raise OptionError(f"{name} is {given!r}; it must be a list{'' if count is None else f' of {count} values'}")
        return tuple(read(name, value) for value in listed)

    return values


def _named(read: Reader) -> Reader:
    def values(name: str, given: Any) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            raise OptionError(f"{name} is {given!r}; it must map names to values")
        return {_text(name, key): read(f"{name} {key!r}", value) for key, value in given.items()}

    return values


READERS: Mapping[str, Reader] = {
    **dict.fromkeys(("weight_bits", "activation_bits", "vector_size", "jobs", "samples", "seed"), _whole),
    **dict.fromkeys(("sparsity", "channels", "fail_under", "max_size"), _number),
    **dict.fromkeys(("recalibrate", "keep_first_last", "save_as_external_data"), _flag),
    "bits_for": _named(_whole),
    "sparsity_for": _named(_number),
    "input_shape": _named(_several(_whole)),
    "nm": _several(_whole, 2),
    "input_range": _several(_number, 2),
    "input_mean": _several(_number),
    "input_std": _several(_number),
    "exclude": _several(_text),
}
OPTIONAL = (
    "weight_bits",
    "activation_bits",
    "keep_first_last",
    "jobs",
    "fail_under",
    "max_size",
    "nm",
    "input_range",
    "input_mean",
    "input_std",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All options of one run; the command line and `compress()` use the same words."""

    weight_bits: int | None = 8  # None: weights stay float
    activation_bits: int | None = 8  # None: activations stay float
    auto_bits: bool = False  # a layer's weight gets `weight_bits` or fewer, by what they cost
    bits_for: Mapping[str, int] = field(default_factory=dict)  # glob on node name or op type -> bits
    keep_first_last: bool | None = None  # None: on below 8 bits
    method: str = "auto"
    activations_from: str = "aligned"  # a key of SOURCES, or a path
    format: str = "auto"
    target: str = "generic"
    vector_size: int = 16  # inputs whose codes share a multiplier below 8 bits; 0: one scale per output channel alone
    sparsity: float = 0.0  # share of the weights of all layers that can be pruned, which become 0
    nm: tuple[int, int] | None = None  # N of every M consecutive input channels stay
    sparsity_for: Mapping[str, float] = field(default_factory=dict)  # glob on node name or op type -> share
    channels: float = 0.0  # share of the channels that can go, which goes
    recalibrate: bool = True  # channels get back their float mean and deviation
    exclude: Sequence[str] = ()  # globs on node name or op type
    input_shape: Mapping[str, Sequence[int]] = field(default_factory=dict)
    input_range: Sequence[float] | None = None
    input_mean: Sequence[float] | None = None  # on the 0..255 scale, as is input_std
    input_std: Sequence[float] | None = None
    fail_under: float | None = None  # dB at the outputs
    max_size: float | None = None  # of the file: bytes, or a share of the source's size where it is at most 1
    jobs: int | None = None  # None: all cores
    samples: int = 128
    seed: int = 0
    save_as_external_data: bool = False

    def __post_init__(self) -> None:
        for name, read in READERS.items():
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL:
                object.__setattr__(self, name, read(name.replace("_", "-"), value))
        for name in ("weight_bits", "activation_bits"):
            _check_bits(name.replace("_", "-"), getattr(self, name))
        for pattern, bits in self.bits_for.items():
            _check_bits(f"bits-for {pattern!r}", bits)
        _check_choice("method", self.method, ("auto", *SOLVERS))
        _check_choice("format", self.format, ("auto", *FORMATS))
        _check_choice("target", self.target, tuple(TARGETS))
        if refused := refusal(self.stored_format, self.weights, self.activations):
            raise OptionError(refused)
        if self.weight_bits is None and self.bits_for:
            raise OptionError("bits-for quantizes single layers of a float model; give --bits or --weight-bits")
        if self.auto_bits and self.weight_bits is None:
            raise OptionError("bits auto chooses bits of weights; leave out what keeps them float")
        if self.auto_bits and self.max_size is None and self.fail_under is None:
            raise OptionError("bits auto needs an aim; give --max-size or --fail-under")
        if self.source == "none" and (self.auto_bits or self.channels or self.prunes or self.activation_bits):
            raise OptionError(
                "without inputs for its layers a model's weights can be rounded and no more; "
                "give --activation-bits float, and neither bits auto nor pruning"
            )
        self._check_pruning()
        self._check_numbers()
        if self.vector_size and self.vector_size < SHORTEST_VECTOR:
            raise OptionError(
                f"vector-size is {self.vector_size}; it must be at least {SHORTEST_VECTOR}, or 0 for none"
            )
        if self.samples < 1:
            raise OptionError(f"samples is {self.samples}; it must be at least 1")
        if self.jobs is not None and self.jobs < 1:
            raise OptionError(f"jobs is {self.jobs}; it must be at least 1")
        if (self.input_mean is None) != (self.input_std is None):
            raise OptionError("input-mean and input-std go together; give both or neither")
        if self.input_mean is not None and self.input_range is not None:
            raise OptionError("input-range excludes input-mean and input-std; give one of them")
        if self.input_std is not None and min(self.input_std) <= 0:
            raise OptionError(f"input-std is {self.input_std}; every value must be positive")
        if self.input_range is not None and self.input_range[0] >= self.input_range[1]:
            raise OptionError(f"input-range is {self.input_range}; the first value must be below the second")

    def _check_pruning(self) -> None:
        shares = {f"sparsity-for {pattern!r}": share for pattern, share in self.sparsity_for.items()}
        for name, share in {"sparsity": self.sparsity, "channels": self.channels, **shares}.items():
            if not 0 <= share < 1:
                raise OptionError(f"{name} is {share:g}; it must be at least 0 and below 1")
        if self.nm is not None and self.sparsity:
            raise OptionError("sparsity excludes nm; give one of them")
        if self.nm is not None and not 0 < self.nm[0] < self.nm[1]:
            raise OptionError(f"nm is {self.nm[0]}:{self.nm[1]}; N must be at least 1 and below M, such as 2:4")
        if self.prunes and self.method != "auto" and not SOLVERS[self.method].prunes:
            able = ", ".join(name for name, method in SOLVERS.items() if method.prunes)
            raise OptionError(f"method {self.method!r} does not prune; use auto or one of {able}")

    @property
    def prunes(self) -> bool:
        return self.nm is not None or any((self.sparsity, *self.sparsity_for.values()))

    def _check_numbers(self) -> None:
        numbers = {
            "fail-under": (self.fail_under,),
            "input-range": self.input_range or (),
            "input-mean": self.input_mean or (),
            "input-std": self.input_std or (),
        }
        for name, values in numbers.items():
            if not all(value is None or math.isfinite(value) for value in values):
                raise OptionError(f"{name} is {values}; every value must be finite")
        if self.max_size is not None and not 0 < self.max_size < math.inf:
            raise OptionError(f"max-size is {self.max_size:g}; it must be positive, such as 25% or 2MB")
        if self.seed < 0:
            raise OptionError(f"seed is {self.seed}; it must not be negative")
        for name, shape in self.input_shape.items():
            if not shape or min(shape) < 1:
                raise OptionError(f"input-shape of {name!r} is {tuple(shape)}; every size must be at least 1")

    @property
    def stored_format(self) -> str:
        """The format after `auto` is resolved: integer kernels with activations, else free at inference."""
        zeros = bool(self.sparsity or self.sparsity_for)
        return (
            automatic(self.weights, self.activations, zeros, self.auto_bits) if self.format == "auto" else self.format
        )

    @property
    def weights(self) -> str:
        """The kind of the weights, a word of the format table."""
        return FLOAT if self.weight_bits is None else INTEGER

    @property
    def activations(self) -> str:
        """The kind of the activations, a word of the format table."""
        return FLOAT if self.activation_bits is None else INTEGER

    @property
    def lowest_weight_bits(self) -> int:
        if self.auto_bits:
            return BITS.start
        return min(bits for bits in (self.weight_bits, *self.bits_for.values(), BITS.stop - 1) if bits is not None)

    @property
    def bits_name(self) -> str:
        """For file names: w6a6, w4a8, w8, auto.a8, auto, w8a8.s50, s50, 2of4, w8a8.c20, c20."""
        weights = "" if self.weight_bits is None or self.auto_bits else f"w{self.weight_bits}"
        activations = "" if self.activation_bits is None else f"a{self.activation_bits}"
        sparsity = f"s{100 * self.sparsity:g}" if self.sparsity else ""
        pattern = f"{self.nm[0]}of{self.nm[1]}" if self.nm else ""
        named = "pruned" if self.prunes and not (sparsity or pattern) else ""
        channels = f"c{100 * self.channels:g}" if self.channels else ""
        return ".".join(
            filter(None, ("auto" if self.auto_bits else "", weights + activations, sparsity, pattern, named, channels))
        )

    @property
    def keeps_first_last(self) -> bool:
        if self.keep_first_last is not None:
            return self.keep_first_last
        return min(self.weight_bits or 8, self.activation_bits or 8) < 8

    def most_bytes(self, source_bytes: int) -> int | None:
        """What the file may have."""
        if self.max_size is None:
            return None
        return int(self.max_size * source_bytes if self.max_size <= 1 else self.max_size)

    @property
    def source(self) -> str:
        """The key of SOURCES that `activations_from` means."""
        return self.activations_from if self.activations_from in SOURCES else "data"

    def blind(self, reason: str) -> Config:
        """What can be done of this with a model that cannot be run; OptionError where that is not enough."""
        try:
            return replace(self, activations_from="none", activation_bits=None)
        except OptionError as error:
            raise OptionError(f"{reason}; {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Every option that is not at its default, and the bits, for the report and the provenance.

        How many jobs ran is left out: it must not change the file.
        """
        default, named = Config(), asdict(self)
        always = {"weight_bits", "activation_bits"}
        changed = {f.name for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)}
        return {name: value for name, value in named.items() if name in (changed | always) - {"jobs"}}


def _check_bits(name: str, bits: int | None) -> None:
    if bits is not None and bits not in BITS:
        raise OptionError(f"{name} is {bits}; it must be {BITS.start} to {BITS.stop - 1}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
