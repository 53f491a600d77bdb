"""LoRA: a frozen weight W plus a trained low-rank product, W + scaling * B A (Hu et al., 2021).

In an equation, the term of W, such as `fd`, becomes `fr,rd`: a product with a LoRA weight is the product with
W plus two low-rank products, and W + scaling * B A is never materialized.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from einsum_transformer.engine import Equation, EquationError, Gradients, Leaf, einsum, weight_grad
from einsum_transformer.engine.contract import add_rows, product, take_rows
from einsum_transformer.tree import named_leaves

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Dropout:
    """Dropout of LoRA inputs, with reproducible masks.

    A mask depends only on the key, the row's index in the whole batch and the weight's name: the backward
    pass regenerates the mask of the forward pass instead of storing it, a resumed run has the masks of an
    uninterrupted one, and a batch computed in parts, on threads or by several processes has the masks of the
    whole batch.
    """

    probability: float = 0.0
    key: tuple[int, ...] | None = None
    """RNG key of the masks, such as (seed, step); None outside of training: no dropout."""
    first_row: int = 0
    """Index in the whole batch of the first row of the current part."""

    def applied(self, x: Array, name: str) -> Array:
        """Return x (b, t, ...) after dropout, with the other elements scaled by 1 / (1 - probability)."""
        if self.key is None or self.probability == 0:
            return x
        keep = np.empty(x.shape, bool)
        for i, row in enumerate(keep):
            rng = np.random.default_rng([*self.key, self.first_row + i, zlib.crc32(name.encode())])
            # Drawn in axis order, so that the mask depends neither on the memory layout of x nor on right
            # padding.
            np.greater_equal(rng.random(x.shape[1:], np.float32), self.probability, out=row)
        return x * (keep * x.dtype.type(1 / (1 - self.probability)))


class LoRA(Leaf):
    """W + scaling * b a in the shape of W, whose first `out_axes` axes are outputs and the others inputs.

    a: `(r, *inputs)`, b: `(*outputs, r)`. stack: the path of the stacked parameter whose adapter contains
    this one, if there is one adapter for all experts of a layer. owner: the path of the weight whose `a` this
    one shares (gate and up of an expert in one stack); the gradients of a shared `a` are summed.
    """

    repeatable: bool = True

    def __init__(
        self,
        name: str,
        base: Any,
        a: Array,
        b: Array,
        scaling: float,
        out_axes: int,
        dropout: Dropout | None = None,
        stack: str = "",
        owner: str = "",
    ) -> None:
        self.name: str = name
        self.base: Any = base
        self.a: Array = a
        self.b: Array = b
        self.scaling: float = scaling
        self.out_axes: int = out_axes
        self.dropout: Dropout = dropout or Dropout()
        self.stack: str = stack
        self.owner: str = owner
        self.shape: tuple[int, ...] = tuple(base.shape)
        self.dtype: np.dtype = base.dtype

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def parts(self) -> dict[str, Any]:
        return {"base": self.base, "lora_A": self.a, "lora_B": self.b}

    def with_parts(self, parts: Mapping[str, Any]) -> LoRA:
        return self._with(self.dropout, parts["base"], parts["lora_A"], parts["lora_B"])

    def trained_parts(self, path: str) -> dict[str, str]:
        return {"lora_A": f"{self.owner or path}.lora_A", "lora_B": f"{path}.lora_B"}

    def with_dropout(self, key: tuple[int, ...], first_row: int) -> LoRA:
        dropout = replace(self.dropout, key=key, first_row=first_row)
        return self._with(dropout, self.base, self.a, self.b)

    def base_weight(self) -> Any:
        return self.base

    def writable(self) -> LoRA:
        return self

    def _with(self, dropout: Dropout, base: Any, a: Array, b: Array) -> LoRA:
        return LoRA(self.name, base, a, b, self.scaling, self.out_axes, dropout, self.stack, self.owner)

    def array(self) -> Array:
        """W + scaling * b a"""
        return _as_array(self.base) + self.delta()

    def delta(self) -> Array:
        """scaling * b a, in the shape of W."""
        a, b = _as_array(self.a).reshape(self.rank, -1), _as_array(self.b).reshape(-1, self.rank)
        return (self.scaling * einsum("fr,rd->fd", b, a)).reshape(self.shape)

    def contract(self, equation: str, operands: tuple[Any, ...], position: int, order: str = "K") -> Array:
        if len(operands) != 2:
            raise EquationError(
                f"einsum {equation}: a LoRA weight is supported only in products of two operands"
            )
        x = operands[1 - position]
        y = product(equation, (self.base, x) if position == 0 else (x, self.base), order)
        parsed = _parsed(equation)
        weight, term, output = parsed.inputs[position], parsed.inputs[1 - position], parsed.output
        outputs, inputs = weight[: self.out_axes], weight[self.out_axes :]
        if not set(inputs) & set(output):
            # "btd,fd->btf" is "btd,rd->btr", then "btr,fr->btf"
            h_term = "".join(letter for letter in term if letter not in inputs) + "r"
            h = einsum(f"{term},r{inputs}->{h_term}", self.dropout.applied(x, self.name), self.a)
            h *= self.dtype.type(self.scaling)
            y += einsum(f"{h_term},{outputs}r->{output}", h, self.b)
            return y
        # "btf,fd->btd" is "btf,fr->btr", then "btr,rd->btd"
        h_term = "".join(letter for letter in term if letter not in outputs) + "r"
        h = einsum(f"{term},{outputs}r->{h_term}", x, self.b)
        h *= self.dtype.type(self.scaling)
        y += self.dropout.applied(einsum(f"{h_term},r{inputs}->{output}", h, self.a), self.name)
        return y

    def weight_grad(self, equation: str, *operands: Array) -> Gradients:
        dy, x = operands
        parsed = _parsed(equation)
        outputs, inputs = parsed.output[: self.out_axes], parsed.output[self.out_axes :]
        dy_term, x_term = parsed.inputs
        summed = "".join(letter for letter in x_term if letter not in inputs)
        x = self.dropout.applied(x, self.name)
        # y = einsum("btr,fr->btf", h, b) * scaling, h = einsum("btd,rd->btr", x, a)
        h = einsum(f"{x_term},r{inputs}->{summed}r", x, self.a)
        h *= self.dtype.type(self.scaling)
        db = weight_grad(self.b, f"{dy_term},{summed}r->{outputs}r", dy, h)
        dh = einsum(f"{dy_term},{outputs}r->{summed}r", dy, self.b)
        dh *= self.dtype.type(self.scaling)
        da = weight_grad(self.a, f"{summed}r,{x_term}->r{inputs}", dh, x)
        return Gradients(lora_A=da, lora_B=db)

    def rows(self, indices: Array) -> Array:
        """Rows of an embedding W (v, d), plus the same rows of scaling * b a."""
        h = take_rows(self.b, indices) * self.dtype.type(self.scaling)
        return take_rows(self.base, indices) + einsum("btr,rd->btd", h, self.a)

    def add_rows(self, indices: Array, dy: Array) -> Gradients:
        # y = einsum("btr,rd->btd", h, a), h = take_rows(b, indices) * scaling
        h = take_rows(self.b, indices) * self.dtype.type(self.scaling)
        da = weight_grad(self.a, "btr,btd->rd", h, dy)
        dh = einsum("btd,rd->btr", dy, self.a)
        dh *= self.dtype.type(self.scaling)
        return Gradients(lora_A=da, lora_B=add_rows(self.b, indices, dh))


def adapters_of(decoder: Any) -> dict[str, LoRA]:
    """Path -> LoRA adapter of every weight of a decoder that has one."""
    return {path: leaf for path, leaf in named_leaves(decoder) if isinstance(leaf, LoRA)}


def _parsed(equation: str) -> Equation:
    parsed = Equation.parse(equation)
    if "r" in parsed.letters:
        raise EquationError(f"einsum {equation}: the letter r is reserved for the rank of the LoRA weight")
    return parsed


def _as_array(weight: Any) -> Array:
    return weight.array() if isinstance(weight, Leaf) else weight
