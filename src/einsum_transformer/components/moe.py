"""Mixture of experts: y = sum over the selected experts e of w_e expert_e(x), plus the output of a shared
expert (Shazeer et al., 2017; Dai et al., 2024).

Tokens are grouped by expert: each expert processes the tokens routed to it as one matrix, so the cost depends
on the number of tokens and not of experts. The top-k selection has no gradient; the router is trained by the
gradient of the weights w_e.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from einsum_transformer.components.gated_mlp import GatedMLP
from einsum_transformer.components.mlp import MLP
from einsum_transformer.engine import einsum, phase, tap, weight_grad
from einsum_transformer.engine.parallel import for_each
from einsum_transformer.engine.recorder import scoped
from einsum_transformer.numerics.activations import sigmoid
from einsum_transformer.numerics.softmax import softmax
from einsum_transformer.numerics.top_k import mask_groups, top_k
from einsum_transformer.tree import static

Array = np.ndarray
Scoring = Literal["softmax", "sigmoid"]

_COARSE = 1 << 24
"""Number of multiplications from which experts run in parallel, each on one thread."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Settings of the top-k selection of experts and of their weights."""

    top_k: int = 2
    scoring: Scoring = "softmax"
    """"softmax" over all experts, or "sigmoid" of each."""
    normalize: bool = True
    """Divide the weights of the selected experts by their sum."""
    scaling: float = 1.0
    """Factor of the final weights."""
    groups: int = 1
    """Number of equal groups of consecutive experts (`n_group`)."""
    top_groups: int = 1
    """Number of groups, those with the best experts, that experts are selected from (`topk_group`)."""

    def forward(self, logits: Array) -> tuple[Array, Array, Array]:
        """Router logits (b, t, e) -> selected experts (b, t, top_k), their weights (b, t, top_k), and the
        probabilities (b, t, e)."""
        p = softmax(logits) if self.scoring == "softmax" else sigmoid(logits)
        limited = self.groups > 1 and self.top_groups < self.groups
        candidates = mask_groups(p, self.groups, self.top_groups) if limited else p
        chosen = top_k(candidates, self.top_k)
        w = np.take_along_axis(p, chosen, axis=-1)
        if self.normalize:
            w = w / w.sum(axis=-1, keepdims=True)
        return chosen, w * w.dtype.type(self.scaling), p

    def backward(self, dw: Array, chosen: Array, p: Array) -> Array:
        """The gradient of the router logits."""
        dw = dw * dw.dtype.type(self.scaling)
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
    """Dispatch of tokens to experts: (token, expert) pairs, as indices into the flattened `chosen`."""

    chosen: Array
    """(b, t, top_k)"""
    order: Array
    """The pairs, sorted by expert."""
    counts: Array
    """Number of pairs of each expert."""

    @staticmethod
    def of(chosen: Array, experts: int) -> _Plan:
        flat = chosen.ravel()
        return _Plan(chosen, np.argsort(flat, kind="stable"), np.bincount(flat, minlength=experts))

    def token(self, pairs: Array) -> Array:
        """The tokens of pairs, as indices into the flattened batch."""
        return pairs // self.chosen.shape[-1]

    def tasks(self, idle: bool = False) -> list[tuple[int, Array]]:
        """(expert, its pairs), the largest first, for load balance. idle: include experts without tokens."""
        ends = np.cumsum(self.counts)
        pairs = [self.order[end - n : end] for end, n in zip(ends, self.counts)]
        largest_first = np.argsort(-self.counts, kind="stable").tolist()
        return [(e, pairs[e]) for e in largest_first if idle or len(pairs[e])]


class SharedSaved(NamedTuple):
    """Activations saved for the backward pass of the shared expert."""

    expert: Any
    shared_out: Array
    gate: Array | None
    """Sigmoid of the shared expert's gate; None without a gate."""


class Saved(NamedTuple):
    """Activations saved for `MoE.backward`."""

    x: Array
    p: Array
    w: Array
    plan: _Plan
    expert_out: Array
    experts: list[Any]
    """Activations of each expert; None for an expert without tokens."""
    shared: SharedSaved | None


