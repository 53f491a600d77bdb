"""The keywords of `generate`, `stream`, `profile` and `Chat`, with their types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from einsum_transformer.models.model import Model


class GenerationOptions(TypedDict, total=False):
    """Options of `generate`. None: the value in generation_config.json, or the default."""

    max_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    ctx_size: int | None
    prefill_step_size: int | None
    ignore_eos: bool | None
    draft_model: Model | None
    draft_layers: int | None
    prompt_lookup: int | bool | None
    num_draft_tokens: int | None

    top_h: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    sequence_bias: Any
    encoder_repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    min_length: int | None
    min_new_tokens: int | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    remove_invalid_values: bool | None
    exponential_decay_length_penalty: tuple[int, float] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    max_length: int | None
    stop_strings: str | Sequence[str] | None
    max_time: float | None
    eos_token_id: int | Sequence[int] | None
    renormalize_logits: bool | None
    use_cache: bool | None
    cache_implementation: str | None
    pad_token_id: int | None
    bos_token_id: int | None
    num_assistant_tokens: int | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int | None
    num_beams: int | None
    num_return_sequences: int | None
