"""Reading of what was stored: bounds are checked, and what is damaged is an error (pure)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from disagg_plugins.errors import DamagedState

MOST = 1 << 53
"""Counts beyond this are no longer exact as floats; no canary sees so many requests."""


def known(state: object, keys: Sequence[str], what: str) -> Mapping[str, object]:
    """Return ``state`` if it is a mapping of exactly these keys.

    Raises:
        DamagedState: It is not.
    """
    if not isinstance(state, Mapping):
        raise DamagedState(f"{what} is no mapping but {type(state).__name__}")
    if set(state) != set(keys):
        found = ", ".join(sorted(map(str, state))) or "nothing"
        raise DamagedState(f"{what} has {found} in place of {', '.join(keys)}")
    return state


def integer(value: object, least: int, most: int | None, what: str) -> int:
    """Return ``value`` if it is an integer within both bounds (None: the greatest exact count).

    Raises:
        DamagedState: It is not.
    """
    bound = MOST if most is None else most
    if type(value) is not int or not least <= value <= bound:
        raise DamagedState(f"{what} is {value!r}, not a whole number from {least} to {bound}")
    return value


def integers(value: object, least: int, most: int | None, what: str) -> list[int]:
    """Return ``value`` if it is a list of such integers whose sum is no greater than ``MOST``.

    Raises:
        DamagedState: It is not.
    """
    if not isinstance(value, list):
        raise DamagedState(f"{what}: a list is expected, not {type(value).__name__}")
    result = [integer(item, least, most, what) for item in value]
    if sum(result) > MOST:
        raise DamagedState(f"{what}: the sum {sum(result)} is beyond {MOST}")
    return result


def number(value: object, least: float, most: float, what: str) -> float:
    """Return ``value`` if it is a finite number within both bounds.

    Raises:
        DamagedState: It is not.
    """
    if type(value) not in (int, float) or not isinstance(value, (int, float)):
        raise DamagedState(f"{what} is {value!r}, not a number")
    if not math.isfinite(value) or not least <= value <= most:
        raise DamagedState(f"{what} is {value!r}, not a number from {least:g} to {most:g}")
    return float(value)
