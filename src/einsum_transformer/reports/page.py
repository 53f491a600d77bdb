"""The page of a report: one HTML file with its data, styles and scripts."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from einsum_transformer.reports.tables import comparison_tables, tables_of
from einsum_transformer.tables import quantity

_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
_SCRIPTS = ("core.js", "details.js", "cascade.js", "charts.js", "tokens.js", "start.js")


def html(data: dict[str, Any]) -> str:
    """Return the page of a report, of `Report.to_dict()`."""
    template = _environment().get_template("page.html")
    return template.render(
        data=data,
        json=embedded(data),
        tables=[tables_of(run) for run in data["runs"]],
        comparison=[] if data["comparison"] is None else comparison_tables(data["comparison"]),
        has_quantization=any(run["quantization_report"] for run in data["runs"]),
        style=_file("style.css"),
        script=Markup("\n").join(_file(name) for name in _SCRIPTS),
    )


def embedded(data: Any) -> Markup:
    """Return JSON that can stand inside of a script element: no character of it ends the element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.encode("utf-8", "replace").decode().translate(_ESCAPES))


@cache
def _environment() -> Environment:
    loader = PackageLoader("einsum_transformer.reports", "templates")
    environment = Environment(
        autoescape=True, loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["quantity"] = quantity  # pyright: ignore[reportUnknownMemberType]
    return environment


def _file(name: str) -> Markup:
    """A style sheet or script of the package, which is trusted."""
    loader = _environment().loader
    assert loader is not None
    return Markup(loader.get_source(_environment(), name)[0])
