"""`capture` and `patch`: read and replace the values of a pass through a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from einsum_transformer.analysis import capture as captures
from einsum_transformer.analysis.capture import Capture
from einsum_transformer.api.sources import AnySource, model_of
from einsum_transformer.arguments import checked


@checked
def capture(
    source: AnySource,
    prompt: Any,
    names: str | Sequence[str],
    *,
    gradient_of: Any = None,
    max_new_tokens: int = 0,
) -> Capture:
    """Return values of a pass over a prompt, and the gradient of a scalar by them.

        found = et.capture(model, "The capital of France is", ["blocks.7.attn.hook_pattern", "layers.*"])
        found["blocks.7.attn.hook_pattern"]  # (b, heads, t, s)

    source: a model, or any source that `load` takes. prompt: a text, token ids, messages, or a batch of rows
    of equal length. names: names of values, or patterns in which `*` matches any characters; those of this
    package ("layers.7.self_attn.pattern"), of the checkpoint ("model.layers.7.self_attn") or of
    TransformerLens ("blocks.7.attn.hook_pattern"). docs/guides/look-inside.md lists them.

    gradient_of: a token, as text or id: its logit after the last token; a pair of tokens: the difference of
    their logits; the gradient of any other scalar by the logits (b, t, v), as an array or as a function that
    computes it from the logits. `Capture.gradients` then has the gradient of the scalar by each value that is
    not computed from another one (`hook_scale`, `hook_normalized`, `hook_result`), nor the product of a fused
    matrix.

    max_new_tokens: also generate so many tokens, each the most probable one, and capture the values of each
    pass, in `Capture.steps`.

    Only the values that are requested are stored. Raises InputError for an unknown name; the message lists
    the nearest one.
    """
    return captures.capture(model_of(source), prompt, names, gradient_of, max_new_tokens)


@checked
def patch(
    source: AnySource,
    prompt: Any,
    values: Mapping[str, Any],
    names: str | Sequence[str] = (),
    *,
    max_new_tokens: int = 0,
) -> Capture:
    """Run a prompt with some values replaced; return the logits, and other values that are affected.

        zero = et.patch(model, prompt, {"blocks.7.attn.hook_z": 0})
        other = et.patch(model, prompt, {"layers.7": lambda x: x + 0.1}, names=["layers.8"])

    values: name or pattern -> an array of the shape of the value, a number for all its elements, or a
    function that takes a copy of the array and returns one of these, or None for no change. A value that is
    replaced by an equal one changes no bit of the result. source, prompt, names, max_new_tokens: as in
    `capture`.

    Raises InputError for an array of another shape; the message names the axis.
    """
    return captures.capture(model_of(source), prompt, names, None, max_new_tokens, values)
