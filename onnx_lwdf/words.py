"""What the words of the command line stand for; click.BadParameter where one stands for nothing."""

from __future__ import annotations

import math

import click

from onnx_lwdf import api
from onnx_lwdf.config import BITS

SIZE_UNITS = {"%": 0.01, "": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9}  # a share of the source, or bytes


def pattern_bits(text: str) -> tuple[str, int]:
    pattern, _, digits = text.rpartition("=")
    if not (pattern and digits.isdecimal()):
        raise click.BadParameter(f"{text!r} is not PATTERN=N, such as '*/head/*=8'.")
    return pattern, int(digits)


def pattern_share(text: str) -> tuple[str, float]:
    pattern, _, value = text.rpartition("=")
    if not pattern:
        raise click.BadParameter(f"{text!r} is not PATTERN=F, such as '*/expand/*=0.7'.")
    return pattern, number(value)


def n_of_m(text: str) -> tuple[int, int]:
    n, _, m = text.partition(":")
    if not (n.isdecimal() and m.isdecimal()):
        raise click.BadParameter(f"{text!r} is not N:M, such as 2:4.")
    return int(n), int(m)


def name_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, dims = text.rpartition(":")
    sizes = dims.split(",")
    if not (name and all(size.strip().isdecimal() and int(size) for size in sizes)):
        raise click.BadParameter(f"{text!r} is not NAME:DIMS, such as x:1,3,224,224.")
    return name, tuple(int(size) for size in sizes)


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise click.BadParameter(f"{text!r} is not a number.")
    return value


def numbers(text: str) -> tuple[float, ...]:
    return tuple(number(part) for part in text.split(","))


def share(text: str) -> float:
    value = number(text)
    if not 0 <= value < 1:
        raise click.BadParameter(f"{text!r} is not a share; it must be at least 0 and below 1.")
    return value


def low_high(text: str) -> tuple[float, ...]:
    values = numbers(text)
    if len(values) != 2:
        raise click.BadParameter(f"{text!r} is not LO,HI, such as -1,1.")
    return values


def activation_bits(text: str) -> int | str:
    if not (text == api.FLOAT or text.isdecimal()):
        raise click.BadParameter(f"{text!r} is neither a number nor {api.FLOAT!r}.")
    return text if text == api.FLOAT else int(text)


def bits(text: str) -> int | str:
    if text == api.AUTO:
        return text
    if not (text.isdecimal() and int(text) in BITS):
        raise click.BadParameter(f"{text!r} is neither {BITS.start} to {BITS.stop - 1} nor {api.AUTO!r}.")
    return int(text)


def size(text: str) -> float:
    digits = text.rstrip("%BGKMbgkm")
    unit = SIZE_UNITS.get(text[len(digits) :].strip().upper())
    value = number(digits) * unit if digits and unit else 0.0
    if value <= 0 or (text.endswith("%") and value > 1):
        raise click.BadParameter(f"{text!r} is not a size, such as 25%, 2MB or a number of bytes.")
    return value
