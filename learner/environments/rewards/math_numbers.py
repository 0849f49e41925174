"""Numbers as sympy holds them, not yet computed: how large they are, and whether two of them are equal."""

import math
from typing import Any

LARGEST_DIGITS = 10_000
"""Larger numbers are not computed, only compared as they are written."""
LARGEST_POWER_OF_A_SUM = 50
SIGNIFICANT_DIGITS = 6
"""To how many digits decimals are compared: to 0.000001, and smaller numbers to so many digits."""
EXACT_DIGITS = 25
"""To how many digits numbers without decimals are computed to be compared."""


def is_too_large(tree: Any) -> bool:
    """Whether computing it could take too much time or memory."""
    return bound(tree) > LARGEST_DIGITS


def bound(tree: Any) -> float:
    """An upper bound of the decimal digits of a number that is not computed yet."""
    from sympy import Integer, Number, Pow, Product, Sum, binomial, exp, factorial, factorial2, gamma, subfactorial

    if isinstance(tree, Number):
        return _number_digits(tree)
    parts = [bound(part) for part in getattr(tree, "args", ()) if hasattr(part, "args")]
    if not parts:
        return 1.0
    if isinstance(tree, Pow):
        base, exponent = tree.args
        if exponent == Integer(-1):
            return parts[0]
        if parts[1] > 6.0:
            return math.inf
        largest = 10.0 ** parts[1]
        if base.is_Add and base.free_symbols and largest > LARGEST_POWER_OF_A_SUM:
            return math.inf
        return float(max(parts[0], 1.0) * largest)
    if isinstance(tree, exp):
        return math.inf if parts[0] > 6.0 else 10.0 ** parts[0]
    if isinstance(tree, factorial | factorial2 | subfactorial | gamma | binomial):
        return math.inf if max(parts) > 4.0 else max(parts) * 10.0 ** max(parts)
    if isinstance(tree, Sum | Product):
        terms = max(bound(limit) for limits in tree.limits for limit in limits[1:])
        return math.inf if terms > 4.0 else max(parts) * 10.0**terms
    return sum(parts) if tree.is_Add or tree.is_Mul else max(parts)


def _number_digits(number: Any) -> float:
    if not number.is_finite:
        return 1.0
    if number.is_Rational:
        return float(max(number.p.bit_length(), number.q.bit_length()) * math.log10(2.0))
    return abs(_magnitude(number)) + 1.0


def with_imaginary_unit(tree: Any) -> Any:
    """The tree with the symbol i as the imaginary unit."""
    from sympy import I, Symbol

    units = {symbol: I for symbol in tree.free_symbols if isinstance(symbol, Symbol) and symbol.name == "i"}
    return tree.subs(units) if units else tree


def equal_numbers(one: Any, other: Any) -> bool | None:
    """Whether two numbers are equal; None if one of them is no finite number, or a percentage.

    Exactly, or if one of them has decimals, to `SIGNIFICANT_DIGITS`.
    """
    from sympy import Expr, Float, UnevaluatedExpr

    for tree in (one, other):
        if not isinstance(tree, Expr) or not tree.is_number or tree.has(UnevaluatedExpr):
            return None
    a, b = one.doit(), other.doit()
    if a.is_Rational and b.is_Rational:
        return bool(a == b)
    a, b = a.evalf(EXACT_DIGITS), b.evalf(EXACT_DIGITS)
    if not (a.is_finite and b.is_finite):
        return None
    if one.has(Float) or other.has(Float):
        return bool(abs(a - b) <= Float(f"0.5e-{places(a, b)}"))
    difference = abs((one - other).evalf(EXACT_DIGITS))
    return bool(difference <= Float(f"1e-{EXACT_DIGITS - 5}") * max(abs(a), abs(b)))


def places(*trees: Any) -> int:
    """To how many places after the point decimals are compared, so that the smallest keeps its digits."""
    from sympy import Float

    floats = [number for tree in trees for number in tree.atoms(Float) if number != 0]
    smallest = min((math.floor(_magnitude(abs(number))) + 1 for number in floats), default=0)
    return SIGNIFICANT_DIGITS - min(0, smallest)


def _magnitude(number: Any) -> float:
    from sympy import log

    return float(log(abs(number), 10).evalf()) if number != 0 else 0.0
