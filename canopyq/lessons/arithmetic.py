"""Sums in lesson texts are computed, not typed: ``{int4_gb:.3g} GB`` is filled in from ``7e9 * 4 / 8 / 1e9``.

The evaluator walks the syntax tree and knows numbers, names, arithmetic and a handful of functions. Everything else is
refused, so a lesson file can never run code.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Mapping

from canopyq.errors import CanopyError

Number = int | float
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_FUNCTIONS = {
    "round": round,
    "abs": abs,
    "min": min,
    "max": max,
    "floor": math.floor,
    "ceil": math.ceil,
    "log2": math.log2,
}
_PLACEHOLDER = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")


def evaluate(expression: str | Number, values: Mapping[str, Number] | None = None) -> Number:
    """The number an arithmetic expression stands for; names are looked up in ``values``."""
    try:
        return _walk(ast.parse(str(expression).strip(), mode="eval").body, values or {})
    except CanopyError:
        raise
    except (SyntaxError, ArithmeticError, TypeError, ValueError) as error:
        raise CanopyError(
            f"cannot compute {expression!r}: {error}; write plain arithmetic such as 7e9 * 4 / 8"
        ) from None


def evaluate_all(expressions: Mapping[str, str | Number]) -> dict[str, Number]:
    """Each expression in turn; a later one may use the names before it."""
    values: dict[str, Number] = {}
    for name, expression in expressions.items():
        values[name] = evaluate(expression, values)
    return values


def fill(text: str, values: Mapping[str, Number]) -> str:
    """``text`` with every ``{expression:format}`` computed. The format defaults to ``g``."""
    return _PLACEHOLDER.sub(lambda m: format(evaluate(m.group(1), values), m.group(2) or "g"), text)


def _walk(node: ast.expr, values: Mapping[str, Number]) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name):
            if name not in values:
                raise CanopyError(f"unknown value {name!r} in a computed text; known: {', '.join(values) or 'none'}")
            return values[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_walk(operand, values))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b = _walk(left, values), _walk(right, values)
            if isinstance(op, ast.Pow) and abs(b) > 1024:
                raise CanopyError(f"exponent {b} is too large for a computed text; keep it within 1024")
            return _BINARY[type(op)](a, b)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_walk(arg, values) for arg in args))
    raise CanopyError(
        f"{ast.unparse(node)!r} is not arithmetic; use numbers, names, + - * / // % ** and {list(_FUNCTIONS)}"
    )
