"""Mixture of experts: y = sum over the chosen experts e of w_e expert_e(x), plus the output of a shared
expert (Shazeer et al., 2017; Dai et al., 2024).

Tokens are gathered by expert: each expert sees the tokens that were routed to it as one matrix, so the cost
follows the tokens and not the number of experts. The choice itself has no gradient; the weights of the chosen
do, and through them the router.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from einsum_transformer.components.gated_mlp import GatedMLP
from einsum_transformer.components.mlp import MLP
from einsum_transformer.engine import einsum, phase, tap, weight_grad
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.numerics.activations import sigmoid
from einsum_transformer.numerics.softmax import softmax
from einsum_transformer.numerics.top_k import top_k, without_all_but_best_groups
from einsum_transformer.tree import static

Array = np.ndarray
Scoring = Literal["softmax", "sigmoid"]

_COARSE = 1 << 24
"""Multiplications from which experts run side by side, each on one thread."""


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router's scores become the weights of `top_k` experts."""

    top_k: int = 2
    scoring: Scoring = "softmax"
    """"softmax" over all experts, or "sigmoid" of each."""
    normalize: bool = True
    """Divide the weights of the chosen by their sum."""
    scaling: float = 1.0
    """What the weights are multiplied by at the end."""
    groups: int = 1
    """Experts stand in so many groups of neighbours..."""
    top_groups: int = 1
    """...and only those of the groups with the best experts are chosen from."""

    def forward(self, scores: Array) -> tuple[Array, Array, Array]:
        """scores (b, t, e) -> chosen experts (b, t, top_k), their weights (b, t, top_k), probabilities."""
        p = softmax(scores) if self.scoring == "softmax" else sigmoid(scores)
        limited = self.groups > 1 and self.top_groups < self.groups
        candidates = without_all_but_best_groups(p, self.groups, self.top_groups) if limited else p
        chosen = top_k(candidates, self.top_k)
        w = np.take_along_axis(p, chosen, axis=-1)
        if self.normalize:
            w = w / w.sum(axis=-1, keepdims=True)
        return chosen, w * np.asarray(self.scaling, w.dtype), p

    def backward(self, dw: Array, chosen: Array, p: Array) -> Array:
        """The gradient by the scores."""
        dw = dw * np.asarray(self.scaling, dw.dtype)
        if self.normalize:
            # w = u / sum(u)
            u = np.take_along_axis(p, chosen, axis=-1)
            total = u.sum(axis=-1, keepdims=True)
            dw = (dw - (dw * u).sum(axis=-1, keepdims=True) / total) / total
        dp = np.zeros_like(p)
        np.put_along_axis(dp, chosen, dw, axis=-1)
        if self.scoring == "sigmoid":
            return dp * p * (1 - p)
        return p * (dp - (dp * p).sum(axis=-1, keepdims=True))


@dataclass(frozen=True, slots=True)
class _Plan:
    """Who goes where: pairs (token, expert), numbered through `chosen`, in the order of the experts."""

    chosen: Array
    """(b, t, top_k)"""
    order: Array
    counts: Array
    """Pairs of each expert."""

    @staticmethod
    def of(chosen: Array, experts: int) -> _Plan:
        flat = chosen.ravel()
        return _Plan(chosen, np.argsort(flat, kind="stable"), np.bincount(flat, minlength=experts))

    def token(self, pairs: Array) -> Array:
        """The tokens of pairs, counted through the batch."""
        return pairs // self.chosen.shape[-1]

    def tasks(self, idle: bool = False) -> list[tuple[int, Array]]:
        """(expert, its pairs), the busiest first, so that threads end together; idle: also of experts that
        have none."""
        ends = np.cumsum(self.counts)
        pairs = [self.order[end - n : end] for end, n in zip(ends, self.counts)]
        busiest = np.argsort(-self.counts, kind="stable").tolist()
        return [(e, pairs[e]) for e in busiest if idle or len(pairs[e])]


class SharedSaved(NamedTuple):
    """What the backward pass of the shared expert needs."""

    expert: Any
    shared_out: Array
    opened: Array | None
    """sigmoid of the shared expert's gate, None where it has none."""


class Saved(NamedTuple):
    """What the backward pass of MoE needs."""

    x: Array
    p: Array
    w: Array
    plan: _Plan
    expert_out: Array
    experts: list[Any]
    """Of each expert, None for one that no token reached."""
    shared: SharedSaved | None


