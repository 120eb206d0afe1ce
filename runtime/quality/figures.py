"""Figures with their standard errors, of values that are taken as independent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Figure:
    """A value and its standard error: NaN where there are too few values to tell."""

    value: float
    standard_error: float


def mean(values: torch.Tensor) -> Figure:
    """Of values (count,) of any dtype, in float64."""
    found = values.double()
    error = float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return Figure(float(found.mean()), error)


def exponential(of: Figure) -> Figure:
    """exp of a figure, its error by the derivative."""
    try:
        value = math.exp(of.value)
    except OverflowError:
        value = math.inf
    return Figure(value, value * of.standard_error)


def share(flags: torch.Tensor) -> Figure:
    """Of the true ones among flags (count,)."""
    value = float(flags.double().mean())
    return Figure(value, math.sqrt(value * (1 - value) / len(flags)))


def quantile(values: torch.Tensor, of: float) -> Figure:
    """The value below which a share `of` of them lies, its error by the ranks beside it.

    A rank is binomial: half of what lies between the values one standard error of the rank below
    and above. Source: David & Nagaraja, Order Statistics, 2003, 7.1.
    """
    found = values.double().sort().values
    last = len(found) - 1
    around = math.sqrt(len(found) * of * (1 - of))
    low, high = (found[_rank(last * of + step, last)] for step in (-around, around))
    return Figure(float(found[_rank(last * of, last)]), float(high - low) / 2)


def _rank(place: float, last: int) -> int:
    return min(max(round(place), 0), last)
