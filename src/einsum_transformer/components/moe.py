"""Mixture of experts: y = sum over the chosen experts e of w_e expert_e(x), plus what a shared expert says
(Shazeer et al., 2017; Dai et al., 2024).

Tokens are gathered by expert: each expert sees the tokens that were routed to it as one matrix, so the cost
follows the tokens and not the number of experts. The choice itself has no gradient; the weights of the chosen
do, and through them the router.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from einsum_transformer.components.gated_mlp import GatedMLP
from einsum_transformer.components.mlp import MLP
from einsum_transformer.engine import count, counting, einsum, phase, tap, weight_grad
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
class MoE:
    """Weights in checkpoint layout. A gradient is another MoE, zero for an expert that no token reached."""

    gate: Annotated[Array, "e d"]
    experts: tuple[GatedMLP | MLP, ...]
    shared_expert: GatedMLP | MLP | None = None
    shared_expert_gate: Annotated[Array, "e d"] | None = None
    """One row: the shared expert is multiplied by sigmoid(x . row)."""
    routing: Routing = static(default=Routing())

    def forward(self, x: Array) -> tuple[Array, Any]:
        with phase("router"):
            chosen, w, p = self.routing.forward(einsum("btd,ed->bte", x, self.gate))
            plan = _Plan.of(chosen, len(self.experts))
            if counting():
                _count(plan, w, p)
        with phase("experts"):
            rows = _rows(x)
            # What each chosen expert says of each token, e counting the chosen.
            said = np.empty_like(rows, shape=(*chosen.shape, x.shape[-1]))
            lines = said.reshape(-1, x.shape[-1])
            saved: list[Any] = [None] * len(self.experts)

            def run(e: int, pairs: Array) -> None:
                y, saved[e] = self.experts[e].forward(rows[plan.token(pairs)][None])
                lines[pairs] = _rows(y)

            for_each(run, plan.tasks(), coarse=self._is_coarse(len(plan.order)))
            y = einsum("bte,bted->btd", w, said)
        with phase("shared expert"):
            saved_shared = self._add_shared(x, y)
        return y, (x, p, w, plan, said, saved, saved_shared)

    def backward(self, dy: Array, saved: Any) -> tuple[Array, MoE]:
        x, p, w, plan, said, saved_experts, saved_shared = saved
        with phase("experts"):
            # y = einsum("bte,bted->btd", w, said)
            dw = einsum("btd,bted->bte", dy, said)
            rows, dy_rows, weights = _rows(x), _rows(dy), w.reshape(-1, 1)
            dsaid_dx = np.empty_like(said)
            dlines = dsaid_dx.reshape(-1, x.shape[-1])
            dexperts: list[Any] = [None] * len(self.experts)

            def run(e: int, pairs: Array) -> None:
                expert: Any = self.experts[e]
                kept = saved_experts[e]
                if kept is None:
                    kept = expert.forward(rows[:0][None])[1]
                dsaid = dy_rows[plan.token(pairs)] * weights[pairs]
                through, dexperts[e] = expert.backward(dsaid[None], kept)
                dlines[pairs] = _rows(through)

            for_each(run, plan.tasks(idle=True), coarse=self._is_coarse(len(plan.order)))
            dx = np.moveaxis(np.moveaxis(dsaid_dx, -1, 0).sum(axis=-1), 0, -1)
        with phase("router"):
            # scores = einsum("btd,ed->bte", x, gate)
            dscores = self.routing.backward(dw, plan.chosen, p)
            dx += einsum("bte,ed->btd", dscores, self.gate)
            dgate = weight_grad("bte,btd->ed", dscores, x, self.gate)
        with phase("shared expert"):
            dshared, dshared_gate = self._shared_backward(dx, dy, x, saved_shared)
        return dx, MoE(dgate, tuple(dexperts), dshared, dshared_gate, self.routing)

    def _is_coarse(self, pairs: int) -> bool:
        """Whether the experts have enough to do to run side by side, each on one thread."""
        return pairs * self.experts[0].up_proj.shape[0] * self.gate.shape[1] >= _COARSE

    def _add_shared(self, x: Array, y: Array) -> Any:
        """y += sigmoid(x . shared_expert_gate) * shared_expert(x)"""
        if self.shared_expert is None:
            return None
        said, saved = self.shared_expert.forward(x)
        tap("mlp.shared_expert", said)
        if self.shared_expert_gate is None:
            y += said
            return said, saved, None
        opened = sigmoid(einsum("btd,ed->bte", x, self.shared_expert_gate))
        y += said * opened
        return said, saved, opened

    def _shared_backward(self, dx: Array, dy: Array, x: Array, kept: Any) -> tuple[Any, Any]:
        """Adds to dx, and returns the gradients by the shared expert and by its gate."""
        shared: Any = self.shared_expert
        if shared is None:
            return None, None
        said, saved, opened = kept
        if opened is None:
            through, dshared = shared.backward(dy, saved)
            dx += through
            return dshared, None
        through, dshared = shared.backward(dy * opened, saved)
        dx += through
        # opened = sigmoid(einsum("btd,ed->bte", x, shared_expert_gate))
        dscore = einsum("btd,btd->bt", dy, said)[..., None] * opened * (1 - opened)
        dx += einsum("bte,ed->btd", dscore, self.shared_expert_gate)
        return dshared, weight_grad("bte,btd->ed", dscore, x, self.shared_expert_gate)


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


def _count(plan: _Plan, w: Array, p: Array) -> None:
    """Tell the recorder how often each expert was chosen, with what weights, and how undecided the router
    was, in bits."""
    count("choices", plan.counts)
    count("weights", np.bincount(plan.chosen.ravel(), w.ravel(), minlength=len(plan.counts)))
    bits = -p * np.log2(np.maximum(p, np.finfo(p.dtype).tiny))
    count("entropy", np.array([bits.sum(), p[..., 0].size]))


def _rows(x: Array) -> Array:
    """x (b, t, d) as rows (b t, d) that lie in one piece each: tokens are picked and put back by rows."""
    return np.copy(x, order="C").reshape(-1, x.shape[-1])
