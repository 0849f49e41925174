"""Tables: mathematical characters in LaTeX, units by their names."""

MATH_WORDS = {
    "sqrt", "cbrt", "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan",
    "ln", "log", "lg", "exp", "pi", "infty", "infinity", "inf", "oo", "frac", "times", "cdot", "mod", "gcd", "lcm",
    "min", "max", "and", "or", "cup", "cap", "union",
}  # fmt: skip
"""What follows a number and is mathematics, not a unit."""

SYMBOLS = {
    "−": "-", "–": "-", "‐": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ",
    "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "λ": r"\lambda ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "∛": r"\sqrt[3]", "√": r"\sqrt", "⁄": "/", "∶": ":",
}  # fmt: skip
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

UNITS = {
    name: canonical
    for canonical, names in {
        "m": "m meter meters metre metres",
        "cm": "cm centimeter centimeters centimetre centimetres",
        "mm": "mm millimeter millimeters millimetre millimetres",
        "km": "km kilometer kilometers kilometre kilometres",
        "in": "in inch inches",
        "ft": "ft foot feet",
        "yd": "yd yard yards",
        "mi": "mi mile miles",
        "g": "g gram grams",
        "kg": "kg kilogram kilograms",
        "mg": "mg milligram milligrams",
        "lb": "lb lbs pound pounds",
        "oz": "oz ounce ounces",
        "s": "s sec secs second seconds",
        "min": "min mins minute minutes",
        "h": "h hr hrs hour hours",
        "day": "day days",
        "week": "week weeks",
        "month": "month months",
        "year": "year years yr yrs",
        "l": "L l liter liters litre litres",
        "ml": "ml mL milliliter milliliters millilitre millilitres",
        "dollar": "dollar dollars usd USD bucks",
        "cent": "cent cents",
        "euro": "euro euros eur EUR",
        "mph": "mph",
        "km/h": "kmh kph km/h km/hr",
        "m/s": "m/s",
        "degree": "degree degrees deg",
        "radian": "radian radians rad",
        "%": "percent percentage pct",
    }.items()
    for name in names.split()
}
SIGNS = {"$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen", "₹": "rupee"}
