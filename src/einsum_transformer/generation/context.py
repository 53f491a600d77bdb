"""Maximum length of a text: learned positions are a limit; for other models a note reports a longer text."""

from __future__ import annotations

from einsum_transformer.errors import InputError
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.notes import note

UNBOUNDED = 1 << 62


def context_limit(config: ModelConfig, ctx_size: int | None = None) -> int:
    """Return the maximum context in tokens: the number of learned positions, ctx_size, or UNBOUNDED."""
    if not config.learned_positions:
        return UNBOUNDED if ctx_size is None else ctx_size
    learned = config.max_position_embeddings
    if ctx_size is not None and ctx_size > learned:
        raise InputError(f"`ctx_size` is {ctx_size}: expected at most the {learned} learned positions")
    return learned if ctx_size is None else ctx_size


def check_length(config: ModelConfig, length: int, what: str, strict: bool = False) -> None:
    """Raise InputError if `length`, called `what` in the message, exceeds the learned positions; note if it
    exceeds the trained length of another model. strict: max_position_embeddings is a limit for any model."""
    learned = " learned positions" if config.learned_positions else " tokens"
    if length > (config.max_position_embeddings if strict else context_limit(config)):
        raise InputError(f"{what} is {length}: expected at most {config.max_position_embeddings}{learned}")
    LengthNote(config).grown(length)


def made_for(config: ModelConfig) -> int:
    """Return the trained length in the config, multiplied by the scaling factor of its RoPE."""
    stretched = [
        int(rope.factor * rope.original_max_position_embeddings)
        for rope in config.ropes
        if rope.rope_type != "default"
    ]
    return max(config.max_position_embeddings, *stretched, 0)


class LengthNote:
    """Notes once if a text that starts with `length` tokens exceeds the trained length of the model."""

    def __init__(self, config: ModelConfig, length: int = 0) -> None:
        trained = made_for(config)
        self.bound: int = UNBOUNDED if config.learned_positions or length > trained else trained

    def grown(self, length: int) -> None:
        """Update the length of the text."""
        if length > self.bound:
            note(f"the text exceeds the model's trained length of {self.bound} tokens; quality may degrade")
            self.bound = UNBOUNDED
