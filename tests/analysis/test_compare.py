"""What is told about two models side by side is what each of them tells alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.analysis.compare import cache_bytes, compare
from einsum_transformer.cli.app import main
from golden_files import MODELS, Models, load_golden
from tiny_models import config_of

ROOT = Path(__file__).parents[2]


def test_a_model_beside_itself() -> None:
    found = compare(config_of(), config_of(), 2, 9)
    assert found.fields == {}
    assert found.parameters[0] == found.parameters[1]
    assert all(step.flops[0] == step.flops[1] > 0 for step in found.steps)


def test_grouped_beside_single_key_value_heads() -> None:
    """The keys' and values' matrices and the cache shrink, attention itself costs the same."""
    many, one = config_of(num_key_value_heads=4), config_of(num_key_value_heads=1)
    found = compare(many, one, 1, 20)
    assert found.fields == {"num_key_value_heads": (4, 1)}
    assert found.cache_per_token[0] == 4 * found.cache_per_token[1]
    assert {name for name, (a, b) in found.components.items() if a != b} == {
        "self_attn.k_proj",
        "self_attn.v_proj",
    }
    differing = {step.role for step in found.steps if step.flops[0] != step.flops[1]}
    assert differing == {"k_proj", "v_proj"}
    for which, config in enumerate((many, one)):
        program = et.explain(config, tokens=20)
        assert (
            found.parameters[which] == program.parameters == sum(c[which] for c in found.components.values())
        )
        assert found.flops[which] == program.flops == sum(step.flops[which] for step in found.steps)


@pytest.mark.parametrize("name", MODELS)
def test_cache_is_what_a_cache_would_hold(name: str, golden_model: Models) -> None:
    """Against the numbers that a run keeps, beyond the window too."""
    golden, model = load_golden(name), golden_model(name)
    length = golden.tokens.shape[1]
    cache = model.cache()
    model.decoder.forward(golden.tokens, cache)
    held = 0
    for layer, window in zip(cache.layers, model.config.windows):
        (keys,), (values,) = layer._stored
        kept = length if window is None else min(length, window)
        held += sum(4 * kept * int(np.prod(lines.shape[:-1])) for lines in (keys, values))
    assert cache_bytes(model.config, len(golden.tokens), length) == held


def said(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit, match="0"):
        main(["diff", *map(str, arguments)])
    return capsys.readouterr().out


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Two architectures from their configs alone."""
    files = ROOT / "configs" / "mistral.json", ROOT / "configs" / "mixtral.json"
    numbers = json.loads(said(capsys, *files, "--seq-len", 64, "--json"))
    assert [round(n / 1e9, 1) for n in numbers["parameters"]] == [7.2, 46.7]
    assert numbers["fields"]["model_type"] == ["mistral", "mixtral"]
    assert 1.7 < numbers["flops"][1] / numbers["flops"][0] < 1.9
    shown = said(capsys, *files, "--seq-len", 64)
    for words in ("mixtral", "parameters", "mlp.gate", "only in B", "cache, each token"):
        assert words in shown


def test_latent_attention_shrinks_the_cache() -> None:
    goldens = [load_golden(name).config for name in ("deepseek_plain", "deepseek_v2_direct")]
    from einsum_transformer.models.config import Keys
    from einsum_transformer.models.families import family_of

    plain, latent = (family_of(raw["model_type"], "x").read_config(Keys(raw, "x")) for raw in goldens)
    found = compare(plain, latent)
    assert found.cache_per_token == (3 * 2 * 6 * 4 * 4, 3 * (14 + 4) * 4)
