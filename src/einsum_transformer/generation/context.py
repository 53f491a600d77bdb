"""How long a text may be: learned positions are a bound, all other kinds of positions go on with a note."""

from __future__ import annotations

from einsum_transformer.errors import InputError
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.notes import note

UNBOUNDED = 1 << 62


def context_limit(config: ModelConfig, ctx_size: int | None = None) -> int:
    """The most tokens that the model can take: its learned positions, ctx_size, or no bound."""
    if not config.learned_positions:
        return UNBOUNDED if ctx_size is None else ctx_size
    learned = config.max_position_embeddings
    if ctx_size is not None and ctx_size > learned:
        raise InputError(f"ctx_size is {ctx_size}: the context is {learned} learned positions")
    return learned if ctx_size is None else ctx_size


def check_length(config: ModelConfig, length: int, what: str, strict: bool = False) -> None:
    """Raise InputError if `what`, which has that many tokens, is too long for learned positions; note it if
    it is longer than another model was made for. strict: max_position_embeddings is a bound in any case."""
    learned = " learned positions" if config.learned_positions else " tokens"
    if length > (config.max_position_embeddings if strict else context_limit(config)):
        raise InputError(f"{what} {length}: the context is {config.max_position_embeddings}{learned}")
    LengthNote(config).grown(length)


def made_for(config: ModelConfig) -> int:
    """The length that the config states, stretched by the factor of its RoPE."""
    stretched = [
        int(rope.factor * rope.original_max_position_embeddings)
        for rope in config.ropes
        if rope.rope_type != "default"
    ]
    return max(config.max_position_embeddings, *stretched, 0)


class LengthNote:
    """One note where a text that grows from `length` tokens passes what the model was made for."""

    def __init__(self, config: ModelConfig, length: int = 0) -> None:
        made = made_for(config)
        self.bound = UNBOUNDED if config.learned_positions or length > made else made

    def grown(self, length: int) -> None:
        """The text has this length now."""
        if length > self.bound:
            note(f"the text passes the {self.bound} tokens that the model was made for; quality may fall")
            self.bound = UNBOUNDED
