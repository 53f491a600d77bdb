"""Comparison of a model's activations with those that another program saved, step by step.

The steps are the outputs of modules: embedding, norms, the product of every matrix, attention, feed-forward,
layers, logits. A reference names them as checkpoints name the modules ("model.layers.0.self_attn.q_proj") and
also contains `tokens` and `logits`; tools/dump_reference.py writes one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from einsum_transformer.arguments import checked
from einsum_transformer.engine import Recorder
from einsum_transformer.errors import InputError
from einsum_transformer.formats import TensorSource
from einsum_transformer.formats.npz import NpzFile
from einsum_transformer.formats.safetensors import SafetensorsFile
from einsum_transformer.formats.sniff import kind_of
from einsum_transformer.formats.unsupported import named
from einsum_transformer.leaves.watched import watched
from einsum_transformer.models.model import Model
from einsum_transformer.tables import columns, first_names

Array = np.ndarray

TOKENS, LOGITS = "tokens", "logits"
TOLERANCE = 1e-4
_MAX_TOKENS = 1 << 20
"""Maximum number of tokens in a reference."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the model compared with the reference."""

    name: str
    """The name in the reference."""
    shape: tuple[int, ...]
    max_error: float
    """Largest |ours - reference|."""
    relative_error: float
    """||ours - reference|| / ||reference||."""
    passed: bool


@checked
@dataclass(frozen=True, slots=True)
class Parity:
    """The steps that both have, in program order."""

    model: str
    """The source of the model."""
    reference: str
    tokens: tuple[int, ...]
    tolerance: float
    steps: tuple[Step, ...]
    not_in_reference: tuple[str, ...]
    not_compared: tuple[str, ...]
    """Arrays that only the reference contains."""
    same_choice: float | None
    """Share of positions where both have the same most probable token; None without logits."""

    @property
    def first_diverging(self) -> Step | None:
        """The first step whose error exceeds the tolerance, or None."""
        return next((step for step in self.steps if not step.passed), None)

    @property
    def passed(self) -> bool:
        """Whether no step differs."""
        return self.first_diverging is None

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison in JSON types."""
        first = self.first_diverging
        derived = {"passed": self.passed, "first_diverging": None if first is None else first.name}
        return asdict(self) | derived

    def text(self, every: bool = True) -> str:
        """Return the steps as text; every: also those that agree."""
        return render(self, every)

    def __str__(self) -> str:
        return render(self)


def open_reference(path: Path) -> TensorSource:
    """Open a .npz or .safetensors file, or the only such file in a folder."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".npz", ".safetensors"))
        if len(files) != 1:
            raise InputError(
                f"{path}: contains {len(files)} .npz and .safetensors files; name the one to read"
            )
        path = files[0]
    kind = kind_of(path) if path.is_file() else ""
    if path.suffix == ".safetensors" or kind == "safetensors":
        return SafetensorsFile(path)
    if kind == "zip" and path.suffix == ".npz":
        return NpzFile(path)
    words = "" if kind in ("text", "JSON") else named(kind).replace(", not a model", "")
    if path.suffix == ".npz" and not words:
        return NpzFile(path)  # raises the error
    found = f"{words}; " if words else ""
    raise InputError(f"{path}: {found}expected a .npz or .safetensors file, or a folder that contains one")


def parity(model: Model, reference: TensorSource, tolerance: float = TOLERANCE, tokens: Any = None) -> Parity:
    """Run the model on the reference's tokens and compare every step that both have.

    tokens: token ids (b, t) if the reference does not contain any. tolerance: maximum relative error of a
    step, over all its elements. If the model has fewer layers than the reference, its layers are compared.
    Errors: InputError if the reference does not contain any step of the model, or one with another shape.
    """
    if not tolerance >= 0:
        raise InputError(f"`tolerance` is {tolerance}: expected at least 0")
    if tokens is None:
        tokens = model.checked(_tokens(reference), f"the tokens of {reference.path}")
    else:
        tokens = model.checked(tokens)
    seen = replace(model, decoder=watched(model.decoder))
    named = _namer(model, set(reference.names()))
    # The final norm and the logits of a model truncated to its first layers are not those of the reference.
    truncated = named(f"layers.{model.config.num_hidden_layers}") in reference.names()
    found = _Comparing(reference, named, tolerance, (named("norm"), LOGITS) if truncated else ())
    with Recorder(spans=False).on_value(found):
        seen.decoder.forward(tokens)
    if not found.steps:
        named = ", ".join(found.missing[:3])
        raise InputError(
            f"{reference.path}: does not contain any step of the model ({named}, ...), but "
            f"{', '.join(reference.names()[:3])}, ...; tools/dump_reference.py writes such files"
        )
    compared = {step.name for step in found.steps} | {TOKENS}
    others = tuple(name for name in reference.names() if name not in compared)
    return Parity(
        model.source,
        str(reference.path),
        tokens.shape,
        tolerance,
        tuple(found.steps),
        tuple(found.missing),
        others,
        found.same_choice,
    )


