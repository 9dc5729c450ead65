"""Which weights are quantised, and how."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Protocol

import torch

from pylomin.errors import PassError
from pylomin.quantize.codec import FLOATING
from pylomin.quantize.packing import SCHEMES, Packing

SMALL_NUMEL = 4096  # below it, quantising a matrix saves nothing worth its error


class Info(Protocol):
    """What a filter is told of a weight."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


Filter = str | re.Pattern[str] | Collection[str] | Callable[[str, Info], "str | None"]
Choose = Callable[[str, Info], "str | None"]  # name, info -> scheme, or None to leave the weight as it is


def chooser(scheme: str | None, filter: Filter | None) -> Choose:
    """What scheme each weight is to have.

    Args:
        scheme: for the weights that ``filter`` selects.
        filter: a regular expression that is searched for in the name, or a collection of names; or a function
            ``(name, info) -> scheme | None``. Default: matrices of floating type with at least 4096 elements.

    Raises:
        PassError: the scheme is unknown, or ``filter`` is none of these; when called, the function returned neither a
            scheme nor None.
    """
    if scheme is not None and scheme not in SCHEMES:
        raise PassError(f"quantize is {scheme!r}; expected one of {', '.join(SCHEMES)}, or None.")
    if callable(filter):
        return _checked(filter)
    if scheme is None:
        if filter is not None:
            raise PassError("filter selects what quantize applies to, but quantize is None. Give a scheme.")
        return lambda name, info: None
    selects = _selector(filter)
    return lambda name, info: scheme if selects(name, info) else None


def _checked(function: Choose) -> Choose:
    def choose(name: str, info: Info) -> str | None:
        chosen = function(name, info)
        if chosen is not None and chosen not in SCHEMES:
            raise PassError(
                f"filter returned {chosen!r} for weight {name!r}; expected None or one of {', '.join(SCHEMES)}."
            )
        return chosen

    return choose


def _selector(filter: str | re.Pattern[str] | Collection[str] | None) -> Callable[[str, Info], bool]:
    if filter is None:
        return _is_large_matrix
    if isinstance(filter, (str, re.Pattern)):
        try:
            pattern = re.compile(filter)
        except re.error as error:
            raise PassError(f"filter {filter!r} is no regular expression: {error}.") from error
        return lambda name, info: pattern.search(name) is not None
    names = frozenset(filter)
    return lambda name, info: name in names


def _is_large_matrix(name: str, info: Info) -> bool:
    if info.dtype not in FLOATING or len(info.shape) < 2:
        return False
    rows, columns = Packing("full", info.dtype, info.shape).matrix_shape
    return rows * columns >= SMALL_NUMEL
