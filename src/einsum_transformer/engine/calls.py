"""Arguments of np.einsum other than an equation and its operands: sublists and keywords.

The functions here check these arguments and convert them to an equation, arrays and a path; they do not
contract anything. docs/concepts/notation.md lists the differences between `einsum` and `np.einsum`.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase, ascii_uppercase
from typing import Any, TypedDict

import numpy as np

from einsum_transformer.arguments import nearest
from einsum_transformer.engine.equation import EquationError, OperandTypeError
from einsum_transformer.engine.shapes import ShapeArray

Array = np.ndarray

_CASTINGS = ("no", "equiv", "safe", "same_kind", "unsafe")
_SUBLIST_LETTERS = ascii_uppercase + ascii_lowercase


class Keywords(TypedDict, total=False):
    """The keywords of np.einsum."""

    order: str | None
    out: Array | None
    dtype: Any
    casting: str
    optimize: Any


def checked(keywords: Keywords) -> tuple[str, Any, Any, str, list[tuple[int, ...]] | None]:
    """Return (order, out, dtype, casting, path) with NumPy's defaults and checks; path None: search one."""
    if unknown := keywords.keys() - Keywords.__annotations__.keys():
        name = min(unknown)
        raise OperandTypeError(
            f"einsum: unknown keyword {name!r}{nearest(name, Keywords.__annotations__, '`')}"
        )
    order, out, dtype = keywords.get("order"), keywords.get("out"), keywords.get("dtype")
    casting, optimize = keywords.get("casting", "safe"), keywords.get("optimize", True)
    order = "K" if order is None else order
    if not isinstance(order, str) or order.upper() not in ("K", "A", "C", "F"):
        raise EquationError(f"einsum: order={order!r}: choose 'K', 'A', 'C' or 'F'")
    if out is not None and not isinstance(out, Array):
        raise OperandTypeError(f"einsum: out= must be an array, not {type(out).__name__}")
    if casting not in _CASTINGS:
        raise EquationError(f"einsum: casting={casting!r}: choose one of {', '.join(_CASTINGS)}")
    try:
        dtype = None if dtype is None else np.dtype(dtype)
    except TypeError:
        raise OperandTypeError(f"einsum: dtype={dtype!r} is not a NumPy type") from None
    return order.upper(), out, dtype, casting, _path(optimize)


def _path(optimize: Any) -> list[tuple[int, ...]] | None:
    """Return the steps of an explicit path ["einsum_path", (0, 1), ...]; None for a search method."""
    if optimize is None or isinstance(optimize, (bool, np.bool_)) or optimize in ("greedy", "optimal"):
        return None
    if isinstance(optimize, (list, tuple)) and optimize:
        head, *steps = optimize
        if head in ("greedy", "optimal") and len(steps) == 1 and isinstance(steps[0], (int, float)):
            return None
        if head == "einsum_path" and all(
            isinstance(step, (tuple, list)) and step and all(isinstance(i, (int, np.integer)) for i in step)
            for step in steps
        ):
            return [tuple(step) for step in steps]
    raise EquationError(
        f"einsum: optimize={optimize!r}: choose True, False, 'greedy', 'optimal' or "
        "['einsum_path', (0, 1), ...]"
    )


def check_path(path: Sequence[tuple[int, ...]], operands: int) -> None:
    """Raise EquationError unless the steps of an explicit path contract `operands` operands to one array."""
    left = operands
    for step in path:
        if len(set(step)) < len(step) or not all(0 <= i < left for i in step):
            raise EquationError(f"einsum: optimize=: step {step} of the path does not fit {left} operands")
        left -= len(step) - 1
    if left > 1:
        raise EquationError(f"einsum: optimize=: the path leaves {left} arrays to contract")


def from_sublists(arguments: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
    """Convert einsum(a, [0, 1], b, [1, 2], [0, 2]) to (equation, operands): n is letter n of A-Z, a-z."""
    if isinstance(arguments[0], bytes):
        return arguments[0].decode("ascii"), tuple(arguments[1:])
    if len(arguments) < 2:
        raise EquationError("einsum: pass an equation, or an operand and the list of its subscripts")
    paired = len(arguments) - len(arguments) % 2
    terms = ",".join(_term(sublist) for sublist in arguments[1:paired:2])
    if paired < len(arguments):
        terms += "->" + _term(arguments[-1])
    return terms, tuple(arguments[:paired:2])


def _term(sublist: Any) -> str:
    if isinstance(sublist, Array):
        sublist = sublist.tolist()
    if not isinstance(sublist, (list, tuple, range)):
        raise OperandTypeError(
            f"einsum: the subscripts of an operand must be a list or tuple, not {type(sublist).__name__}"
        )
    letters = []
    for subscript in sublist:
        if subscript is Ellipsis:
            letters.append("...")
        elif not isinstance(subscript, (int, np.integer)) or isinstance(subscript, bool):
            raise OperandTypeError(f"einsum: subscript {subscript!r} is neither an integer nor an Ellipsis")
        elif not 0 <= subscript < len(_SUBLIST_LETTERS):
            raise EquationError(f"einsum: subscript {subscript} is not in 0..{len(_SUBLIST_LETTERS) - 1}")
        else:
            letters.append(_SUBLIST_LETTERS[subscript])
    return "".join(letters)


def cast(operands: Sequence[Any], out: Array | None, dtype: np.dtype | None, casting: Any) -> list[Any]:
    """Cast the operands to the type of the computation: `dtype`, or else their common type with `out`."""
    arrays = [operand if isinstance(operand, ShapeArray) else np.asarray(operand) for operand in operands]
    types = [a.dtype for a in arrays]
    # NumPy's loop also reads `out`.
    outs = [] if out is None else [out.dtype]
    if dtype is None:
        dtype = common_type("", types + outs)
    if not all(np.can_cast(given, dtype, casting) for given in outs):
        raise OperandTypeError(
            f"einsum: out= cannot be cast from {outs[0]} to {dtype} with casting={casting!r}"
        )
    for position, given in enumerate(types):
        if not np.can_cast(given, dtype, casting):
            raise OperandTypeError(
                f"einsum: operand {position} cannot be cast from {given} to {dtype} with casting={casting!r}"
            )
    return [a.astype(dtype, copy=False) for a in arrays]


def common_type(equation: str, types: Sequence[np.dtype]) -> np.dtype:
    """Return NumPy's result type for operands of these types."""
    try:
        return np.result_type(*types)
    except TypeError:
        raise OperandTypeError(
            f"einsum {equation}: {' and '.join(map(str, types))} have no common type"
        ) from None


def in_order(result: Any, order: str, operands: Sequence[Any]) -> Any:
    """Return the result in C or F order; "A" means F if every operand is an array in F order, else C."""
    if order == "K" or not isinstance(result, Array):
        return result
    if order == "A":
        fortran = all(isinstance(a, Array) and a.flags.f_contiguous for a in operands)
        order = "F" if fortran else "C"
    return np.asarray(result, order="F" if order == "F" else "C")


def write(out: Array, result: Array, casting: Any) -> Array:
    """Copy the result to `out` and return `out`."""
    if out.shape != result.shape:
        raise EquationError(f"einsum: out= has shape {out.shape}, but the result has shape {result.shape}")
    if not np.can_cast(result.dtype, out.dtype, casting):
        raise OperandTypeError(
            f"einsum: the result cannot be cast from {result.dtype} to out's {out.dtype} "
            f"with casting={casting!r}"
        )
    np.copyto(out, result, casting="unsafe")
    return out
