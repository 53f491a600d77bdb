"""LoRA: a frozen weight W plus a trained product of two thin matrices, W + scaling * B A (Hu et al., 2021).

In the place of W in an equation, the term of W, say `fd`, becomes `fr,rd`: a product with a LoRA weight is
W's product plus two thin ones, and W + scaling * B A is never held.
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
    """Zeroes of LoRA inputs, drawn anew for every `key` and row, and the same again for the same ones.

    A mask depends on nothing but the key, the row's number in the whole batch and the weight's name: the
    backward pass draws the mask of the forward pass again rather than keeping it, a resumed run draws those
    of the run that was cut, and a batch computed in parts, on threads or by several processes has the masks
    of the whole.
    """

    probability: float = 0.0
    key: tuple[int, ...] | None = None
    """What the masks depend on, such as (seed, step); None outside of training: no zeroes."""
    first_row: int = 0
    """The number in the whole batch of the first row at hand."""

    def applied(self, x: Array, name: str) -> Array:
        """x (b, t, ...) with zeroes of this probability, the rest scaled so that the mean stays."""
        if self.key is None or self.probability == 0:
            return x
        kept = np.empty(x.shape, bool)
        for i, row in enumerate(kept):
            rng = np.random.default_rng([*self.key, self.first_row + i, zlib.crc32(name.encode())])
            # Drawn in the order of the axes, so that neither the memory layout of x nor padding at the end of
            # the row changes anything.
            np.greater_equal(rng.random(x.shape[1:], np.float32), self.probability, out=row)
        return x * (kept * x.dtype.type(1 / (1 - self.probability)))


class LoRA(Leaf):
    """W + scaling * b a, viewed like W: its first `out_axes` axes are outputs, the others inputs.

    a: (r, *inputs), b: (*outputs, r). stack: the path of the stacked parameter whose adapter this is a part
    of, where a file holds one adapter for all experts of a layer. owner: the path of the weight whose `a`
    this one uses too (gate and up of an expert in one stack); its gradient is added to that of the owner.
    """

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
        self.name, self.base, self.a, self.b = name, base, a, b
        self.scaling, self.out_axes, self.dropout = scaling, out_axes, dropout or Dropout()
        self.stack, self.owner = stack, owner
        self.shape, self.dtype = tuple(base.shape), base.dtype

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def parts(self) -> dict[str, Any]:
        return {"base": self.base, "lora_A": self.a, "lora_B": self.b}

    def with_parts(self, parts: Mapping[str, Any]) -> LoRA:
        return self._with(self.dropout, parts["base"], parts["lora_A"], parts["lora_B"])

    def trained_parts(self, path: str) -> dict[str, str]:
        return {"lora_A": f"{self.owner or path}.lora_A", "lora_B": f"{path}.lora_B"}

    def drawn(self, key: tuple[int, ...], first_row: int) -> LoRA:
        dropout = replace(self.dropout, key=key, first_row=first_row)
        return self._with(dropout, self.base, self.a, self.b)

    def bare(self) -> Any:
        return self.base

    def writable(self) -> LoRA:
        return self

    def _with(self, dropout: Dropout, base: Any, a: Array, b: Array) -> LoRA:
        return LoRA(self.name, base, a, b, self.scaling, self.out_axes, dropout, self.stack, self.owner)

    def array(self) -> Array:
        """W + scaling * b a"""
        return _numbers(self.base) + self.delta()

    def delta(self) -> Array:
        """scaling * b a, in the shape of W."""
        a, b = _numbers(self.a).reshape(self.rank, -1), _numbers(self.b).reshape(-1, self.rank)
        return (self.scaling * einsum("fr,rd->fd", b, a)).reshape(self.shape)

    def contract(self, equation: str, operands: tuple[Any, ...], position: int, order: str = "K") -> Array:
        if len(operands) != 2:
            raise EquationError(f"einsum {equation}: a LoRA weight takes part in products of two operands")
        x = operands[1 - position]
        y = product(equation, (self.base, x) if position == 0 else (x, self.base), order)
        parsed = _parsed(equation)
        weight, term, output = parsed.inputs[position], parsed.inputs[1 - position], parsed.output
        outputs, inputs = weight[: self.out_axes], weight[self.out_axes :]
        if not set(inputs) & set(output):
            # "btd,fd->btf" is "btd,rd->btr", then "btr,fr->btf"
            thin = "".join(letter for letter in term if letter not in inputs) + "r"
            h = einsum(f"{term},r{inputs}->{thin}", self.dropout.applied(x, self.name), self.a)
            h *= self.dtype.type(self.scaling)
            y += einsum(f"{thin},{outputs}r->{output}", h, self.b)
            return y
        # "btf,fd->btd" is "btf,fr->btr", then "btr,rd->btd"
        thin = "".join(letter for letter in term if letter not in outputs) + "r"
        h = einsum(f"{term},{outputs}r->{thin}", x, self.b)
        h *= self.dtype.type(self.scaling)
        y += self.dropout.applied(einsum(f"{thin},r{inputs}->{output}", h, self.a), self.name)
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
        """Rows of W, an embedding (v, d), plus those of scaling * b a."""
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
    """Path -> adapter of every weight in a decoder that has one."""
    return {path: leaf for path, leaf in named_leaves(decoder) if isinstance(leaf, LoRA)}


def _parsed(equation: str) -> Equation:
    parsed = Equation.parse(equation)
    if "r" in parsed.letters:
        raise EquationError(f"einsum {equation}: the letter r stands for the rank of the LoRA weight")
    return parsed


def _numbers(weight: Any) -> Array:
    return weight.array() if isinstance(weight, Leaf) else weight
