"""Variants of a config.

Each function returns a new RunConfig, validated like one from a file::

    cfg = et.read_run_config("llama")
    et.explain(et.enable_moe(et.enable_mqa(cfg), num_experts=8, top_k=2))
"""

from dataclasses import replace
from pathlib import Path

from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import read_json
from einsum_transformer.models.ready import available_configs, ready_config
from einsum_transformer.models.run_config import RunConfig, override, parse_run_config


@checked
def read_run_config(path: str | Path) -> RunConfig:
    """Read a RunConfig from the JSON file at `path`, or the packaged config of that name (see
    `available_configs`)."""
    if (ready := ready_config(path)) is not None:
        return ready
    file = Path(path)
    if file.name == str(path) and not file.suffix and not file.exists():
        raise InputError(f"{path!r}: no such file; packaged configs: {', '.join(available_configs())}")
    return parse_run_config(read_json(file), str(path))


@checked
def enable_gqa(config: RunConfig, kv_heads: int) -> RunConfig:
    """Return the config with grouped-query attention: kv_heads key/value heads, a divisor of n_heads."""
    return _random(config, use_gqa=True, use_mqa=False, n_kv_heads=kv_heads)


@checked
def enable_mqa(config: RunConfig) -> RunConfig:
    """Return the config with multi-query attention: all query heads share one key/value head."""
    return _random(config, use_mqa=True, n_kv_heads=None)


@checked
def enable_moe(
    config: RunConfig,
    num_experts: int,
    top_k: int,
    moe_d_ff: int | None = None,
    shared_d_ff: int | None = None,
) -> RunConfig:
    """Return the config with num_experts experts in place of the feed-forward, top_k of them per token.

    moe_d_ff: hidden size of each expert; default: the config's moe_d_ff, else the feed-forward's (for an
    architecture with experts: its default). shared_d_ff: hidden size of a shared expert, which processes
    every token; default: the config's shared_d_ff, else no shared expert (likewise).
    """
    sizes = {"moe_d_ff": moe_d_ff or config.moe_d_ff, "shared_d_ff": shared_d_ff or config.shared_d_ff}
    return _random(config, use_moe=True, num_experts=num_experts, top_k=top_k, **sizes)


@checked
def enable_quantization(config: RunConfig, scheme: str) -> RunConfig:
    """Return the config with quantized weights and activations; scheme: such as "W8A8"."""
    return replace(config, quantization=scheme)


@checked
def enable_prefill_decode_split(config: RunConfig) -> RunConfig:
    """Return the config with prefill_only: a run stops after the prefill.

    Prefill and decode are separate phases of every run.
    """
    return replace(config, prefill_only=True)


@checked
def enable_speculative_decoding(config: RunConfig, draft_layers: int) -> RunConfig:
    """Return the config with self-speculative decoding: the first draft_layers layers draft tokens, the full
    model verifies them."""
    if not 1 <= draft_layers < config.n_layers:
        raise InputError(
            f"draft_layers is {draft_layers}: expected 1 to {config.n_layers - 1}, fewer than n_layers"
        )
    return _checked(replace(config, speculative=True, draft_layers=draft_layers))


def _random(config: RunConfig, **changes: object) -> RunConfig:
    """The variant, without a checkpoint, as no weights fit it. Errors: ConfigError if keys disagree."""
    return _checked(replace(config, hf_repo_id=None, weight_file=None, **changes))


def _checked(config: RunConfig) -> RunConfig:
    """The same config, validated like one from a file."""
    checked = override(config, [])
    checked.model_config()
    return checked