class _Comparing:
    """A reader of values that compares each one when it is computed, and does not store it."""

    def __init__(
        self, reference: TensorSource, named: Callable[[str], str], tolerance: float, skipped: tuple[str, ...]
    ) -> None:
        self.reference, self.named, self.tolerance, self.skipped = reference, named, tolerance, skipped
        self.steps: list[Step] = []
        self.missing: list[str] = []
        self.same_choice: float | None = None
        self.available = set(reference.names())

    def __call__(self, path: str, ours: Array) -> None:
        name = self.named(path)
        if name in self.skipped:
            return
        if name not in self.available:
            self.missing.append(name)
            return
        theirs = self._read(name, ours)
        ours = ours.reshape(theirs.shape).astype(np.float64)
        error = np.abs(ours - theirs)
        # inf - inf is NaN, but equal infinities do not differ.
        error[ours == theirs] = 0
        largest, size = float(error.max(initial=0)), float(np.linalg.norm(theirs))
        relative = float(np.linalg.norm(error)) / size if size else largest
        # This comparison is False for NaN.
        self.steps.append(Step(name, theirs.shape, largest, relative, relative <= self.tolerance))
        if name == LOGITS:
            same: Array = ours.argmax(-1) == theirs.argmax(-1)
            self.same_choice = float(np.mean(same))

    def _read(self, name: str, ours: Array) -> Array:
        """Read an array of the reference; its axes may be joined or split, e.g. those of heads."""
        shape = self.reference.info(name).shape
        if prod(shape) != ours.size or shape[:1] not in (ours.shape[:1], (prod(ours.shape[:2]),)):
            raise InputError(
                f"{self.reference.path}: {name} has shape {list(shape)}, but the model's has "
                f"{list(ours.shape)}: is it of another model, or of other tokens?"
            )
        return self.reference.read(name).astype(np.float64)


def _tokens(reference: TensorSource) -> Array:
    if TOKENS not in reference.names():
        raise InputError(
            f"{reference.path}: does not contain an array {TOKENS!r}; give the token ids as `tokens`"
        )
    if (count := prod(reference.info(TOKENS).shape)) > _MAX_TOKENS:
        raise InputError(f"{reference.path}: contains {count:,} tokens, expected at most {_MAX_TOKENS:,}")
    return np.atleast_2d(reference.read(TOKENS))


def _namer(model: Model, available: set[str]) -> Callable[[str], str]:
    """Return a function that maps a module's path to its name in the reference: the checkpoint's name with
    any of the family's prefixes, or the path itself, which newer versions of transformers use."""
    prefixes = (model.family.prefix, *model.family.other_prefixes)

    def named(path: str) -> str:
        if path == LOGITS:
            return LOGITS
        names = [replace(model.family, prefix=prefix).checkpoint_name(path) for prefix in prefixes]
        names = [name.removesuffix(".weight") for name in names]
        names += [f"{prefix}{path}" for prefix in prefixes]
        return next((name for name in names if name in available), names[0])

    return named


def render(found: Parity, every: bool = True) -> str:
    """Return the steps as text; every: also those that agree."""
    first = found.first_diverging
    rows = [
        (
            step.name,
            f"{step.max_error:.1e}",
            f"{step.relative_error:.1e}",
            "" if step.passed else "diverges first" if step is first else "diverges",
        )
        for step in found.steps
        if every or not step.passed
    ]
    lines = [*columns([("step", "largest error", "relative", ""), *rows], right=(1, 2)), ""] if rows else []
    lines.append(f"{len(found.steps)} steps compared on {' x '.join(map(str, found.tokens))} tokens")
    if found.not_in_reference:
        lines.append(f"not in the reference: {first_names(found.not_in_reference, 4)}")
    if found.not_compared:
        lines.append(f"only in the reference: {first_names(found.not_compared, 4)}")
    if found.same_choice is not None:
        lines.append(f"most probable next token: the same at {100 * found.same_choice:.1f} % of positions")
    if first is None:
        lines.append(f"equal: no step has a relative error above {found.tolerance:g}")
    else:
        more = sum(not step.passed for step in found.steps)
        differ = "1 step differs" if more == 1 else f"{more} steps differ"
        lines.append(f"{differ} with a relative error above {found.tolerance:g}, first {first.name}")
    return "\n".join(lines)
