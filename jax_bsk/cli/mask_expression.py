"""Masks written as text, for the command line: read as a syntax tree, never run as code.

Only what is named here has a meaning: calls of the masks in `ALLOWED` with literal arguments (or masks, for a mask per
head), and the operators of masks. Everything else of Python is refused where it stands.
"""

from __future__ import annotations

import ast
from typing import Any

from jax_bsk import masks

# A function cannot be written as a literal, and `Mask` is the base class.
ALLOWED: dict[str, type[masks.Mask]] = {
    name: value
    for name in masks.__all__
    if isinstance(value := getattr(masks, name), type)
    and issubclass(value, masks.Mask)
    and value not in (masks.Mask, masks.FunctionMask)
}
# Characters of an expression, levels of its tree, and magnitude of a number in it: positions are int32 on every path.
MAX_CHARACTERS, MAX_DEPTH, MAX_NUMBER = 10_000, 60, 2**30
SAYS = (
    f"An expression consists of calls of {', '.join(ALLOWED)}, whose arguments are numbers, strings, True, False, "
    "None, lists and tuples (and masks in a list for MultiHeadMask), with or without keywords, and of the operators "
    '&, | and ~ with parentheses, e.g. "CausalMask() & LocalMask((1024, 0))"'
)


class ExpressionError(ValueError):
    """The text is no expression of masks; the message says where, and what is allowed."""


def parse(text: str) -> masks.Mask:
    """The mask of an expression.

    Args:
      text: as in `SAYS`.

    Raises:
      ExpressionError: anything else stands in it, or it is too long or too deep.
      TypeError, ValueError: from a mask's own constructor, which does not take the arguments.
    """
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"the expression has {len(text):,} characters, and at most {MAX_CHARACTERS:,} are read")
    text = text.strip()
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:  # a null byte, or a number of thousands of digits, is a ValueError
        reason = getattr(error, "msg", None) or str(error)
        raise ExpressionError(f"the expression cannot be read: {reason}. {SAYS}") from None
    except (RecursionError, MemoryError):
        raise ExpressionError(f"the expression is nested too deeply. {SAYS}") from None
    reader = _Reader(text)
    mask = reader.value(tree)
    if not isinstance(mask, masks.Mask):
        raise reader.refused(tree, "is no mask")
    return mask


class _Reader:
    """Gives the parts of one expression their values."""

    def __init__(self, text: str) -> None:
        self._text = text

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """What a part stands for: a mask or a literal."""
        if depth > MAX_DEPTH:
            raise ExpressionError(f"the expression has more than {MAX_DEPTH} levels. {SAYS}")
        depth += 1
        match node:
            case ast.Constant(value=bool() | str() | None):
                return node.value
            case ast.Constant(value=int() | float() as number):
                if not abs(number) < MAX_NUMBER:  # nor inf
                    raise self.refused(node, f"is not a number below {MAX_NUMBER:,}")
                return number
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number) as part):
                if isinstance(number, bool):
                    raise self.refused(node, "is not allowed")
                return -self.value(part, depth)
            case ast.List(elts=parts):
                return [self.value(part, depth) for part in parts]
            case ast.Tuple(elts=parts):
                return tuple(self.value(part, depth) for part in parts)
            case ast.UnaryOp(op=ast.Invert(), operand=part):
                return ~self.mask(part, depth)
            case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                return self.mask(left, depth) & self.mask(right, depth)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self.mask(left, depth) | self.mask(right, depth)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=keywords) if name in ALLOWED:
                given = [self.value(argument, depth) for argument in arguments]
                named = {}
                for keyword in keywords:
                    if keyword.arg is None:
                        raise self.refused(node, "has a **, which is not allowed")
                    if keyword.arg in named:
                        raise self.refused(node, f"has {keyword.arg} twice")
                    named[keyword.arg] = self.value(keyword.value, depth)
                return ALLOWED[name](*given, **named)
            case ast.Call(func=ast.Name(id="FunctionMask")):
                raise self.refused(node, "needs a function: build the mask in Python, mask.bind(length).plot(path)")
        raise self.refused(node, "is not allowed")

    def mask(self, node: ast.expr, depth: int) -> masks.Mask:
        """An operand of &, | or ~."""
        value = self.value(node, depth)
        if not isinstance(value, masks.Mask):
            raise self.refused(node, "is no mask, so it cannot be combined")
        return value

    def refused(self, node: ast.expr, what: str) -> ExpressionError:
        text = ast.get_source_segment(self._text, node) or self._text
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        return ExpressionError(f"`{shown}` {what}. {SAYS}")
