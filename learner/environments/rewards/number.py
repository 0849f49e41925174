"""What a reward function may return: one finite number, as Python, numpy, torch or `decimal` write it."""

import math
import numbers
from decimal import Decimal
from typing import Any

from learner.environments.rewards.descriptions import kind, shown

LARGEST = 1e15
"""A group's mean and deviation are computed in float32, in which the square of a larger reward may be infinite."""


class NoNumberError(ValueError):
    """A value that can't be a reward; the message says why, for whoever wrote the function."""


def as_reward(value: Any) -> float:
    """The value as a float. Raises NoNumberError for everything that is not one finite number, text included."""
    shape = getattr(value, "shape", None)
    if shape is not None and not isinstance(value, type):
        if tuple(shape) != ():
            raise NoNumberError(
                f"returned a value of kind {kind(value)} and shape {tuple(shape)}, which is not one number"
            )
        value = value.item()
    if value is None:
        raise NoNumberError("returned None, which is not a number: does it `return` on every way through?")
    if not isinstance(value, numbers.Real | Decimal):
        raise NoNumberError(f"returned {shown(value)} ({kind(value)}), which is not a number")
    try:
        number = float(value)
    except OverflowError:
        raise NoNumberError(f"returned a number of kind {kind(value)} that is too large") from None
    if not math.isfinite(number):
        raise NoNumberError(f"returned {number}, which is not a finite number")
    if abs(number) > LARGEST:
        raise NoNumberError(f"returned {number:g}, which is beyond {LARGEST:g}")
    return number
