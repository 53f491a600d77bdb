"""A model against a dump of another program's activations, step by step.

The steps are those that a program built of modules shows too: embedding, norms, the product of every matrix,
attention, feed-forward and layer, the logits. A reference names them as checkpoints name the modules
("model.layers.0.self_attn.q_proj"), beside `tokens` and `logits`; tools/dump_reference.py writes one.
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
from einsum_transformer.tables import columns, some

Array = np.ndarray

TOKENS, LOGITS = "tokens", "logits"
TOLERANCE = 1e-4
_MOST_NUMBERS = 1 << 20
"""Tokens of a reference."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the program beside the reference's."""

    name: str
    """In the reference."""
    shape: tuple[int, ...]
    max_error: float
    """Largest |ours - reference|."""
    relative_error: float
    """||ours - reference|| / ||reference||."""
    passed: bool


@checked
@dataclass(frozen=True, slots=True)
class Parity:
    """All steps that both have, in the order of the program."""

    model: str
    """The source of the model."""
    reference: str
    tokens: tuple[int, ...]
    tolerance: float
    steps: tuple[Step, ...]
    not_in_reference: tuple[str, ...]
    not_compared: tuple[str, ...]
    """What only the reference has."""
    same_choice: float | None
    """Share of positions where both have the same most probable token, None without logits."""

    @property
    def first_diverging(self) -> Step | None:
        """The first step whose error exceeds the tolerance, or None."""
        return next((step for step in self.steps if not step.passed), None)

    @property
    def passed(self) -> bool:
        """Whether no step differs."""
        return self.first_diverging is None

    def to_dict(self) -> dict[str, Any]:
        """The numbers in JSON types."""
        first = self.first_diverging
        derived = {"passed": self.passed, "first_diverging": None if first is None else first.name}
        return asdict(self) | derived

    def text(self, every: bool = True) -> str:
        """The steps as text; every: also those that agree."""
        return render(self, every)

    def __str__(self) -> str:
        return render(self)


