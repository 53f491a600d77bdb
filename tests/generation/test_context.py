"""How long a text may be: `generate`, prefills and `train --seq-len` ask the same functions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import einsum_transformer as et
from einsum_transformer.cli.app import main
from einsum_transformer.errors import InputError
from einsum_transformer.generation.context import UNBOUNDED, check_length, context_limit, made_for
from golden_files import load_golden, write_folder
from tiny_models import tiny_model

ROPE = tiny_model(max_position_embeddings=16).config
LEARNED = replace(ROPE, rope=None, learned_positions=True)
ORIGINAL = {"original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (None, 16),
        ({"rope_type": "yarn", "factor": 4.0}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 64),
        ({"type": "dynamic", "factor": 2.5}, 40),
        ({"rope_type": "yarn", "factor": 4.0, **ORIGINAL}, 32),
        ({"rope_type": "yarn", "factor": 1.5, **ORIGINAL}, 16),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4, **ORIGINAL}, 16),
    ],
    ids=str,
)
def test_the_length_that_a_model_was_made_for(rope: dict[str, Any] | None, length: int) -> None:
    """max_position_embeddings, or the trained length stretched by the factor if that is more."""
    config = tiny_model(max_position_embeddings=16, rope_scaling=rope).config
    assert made_for(config) == length


def test_learned_positions_are_the_only_bound(caplog: pytest.LogCaptureFixture) -> None:
    assert (context_limit(ROPE), context_limit(ROPE, 99), context_limit(ROPE, 9)) == (UNBOUNDED, 99, 9)
    assert (context_limit(LEARNED), context_limit(LEARNED, 16), context_limit(LEARNED, 9)) == (16, 16, 9)
    for config in (ROPE, LEARNED):
        check_length(config, 16, "--seq-len")
    assert not caplog.records
    check_length(ROPE, 17, "--seq-len")
    assert caplog.text.count("trained length of 16 tokens") == 1
    with pytest.raises(InputError, match="--seq-len is 17: expected at most 16 learned positions"):
        check_length(LEARNED, 17, "--seq-len")
    with pytest.raises(InputError, match="--seq-len is 17: expected at most 16 tokens"):
        check_length(ROPE, 17, "--seq-len", strict=True)


def test_alibi_and_nope_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("mpt_alibi", "smollm3_nope"):
        golden = load_golden(name)
        length = "max_seq_len" if name == "mpt_alibi" else "max_position_embeddings"
        model = et.load(write_folder(tmp_path / name, golden.config | {length: 12}, golden.weights))
        caplog.clear()
        result = et.generate(model, [1, 2, 3], max_new_tokens=20, ignore_eos=True)
        tokens = result.prompt_tokens + result.tokens
        assert len(tokens) == 23
        # Every token is the best one of a whole pass.
        assert model.logits([tokens[:-1]])[0, 2:].argmax(axis=-1).tolist() == result.tokens
        assert caplog.text.count("trained length of 12 tokens") == 1


def test_training_beyond_the_stated_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A RoPE model trains on longer rows, with a note; one with learned positions does not."""
    tiny_model(max_position_embeddings=16).save(tmp_path / "rope")
    golden = load_golden("gpt2_plain")
    write_folder(tmp_path / "learned", golden.config, golden.weights)
    for name, code, words in (
        ("rope", 0, "trained length of 16 tokens"),
        ("learned", 2, "--seq-len is 48: expected at most 40 learned positions"),
    ):
        flags = ["--seq-len", "48", "--steps", "1", "--batch-size", "1", "--json"]
        with pytest.raises(SystemExit) as left:
            main(["train", str(tmp_path / name), *flags])
        captured = capsys.readouterr()
        assert left.value.code == code
        assert captured.err.count(words) == 1
        if code == 0:
            assert json.loads(captured.out)
