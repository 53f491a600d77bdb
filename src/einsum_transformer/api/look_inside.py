"""What a model computes on a prompt: predictions by layer, contributions to a logit, heads, interventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from einsum_transformer.analysis import interventions, lens
from einsum_transformer.analysis.interventions import Effects
from einsum_transformer.analysis.lens import Attribution, HeadSummary, LogitLens, NextTokens
from einsum_transformer.api.sources import AnySource, model_of
from einsum_transformer.arguments import checked


@checked
def next_tokens(source: AnySource, prompt: Any, top: int = 5) -> NextTokens:
    """Return the `top` most probable next tokens at each position of a prompt, with their probabilities.

    source, prompt: as in `capture`.
    """
    return lens.next_tokens(model_of(source), prompt, top)


@checked
def logit_lens(source: AnySource, prompt: Any, token: Any = None, *, top: int = 5) -> LogitLens:
    """Apply the final norm and the output head to the residual stream after each layer (logit lens).

    The distribution after the last layer is that of the model (nostalgebraist, 2020). source, prompt: as in
    `capture`. token: the token, as
    text or id, whose rank and probability are listed; by default the one that the whole model predicts at
    each position. top: number of most probable tokens of each layer.
    """
    return lens.logit_lens(model_of(source), prompt, token, top)


@checked
def logit_attribution(
    source: AnySource, prompt: Any, token: Any = None, *, position: int = -1, heads: bool = False
) -> Attribution:
    """Write a logit as the sum of the outputs of the embedding, of each attention and of each feed-forward
    (direct logit attribution).

    The final norm divides the residual stream by a number, which is taken as a constant; then the logit is
    linear in what each component adds to the stream: logit = sum_i (output_i / scale) . (weight * row of the
    token) + bias.

    source, prompt: as in `capture`. token: the token, as text or id, or a pair: the difference of their
    logits; by default the most probable one. position: of the token before it. heads: one entry per attention
    head, for models without a norm after the attention. The sum is the logit before a soft cap.
    """
    return lens.attribution(model_of(source), prompt, token, position, heads)


@checked
def head_summary(source: AnySource, prompt: Any) -> HeadSummary:
    """Return for each attention head the entropy of its weights, and the mean weight on the first token, on
    the previous token and on the query's own token. source, prompt: as in `capture`."""
    return lens.head_summary(model_of(source), prompt)


@checked
def ablate_heads(
    source: AnySource, prompt: Any, token: Any = None, *, layers: Sequence[int] | None = None
) -> Effects:
    """Set the output of each attention head to zero, one at a time, and return the change of a logit.

    source: as in `capture`; prompt: one row. token: the token, as text or id, whose logit after the prompt is
    compared, or a pair: the difference of their logits; by default the most probable one. layers: only heads
    of these layers.
    """
    return interventions.ablate_heads(model_of(source), prompt, token, layers)


@checked
def patch_positions(
    source: AnySource,
    prompt: Any,
    other: Any,
    token: Any = None,
    *,
    value: Literal["resid_pre", "attn_out", "mlp_out"] = "resid_pre",
    layers: Sequence[int] | None = None,
) -> Effects:
    """Replace a value at one layer and position of a prompt by that of another prompt, for all layers and
    positions, and return the change of a logit (activation patching; Meng et al., 2022).

    prompt, other: two prompts with the same number of tokens, such as a question about another country.
    value: the residual stream before a layer, or what its attention or feed-forward adds to it. token: as in
    `ablate_heads`; by default the prediction for `other`. layers: only these; source: as in `capture`.
    `Effects.recovered` is the share of the difference
    between the two prompts that a replacement restores.
    """
    return interventions.patch_positions(model_of(source), prompt, other, token, value, layers)


@checked
def attribute_positions(
    source: AnySource,
    prompt: Any,
    other: Any,
    token: Any = None,
    *,
    value: Literal["resid_pre", "attn_out", "mlp_out"] = "resid_pre",
    layers: Sequence[int] | None = None,
) -> Effects:
    """Estimate the effects of `patch_positions` from one backward pass: (value of `other` - value) . gradient
    of the logit by the value (attribution patching; Nanda, 2023).

    source, prompt, other, token, value, layers: as there.
    """
    return interventions.attribute_positions(model_of(source), prompt, other, token, value, layers)
