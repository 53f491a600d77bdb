"""Comparison with another checkout of this project: the option --against and its table."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import Table, median
from processes import PREFIX, ROOT


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against",
        type=checkout,
        metavar="PATH",
        help="another checkout of this project to compare with",
    )


def checkout(text: str) -> Path:
    """The folder of --against; exits with an error if it is not a checkout of this project."""
    path = Path(text).resolve()
    if not (path / "src/einsum_transformer/__init__.py").is_file():
        raise SystemExit(f"--against {text}: not a checkout of this project: no src/einsum_transformer in it")
    return path


def name_of(path: Path) -> str:
    """The name of the folder with its commit, if it is a git checkout."""
    if not (path / ".git").exists():  # git would report the commit of an enclosing repository
        return path.name
    command = ["git", "-C", str(path), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return path.name
    return f"{path.name} ({commit})" if commit else path.name


def with_other(candidates: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    """The candidates, with a copy of each of ours that runs the checkout at `path`."""
    found = {}
    for name, candidate in candidates.items():
        found[name] = candidate
        if path is not None and candidate.checkout == ROOT:
            label = candidate.label.replace("ours", name_of(path), 1)
            found[PREFIX + name] = replace(candidate, label=label, checkout=path)
    return found


def table(path: Path, rows: Iterable[tuple[str, Sequence[float], Sequence[float]]]) -> Table:
    """rows: (name of the measure, our samples, their samples), a sample per round; less is better."""
    name, lines = name_of(path), []
    for measure, ours, theirs in rows:
        ratios = [other / own for own, other in zip(ours, theirs)]
        compared = f"{median(ratios):.3f}x", f"{min(ratios):.3f}", f"{max(ratios):.3f}"
        lines.append((measure, shown(median(ours)), shown(median(theirs)), *compared))
    header = ("", "ours", name, f"{path.name} / ours", "least", "most")
    return Table(f"This checkout compared with {name}", header, lines)


def shown(value: float) -> str:
    return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"