@dataclass(frozen=True, slots=True)
class MoE:
    """Weights in checkpoint layout. Gradients are returned as an MoE, zero for experts without tokens."""

    gate: Annotated[Array, "e d"]
    experts: tuple[GatedMLP | MLP, ...]
    shared_expert: GatedMLP | MLP | None = None
    shared_expert_gate: Annotated[Array, "e d"] | None = None
    """One row: the output of the shared expert is multiplied by sigmoid(x . row)."""
    routing: Routing = static(default=Routing())

    def forward(self, x: Array) -> tuple[Array, Saved]:
        with phase("router"):
            chosen, w, p = self.routing.forward(einsum("btd,ed->bte", x, self.gate))
            chosen, w = tap("gate.chosen", chosen, requested=True), tap("gate.weights", w, requested=True)
            p = tap("gate.probabilities", p, requested=True)
            plan = _Plan.of(chosen, len(self.experts))
        with phase("experts"):
            rows = _rows(x)
            # The output of each selected expert for each token; e indexes the selected experts.
            expert_out = np.empty_like(rows, shape=(*chosen.shape, x.shape[-1]))
            out_rows = expert_out.reshape(-1, x.shape[-1])
            saved: list[Any] = [None] * len(self.experts)

            def run(e: int, pairs: Array) -> None:
                with scoped(f"experts.{e}"):
                    y, saved[e] = self.experts[e].forward(rows[plan.token(pairs)][None])
                out_rows[pairs] = _rows(y)

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
            dx_rows = dx_parts.reshape(-1, x.shape[-1])
            dexperts: list[Any] = [None] * len(self.experts)

            def run(e: int, pairs: Array) -> None:
                expert: Any = self.experts[e]
                saved_expert = saved.experts[e]
                if saved_expert is None:
                    saved_expert = expert.forward(rows[:0][None])[1]
                dexpert_out = dy_rows[plan.token(pairs)] * weights[pairs]
                with scoped(f"experts.{e}"):
                    dx_part, dexperts[e] = expert.backward(dexpert_out[None], saved_expert)
                dx_rows[pairs] = _rows(dx_part)

            for_each(run, plan.tasks(idle=True), coarse=self._is_coarse(len(plan.order)))
            dx = np.moveaxis(np.moveaxis(dx_parts, -1, 0).sum(axis=-1), 0, -1)
        with phase("router"):
            # logits = einsum("btd,ed->bte", x, gate)
            dlogits = self.routing.backward(dw, plan.chosen, saved.p)
            dx += einsum("bte,ed->btd", dlogits, self.gate)
            dgate = weight_grad(self.gate, "bte,btd->ed", dlogits, x)
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
        """Whether there is enough work to run the experts in parallel, each on one thread."""
        return pairs * self.experts[0].up_proj.shape[0] * self.gate.shape[1] >= _COARSE

    def _add_shared(self, x: Array, y: Array) -> SharedSaved | None:
        """y += sigmoid(x . shared_expert_gate) * shared_expert(x)"""
        if self.shared_expert is None:
            return None
        with scoped("shared_expert"):
            shared_out, saved = self.shared_expert.forward(x)
        shared_out = tap("shared_expert", shared_out)
        if self.shared_expert_gate is None:
            y += shared_out
            return SharedSaved(saved, shared_out, None)
        gate = sigmoid(einsum("btd,ed->bte", x, self.shared_expert_gate))
        y += shared_out * gate
        return SharedSaved(saved, shared_out, gate)

    def _shared_backward(self, dx: Array, dy: Array, x: Array, saved: SharedSaved | None) -> tuple[Any, Any]:
        """Add to dx; return the gradients of the shared expert and of its gate."""
        shared: Any = self.shared_expert
        if shared is None or saved is None:
            return None, None
        gate = saved.gate
        if gate is None:
            with scoped("shared_expert"):
                dx_part, dshared = shared.backward(dy, saved.expert)
            dx += dx_part
            return dshared, None
        with scoped("shared_expert"):
            dx_part, dshared = shared.backward(dy * gate, saved.expert)
        dx += dx_part
        # gate = sigmoid(logit), logit = einsum("btd,ed->bte", x, shared_expert_gate)
        dlogit = einsum("btd,btd->bt", dy, saved.shared_out)[..., None] * gate * (1 - gate)
        dx += einsum("bte,ed->btd", dlogit, self.shared_expert_gate)
        return dshared, weight_grad(self.shared_expert_gate, "bte,btd->ed", dlogit, x)


def _rows(x: Array) -> Array:
    """x (b, t, d) as contiguous rows (b t, d), for gathering and scattering tokens."""
    return np.copy(x, order="C").reshape(-1, x.shape[-1])
