"""Format amounts, lists and columns as text for messages and tables."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def quantity(amount: float, unit: str = "") -> str:
    """Format an amount with three digits and a decimal prefix: 1.23 M, 538 MB."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(amount) < 999.5 or prefix == "P":
            break
        amount /= 1000
    digits = 0 if prefix == "" and float(amount).is_integer() else max(0, 3 - len(str(int(abs(amount)))))
    return f"{amount:.{digits}f} {prefix}{unit}".rstrip()


def columns(rows: Sequence[Sequence[str]], right: Iterable[int]) -> Iterator[str]:
    """Yield rows of cells as lines of text with aligned columns; right: indices of right-aligned columns.

    No cell is truncated, however narrow the terminal is, because names are part of the result.
    """
    widths, ends = [max(map(len, column)) for column in zip(*rows)], set(right)
    for row in rows:
        cells = [
            cell.rjust(width) if i in ends else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        yield "  ".join(cells).rstrip()


def terminal_table(headings: Sequence[str], left: Collection[int] = (0,)) -> Table:
    """Return a table for a terminal, without rows; left: indices of left-aligned columns."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i in left else "right")
    return table


def with_lines(tables: Iterable[Any], lines: Iterable[str]) -> Any:
    """Return a rich renderable of tables followed by lines of text."""
    from rich.console import Group
    from rich.text import Text

    return Group(*tables, *map(Text, lines))


def as_text(*parts: Any) -> str:
    """Tables and lines as plain text."""
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=120, highlight=False, markup=False, soft_wrap=True)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get().rstrip("\n")


def peak_rss_bytes() -> int | None:
    """Return the peak resident memory of this process, or None if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def first_names(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """Join the first `most` names of a list and append the number of remaining names."""
    end = " and" if separator == ", " else f"{separator}and"
    more = f"{end} {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more
