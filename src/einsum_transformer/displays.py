"""HTML for notebooks: tables, equations with marked letters, heat maps and curves as SVG.

Text has the colour of the notebook, so that it can be read on light and dark backgrounds; colours only
underline letters and fill cells. Everything that is shown is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

Array = np.ndarray

_EQUATION = re.compile(r"\b[a-z]{1,7}(?:,[a-z]{1,7})*-(?:&gt;|>)[a-z]{0,7}(?![\w.])")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7a5195", "#8c564b", "#6b7a00")
"""Colours that colour-blind readers can distinguish (Okabe and Ito, 2008), and three more."""
_ORDER = "bdtskghfvenrcj"
"""Letters in the order in which they get colours."""
_POSITIVE, _NEGATIVE = "#d55e00", "#0072b2"
_CELL = 16
"""Pixels of a cell."""
_TABLE = "border-collapse:collapse;font-size:0.9em;margin:0.5em 0 1em"
_FIGURE = "display:inline-block;vertical-align:top;margin:0 1.5em 1em 0"
_TD = "padding:1px 8px;text-align:{};white-space:pre;font-variant-numeric:tabular-nums"
_WIDE = 60
"""Pixels of a cell whose heading is not turned."""
_MOST = 64
"""Rows and columns of a heat map."""


def as_html(*parts: Any) -> str:
    """Return tables (of rich), SVG (see `Markup`) and texts as HTML. Texts keep their line breaks and
    columns; the letters of equations are underlined with their colours."""
    return "".join(map(_part, parts))


class Markup(str):
    """A string that is HTML."""

    __slots__ = ()


def _part(part: Any) -> str:
    if isinstance(part, Markup):
        return part
    if isinstance(part, str):
        return f'<pre style="overflow-x:auto">{with_colours(part)}</pre>' if part else ""
    from rich.console import Group
    from rich.table import Table

    if isinstance(part, Group):
        return as_html(*part.renderables)
    if not isinstance(part, Table):
        return _part(str(part))
    head = "".join(f'<th scope="col">{with_colours(str(column.header))}</th>' for column in part.columns)
    cells = [list(column.cells) for column in part.columns]
    sides = ["right" if column.justify == "right" else "left" for column in part.columns]
    rows = "".join(f"<tr>{''.join(_td(*pair) for pair in zip(row, sides))}</tr>" for row in zip(*cells))
    return f'<table style="{_TABLE}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _td(cell: Any, side: str) -> str:
    return f'<td style="{_TD.format(side)}">{with_colours(str(cell))}</td>'


def with_colours(text: str) -> str:
    """Return a text as HTML, in which the letters of equations are underlined with their colours."""
    return _EQUATION.sub(lambda found: _letters(found[0]), escape(text, quote=False))


def _letters(equation: str) -> str:
    left, arrow, right = equation.partition("-&gt;")
    return f"{''.join(map(_letter, left))}{arrow}{''.join(map(_letter, right))}"


def _letter(letter: str) -> str:
    if letter == ",":
        return letter
    place = _ORDER.find(letter)
    colour = _COLOURS[place % len(_COLOURS)]
    style = "solid" if place < len(_COLOURS) else "double"
    return f'<span style="border-bottom:3px {style} {colour}">{letter}</span>'


def heat_map(
    values: Any, rows: Sequence[str], columns: Sequence[str], title: str, texts: Sequence[Sequence[str]] = ()
) -> Markup:
    """Return a matrix as SVG: orange for positive and blue for negative values, by their share of the largest
    magnitude. The value of a cell is its tooltip; texts: to write into the cells.

    Of a larger matrix, at most 64 rows and columns are shown, which the title says.
    """
    array = np.atleast_2d(np.asarray(values, np.float64))
    shown = array[:_MOST, :_MOST]
    finite = np.abs(shown[np.isfinite(shown)])
    largest = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    width = _CELL if not texts else max(_CELL, 7 * max(len(text) for row in texts for text in row) + 6)
    left = 10 + 7 * max((len(name) for name in rows[:_MOST]), default=0)
    longest = max((len(name) for name in columns[:_MOST]), default=0)
    top = 22 if width >= _WIDE else 10 + 7 * longest
    cells: list[str] = []
    for i, row in enumerate(shown):
        y = top + i * _CELL
        for j, value in enumerate(row):
            share = min(1.0, abs(value) / largest) if np.isfinite(value) else 0.0
            colour = _POSITIVE if value >= 0 else _NEGATIVE
            where = f"{rows[i]}, {columns[j]}" if i < len(rows) and j < len(columns) else f"{i}, {j}"
            box = f'x="{left + j * width}" y="{y}" width="{width}" height="{_CELL}"'
            tip = f"<title>{escape(where)}: {value:.4g}</title>"
            cells.append(f'<rect {box} fill="{colour}" fill-opacity="{0.85 * share:.3f}">{tip}</rect>')
            if texts:
                at = f'x="{left + j * width + 3}" y="{y + 12}"'
                cells.append(f'<text {at} fill="currentColor">{escape(texts[i][j])}</text>')
    names = [
        f'<text x="{left - 5}" y="{top + i * _CELL + 12}" text-anchor="end" fill="currentColor">'
        f"{escape(name)}</text>"
        for i, name in enumerate(rows[: len(shown)])
    ]
    for j, name in enumerate(columns[: shown.shape[1]]):
        x = left + j * width + (4 if width >= _WIDE else 12)
        turn = "" if width >= _WIDE else f' transform="rotate(-90 {x} {top - 4})"'
        names.append(f'<text x="{x}" y="{top - 4}"{turn} fill="currentColor">{escape(name)}</text>')
    cut = "" if shown.shape == array.shape else f" (the first {shown.shape[0]} x {shown.shape[1]})"
    size = f'width="{left + shown.shape[1] * width + 10}" height="{top + len(shown) * _CELL + 8}"'
    caption = f"{title}{cut}; largest magnitude {largest:.4g}"
    return _figure(
        caption,
        f'<svg {size} role="img" font-size="11" font-family="monospace" style="max-width:none">'
        f"<title>{escape(caption)}</title>{''.join(cells)}{''.join(names)}</svg>",
    )


def _figure(caption: str, svg: str) -> Markup:
    text = f'<figcaption style="font-size:0.85em">{escape(caption)}</figcaption>'
    return Markup(f'<figure style="{_FIGURE}">{text}{svg}</figure>')


def curve(points: Mapping[int, float], title: str) -> Markup:
    """Return a curve of finite values over steps as SVG."""
    finite = [(step, value) for step, value in points.items() if np.isfinite(value)]
    if not finite:
        return Markup("")
    width, height, left = 460, 160, 60
    steps, values = np.array(finite, np.float64).T
    spans = max(float(np.ptp(steps)), 1.0), max(float(np.ptp(values)), 1e-12)
    xs = left + (steps - steps.min()) / spans[0] * (width - left - 10)
    ys = 26 + (values.max() - values) / spans[1] * (height - 46)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys))
    labels = (
        f'<text x="{left - 5}" y="32" text-anchor="end">{values.max():.4g}</text>'
        f'<text x="{left - 5}" y="{height - 18}" text-anchor="end">{values.min():.4g}</text>'
        f'<text x="{left}" y="{height - 2}">{int(steps.min())}</text>'
        f'<text x="{width - 10}" y="{height - 2}" text-anchor="end">{int(steps.max())}</text>'
    )
    return _figure(
        f"{title} by step",
        f'<svg width="{width}" height="{height}" role="img" font-size="11" font-family="sans-serif" '
        f'fill="currentColor"><title>{escape(title)} by step</title>{labels}'
        f'<polyline points="{line}" fill="none" stroke="{_NEGATIVE}" stroke-width="1.5"/></svg>',
    )