def open_reference(path: Path) -> TensorSource:
    """The arrays of a .npz or .safetensors file, or of the one such file that a folder holds."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".npz", ".safetensors"))
        if len(files) != 1:
            raise InputError(f"{path}: holds {len(files)} .npz and .safetensors files; name the one to read")
        path = files[0]
    kind = kind_of(path) if path.is_file() else ""
    if path.suffix == ".safetensors" or kind == "safetensors":
        return SafetensorsFile(path)
    if kind == "zip" and path.suffix == ".npz":
        return NpzFile(path)
    words = "" if kind in ("text", "JSON") else named(kind).replace(", not a model", "")
    if path.suffix == ".npz" and not words:
        return NpzFile(path)  # raises an error that names the problem
    wanted = "a .npz or .safetensors file, or a folder that holds one, is expected"
    raise InputError(f"{path}: {wanted}{words and f': {words}'}")


def parity(model: Model, reference: TensorSource, tolerance: float = TOLERANCE, tokens: Any = None) -> Parity:
    """Run the model on the reference's tokens and compare every step that both have.

    tokens: (b, t) ids where the reference has none. tolerance: of the relative error of a step, over all its
    numbers. Of a model with fewer layers than the reference those are compared that it has.
    Errors: InputError where the reference has no step of the model, or one of another shape.
    """
    if not tolerance >= 0:
        raise InputError(f"tolerance is {tolerance}: at least 0 is expected")
    if tokens is None:
        tokens = model.checked(_tokens(reference), f"the tokens of {reference.path}")
    else:
        tokens = model.checked(tokens)
    seen = replace(model, decoder=watched(model.decoder))
    named = _namer(model, set(reference.names()))
    # Of a model that was cut to its first layers, what comes after them is another model's.
    cut = named(f"layers.{model.config.num_hidden_layers}") in reference.names()
    found = _Comparing(reference, named, tolerance, (named("norm"), LOGITS) if cut else ())
    with Recorder(spans=False).on_value(found):
        seen.decoder.forward(tokens)
    if not found.steps:
        named = ", ".join(found.missing[:3])
        raise InputError(
            f"{reference.path}: holds no step of the model, none of {named}, ...; what it holds: "
            f"{', '.join(reference.names()[:3])}, ... (tools/dump_reference.py writes such files)"
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
    """Reads values: each is compared as it comes and not kept."""

    def __init__(
        self, reference: TensorSource, named: Callable[[str], str], tolerance: float, ignored: tuple[str, ...]
    ) -> None:
        self.reference, self.named, self.tolerance, self.ignored = reference, named, tolerance, ignored
        self.steps: list[Step] = []
        self.missing: list[str] = []
        self.same_choice: float | None = None
        self.held = set(reference.names())

    def __call__(self, place: str, ours: Array) -> None:
        name = self.named(place)
        if name in self.ignored:
            return
        if name not in self.held:
            self.missing.append(name)
            return
        theirs = self._read(name, ours)
        ours = ours.reshape(theirs.shape).astype(np.float64)
        error = np.abs(ours - theirs)
        # Where both overflow alike there is no difference.
        error[ours == theirs] = 0
        largest, size = float(error.max(initial=0)), float(np.linalg.norm(theirs))
        relative = float(np.linalg.norm(error)) / size if size else largest
        # so written that a NaN fails
        self.steps.append(Step(name, theirs.shape, largest, relative, relative <= self.tolerance))
        if name == LOGITS:
            self.same_choice = float(np.mean(ours.argmax(-1) == theirs.argmax(-1)))

    def _read(self, name: str, ours: Array) -> Array:
        """The reference's numbers; its axes may be joined or split, as those of heads are."""
        shape = self.reference.info(name).shape
        if prod(shape) != ours.size or shape[:1] not in (ours.shape[:1], (prod(ours.shape[:2]),)):
            raise InputError(
                f"{self.reference.path}: {name} is {list(shape)}, the model's is {list(ours.shape)}: "
                "another model, or other tokens?"
            )
        return self.reference.read(name).astype(np.float64)


def _tokens(reference: TensorSource) -> Array:
    if TOKENS not in reference.names():
        raise InputError(
            f"{reference.path}: has no array {TOKENS!r}; give the token ids with --tokens FILE.npy"
        )
    if prod(reference.info(TOKENS).shape) > _MOST_NUMBERS:
        raise InputError(f"{reference.path}: more than {_MOST_NUMBERS:,} tokens")
    return np.atleast_2d(reference.read(TOKENS))


def _namer(model: Model, held: set[str]) -> Callable[[str], str]:
    """What the reference calls a place: a checkpoint's name for it with whichever prefix it has there, or
    ours, which programs come back to where checkpoints have older names."""
    prefixes = (model.family.prefix, *model.family.other_prefixes)

    def named(place: str) -> str:
        if place == LOGITS:
            return LOGITS
        names = [replace(model.family, prefix=prefix).checkpoint_name(place) for prefix in prefixes]
        names = [name.removesuffix(".weight") for name in names]
        names += [f"{prefix}{place}" for prefix in prefixes]
        return next((name for name in names if name in held), names[0])

    return named


def render(found: Parity, every: bool = True) -> str:
    """The steps as text; every: also those that agree."""
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
        lines.append(f"not in the reference: {some(found.not_in_reference, 4)}")
    if found.not_compared:
        lines.append(f"only in the reference: {some(found.not_compared, 4)}")
    if found.same_choice is not None:
        lines.append(f"most probable next token: the same at {100 * found.same_choice:.1f} % of positions")
    if first is None:
        lines.append(f"equal: no step differs by more than {found.tolerance:g} of its size")
    else:
        more = sum(not step.passed for step in found.steps)
        differ = "1 step differs" if more == 1 else f"{more} steps differ"
        lines.append(f"{differ} by more than {found.tolerance:g} of the reference's size, first {first.name}")
    return "\n".join(lines)
