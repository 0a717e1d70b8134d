"""Exact arithmetic: integers and decimals stay exact, only a quotient that never ends is rounded.

Not covered: variables, functions, complex numbers. The expression is parsed, never executed, and its size, its exponents
and the size of every intermediate result are bounded, so that no input can hang the process.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

from nestling.core.errors import UserError

EXAMPLES = [
    ({"expression": "12 + 3"}, "15"),
    ({"expression": "(907 - 58) * 3"}, "2547"),
    ({"expression": "0.1 + 0.2"}, "0.3"),
    ({"expression": "10 / 4"}, "2.5"),
    ({"expression": "2 / 3"}, "0.666666666667"),
    ({"expression": "-7 // 2"}, "-4"),
    ({"expression": "17 % 5"}, "2"),
    ({"expression": "2 ** 10"}, "1024"),
    ({"expression": "1 / 0"}, "error: division by zero"),
]

MAX_CHARACTERS = 200
MAX_EXPONENT = 256
MAX_BITS = 1024  # of a numerator or denominator
DIGITS = 12  # significant digits of a quotient that does not end

_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "–": "-", "^": "\0"})


def call(expression: str) -> str:
    """Evaluate an arithmetic expression exactly.

    Args:
        expression: numbers with + - * / // % ** and parentheses, such as "(12 + 3) * 4".
    """
    if len(expression) > MAX_CHARACTERS:
        raise UserError(f"the expression is longer than {MAX_CHARACTERS} characters")
    text = expression.translate(_SIGNS).replace("\0", "**").strip()
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError):
        raise UserError("not an arithmetic expression", value=expression) from None
    return _written(_value(tree.body, text))


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant():
            return _number(node, text)
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand, text)
        case ast.UnaryOp(op=ast.UAdd()):
            return _value(node.operand, text)
        case ast.BinOp() if type(node.op) in _OPERATIONS:
            left, right = _value(node.left, text), _value(node.right, text)
            try:
                return _bounded(Fraction(_OPERATIONS[type(node.op)](left, right)))
            except ZeroDivisionError:
                raise UserError("division by zero") from None
    raise UserError("only numbers with + - * / // % ** and parentheses are understood")


def _number(node: ast.Constant, text: str) -> Fraction:
    """The literal as it was written: `0.1` is a tenth, not the nearest binary fraction."""
    if isinstance(node.value, bool) or not isinstance(node.value, int | float):
        raise UserError("only numbers with + - * / // % ** and parentheses are understood")
    if isinstance(node.value, int):
        return _bounded(Fraction(node.value))
    written = Decimal((ast.get_source_segment(text, node) or str(node.value)).replace("_", ""))
    if abs(written.adjusted()) > MAX_EXPONENT:
        raise UserError("the number is too large or too small")
    return _bounded(Fraction(written))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """Exact for whole exponents; a root is computed in 30 digits."""
    if abs(exponent) > MAX_EXPONENT:
        raise UserError(f"the exponent is larger than {MAX_EXPONENT}")
    if base == 0 and exponent < 0:
        raise ZeroDivisionError
    if exponent.denominator == 1:
        return Fraction(base**exponent.numerator)
    if base < 0:
        raise UserError("a root of a negative number")
    with localcontext(prec=30):
        return Fraction(_decimal(base) ** _decimal(exponent))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise UserError("the result is too large")
    return value


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def _written(value: Fraction) -> str:
    """All digits where they end, else the first `DIGITS` significant ones."""
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    ends = rest == 1 and value.denominator.bit_length() <= 40
    with localcontext(prec=400 if ends else DIGITS):
        return format(_decimal(value).normalize(), "f")


_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
