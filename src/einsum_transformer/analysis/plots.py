"""Figures in PNG files, by matplotlib, which is an extra."""

from __future__ import annotations

import os
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
    with atomic_file(Path(path)) as file:
        figure.savefig(file, dpi=150, format="png")