@dataclass(frozen=True, slots=True)
class MoE:
    """Weights in checkpoint layout. A gradient is another MoE, zero for an expert that no token reached."""

    gate: Annotated[Array, "e d"]
    experts: tuple[GatedMLP | MLP, ...]
    shared_expert: GatedMLP | MLP | None = None
    shared_expert_gate: Annotated[Array, "e d"] | None = None
    """One row: the shared expert is multiplied by sigmoid(x . row)."""
    routing: Routing = static(default=Routing())

    def forward(self, x: Array) -> tuple[Array, Saved]:
        with phase("router"):
            chosen, w, p = self.routing.forward(einsum("btd,ed->bte", x, self.gate))
            chosen, w = tap("gate.chosen", chosen, asked=True), tap("gate.weights", w, asked=True)
            p = tap("gate.probabilities", p, asked=True)
            plan = _Plan.of(chosen, len(self.experts))
        with phase("experts"):
            rows = _rows(x)
            # The output of each chosen expert for each token, e counting the chosen.
            expert_out = np.empty_like(rows, shape=(*chosen.shape, x.shape[-1]))
            lines = expert_out.reshape(-1, x.shape[-1])
            saved: list[Any] = [None] * len(self.experts)

            def run(e: int, pairs: Array) -> None:
                y, saved[e] = self.experts[e].forward(rows[plan.token(pairs)][None])
                lines[pairs] = _rows(y)

            for_each(run, plan.tasks(), coarse=self._is_coarse(len(plan.order)))
            y = einsum("bte,bted->btd", w, expert_out)
        with phase("shared expert"):
            saved_shared = self._add_shared(x, y)
        return y, Saved(x, p, w, plan, expert_out, saved, saved_shared)

    def backward(self, dy: Array, saved: Saved) -> tuple[Array, MoE]:
        x, plan, expert_out = saved.x, saved.plan, saved.expert_out
        with phase("experts"):
            # y = einsum("bte,bted->btd", w, expert_out)
            dw = einsum("btd,bted->bte", dy, expert_out)
            rows, dy_rows, weights = _rows(x), _rows(dy), saved.w.reshape(-1, 1)
            dx_parts = np.empty_like(expert_out)
            lines = dx_parts.reshape(-1, x.shape[-1])
            dexperts: list[Any] = [None] * len(self.experts)

            def run(e: int, pairs: Array) -> None:
                expert: Any = self.experts[e]
                kept = saved.experts[e]
                if kept is None:
                    kept = expert.forward(rows[:0][None])[1]
                dexpert_out = dy_rows[plan.token(pairs)] * weights[pairs]
                dx_part, dexperts[e] = expert.backward(dexpert_out[None], kept)
                lines[pairs] = _rows(dx_part)

            for_each(run, plan.tasks(idle=True), coarse=self._is_coarse(len(plan.order)))
            dx = np.moveaxis(np.moveaxis(dx_parts, -1, 0).sum(axis=-1), 0, -1)
        with phase("router"):
            # scores = einsum("btd,ed->bte", x, gate)
            dscores = self.routing.backward(dw, plan.chosen, saved.p)
            dx += einsum("bte,ed->btd", dscores, self.gate)
            dgate = weight_grad(self.gate, "bte,btd->ed", dscores, x)
        with phase("shared expert"):
            dshared, dshared_gate = self._shared_backward(dx, dy, x, saved.shared)
        return dx, MoE(
            gate=dgate,
            experts=tuple(dexperts),
            shared_expert=dshared,
            shared_expert_gate=dshared_gate,
            routing=self.routing,
        )

    def _is_coarse(self, pairs: int) -> bool:
        """Whether the experts have enough to do to run side by side, each on one thread."""
        return pairs * self.experts[0].up_proj.shape[0] * self.gate.shape[1] >= _COARSE

    def _add_shared(self, x: Array, y: Array) -> SharedSaved | None:
        """y += sigmoid(x . shared_expert_gate) * shared_expert(x)"""
        if self.shared_expert is None:
            return None
        shared_out, saved = self.shared_expert.forward(x)
        shared_out = tap("shared_expert", shared_out)
        if self.shared_expert_gate is None:
            y += shared_out
            return SharedSaved(saved, shared_out, None)
        opened = sigmoid(einsum("btd,ed->bte", x, self.shared_expert_gate))
        y += shared_out * opened
        return SharedSaved(saved, shared_out, opened)

    def _shared_backward(self, dx: Array, dy: Array, x: Array, saved: SharedSaved | None) -> tuple[Any, Any]:
        """Adds to dx, and returns the gradients by the shared expert and by its gate."""
        shared: Any = self.shared_expert
        if shared is None or saved is None:
            return None, None
        opened = saved.opened
        if opened is None:
            dx_part, dshared = shared.backward(dy, saved.expert)
            dx += dx_part
            return dshared, None
        dx_part, dshared = shared.backward(dy * opened, saved.expert)
        dx += dx_part
        # opened = sigmoid(einsum("btd,ed->bte", x, shared_expert_gate))
        dscore = einsum("btd,btd->bt", dy, saved.shared_out)[..., None] * opened * (1 - opened)
        dx += einsum("bte,ed->btd", dscore, self.shared_expert_gate)
        return dshared, weight_grad(self.shared_expert_gate, "bte,btd->ed", dscore, x)


def _rows(x: Array) -> Array:
    """x (b, t, d) as rows (b t, d) that lie in one piece each: tokens are picked and put back by rows."""
    return np.copy(x, order="C").reshape(-1, x.shape[-1])
