"""Variants of a config: each function gives a new RunConfig, checked like one from a file.

cfg = et.read_run_config("llama")
et.explain(et.enable_moe(et.enable_mqa(cfg), num_experts=8, top_k=2))
"""

from dataclasses import replace
from pathlib import Path

from einsum_transformer.errors import InputError
from einsum_transformer.formats.files import read_json
from einsum_transformer.models.ready import available_configs, ready_config
from einsum_transformer.models.run_config import RunConfig, override, parse_run_config


def read_run_config(path: str | Path) -> RunConfig:
    """The config in a JSON file of this project's keys, or the ready config of that name."""
    if (ready := ready_config(path)) is not None:
        return ready
    file = Path(path)
    if file.name == str(path) and not file.suffix and not file.exists():
        raise InputError(f"{path!r}: no such file; ready configs: {', '.join(available_configs())}")
    return parse_run_config(read_json(file), str(path))


def enable_gqa(config: RunConfig, kv_heads: int) -> RunConfig:
    """Query heads share key/value heads: kv_heads of them, a divisor of n_heads."""
    return _random(config, use_gqa=True, use_mqa=False, n_kv_heads=kv_heads)


def enable_mqa(config: RunConfig) -> RunConfig:
    """All query heads share one key/value head."""
    return _random(config, use_mqa=True, n_kv_heads=None)


def enable_moe(
    config: RunConfig,
    num_experts: int,
    top_k: int,
    moe_d_ff: int | None = None,
    shared_d_ff: int | None = None,
) -> RunConfig:
    """Experts in the place of the feed-forward, top_k of them for each token.

    moe_d_ff: hidden size of each expert; by default the config's own, or that of the feed-forward (of an
    architecture with experts: its default). shared_d_ff: of an expert that every token goes to; by default
    the config's own, or none (likewise).
    """
    sizes = {"moe_d_ff": moe_d_ff or config.moe_d_ff, "shared_d_ff": shared_d_ff or config.shared_d_ff}
    return _random(config, use_moe=True, num_experts=num_experts, top_k=top_k, **sizes)


def enable_quantization(config: RunConfig, scheme: str) -> RunConfig:
    """Quantized weights and activations, such as "W8A8"."""
    return replace(config, quantization=scheme)


def enable_prefill_decode_split(config: RunConfig) -> RunConfig:
    """Stop after the prefill; it and decoding are always separate phases of a run."""
    return replace(config, prefill_only=True)


def enable_speculative_decoding(config: RunConfig, draft_layers: int) -> RunConfig:
    """Let the model's own first layers draft tokens that the whole model then checks."""
    if not 1 <= draft_layers < config.n_layers:
        raise InputError(
            f"draft_layers is {draft_layers}: from 1 to {config.n_layers - 1}, fewer than n_layers"
        )
    return _checked(replace(config, speculative=True, draft_layers=draft_layers))


def _random(config: RunConfig, **changes: object) -> RunConfig:
    """The variant, which no checkpoint has the weights of; what contradicts itself is refused here."""
    return _checked(replace(config, hf_repo_id=None, weight_file=None, **changes))


def _checked(config: RunConfig) -> RunConfig:
    """The same config, read as one from a file is."""
    checked = override(config, [])
    checked.model_config()
    return checked
