"""Figures in PNG files, by matplotlib, which is an extra."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import atomic_file


def check_plot(path: str | Path) -> None:
    """Raise InputError if no figure can be written to `path`; called before a long computation."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError('`plot` needs matplotlib: pip install "einsum-transformer[plot]"') from None
    path = Path(path)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"`plot` {path}: expected a file in a folder with write permission")
    if path.suffix.lower() != ".png":
        raise InputError(f"`plot` {path}: expected a file name that ends in .png")


def new_figure(path: str | Path, width: float = 8) -> Any:
    """Return an empty figure, `width` inches wide, for the file `path`, which is checked."""
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure: Any, path: str | Path) -> None:
    """Write a figure to a PNG file, with a grid in each of its plots."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


def _write(figure: Any, path: str | Path) -> None:
    with atomic_file(Path(path)) as file:
        figure.savefig(file, dpi=150, format="png")


def plot_maps(
    path: str | Path,
    maps: Mapping[str, Any],
    rows: Sequence[str],
    columns: Sequence[str],
    signed: bool = False,
) -> None:
    """Write matrices as heat maps beside each other to a PNG file.

    maps: title -> matrix (rows, columns). signed: colours on both sides of 0.
    """
    height = 1.5 + 0.17 * len(rows)
    figure = new_figure(path, 2 + len(maps) * (1.5 + 0.22 * len(columns)))
    figure.set_figheight(height)
    for axes, (title, values) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items()):
        largest = float(abs(values).max()) or 1.0
        colours = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest} if signed else {"cmap": "viridis"}
        image = axes.imshow(values, aspect="auto", **colours)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(columns)), labels=columns, rotation=90, fontsize=7)
        axes.set_yticks(range(len(rows)), labels=rows, fontsize=7)
        figure.colorbar(image, ax=axes)
    _write(figure, path)
