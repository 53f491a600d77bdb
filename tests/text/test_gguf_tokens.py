"""A tokenizer written as GGUF metadata is the same tokenizer when it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_golden import byte_level, byte_level_metadata, from_golden, golden
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

import einsum_transformer as et
from einsum_transformer.text.gguf_vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from einsum_transformer.text.pre_tokenizers import NAMES, pre_tokenizer
from einsum_transformer.text.tokenizer import Tokenizer

TEXTS = [
    "Hello world! I'm here, you're there. 12345 x=1.5e-3",
    "  leading and trailing  ",
    "日本語 北京 👍🏽 ﷺ",
    "a\n\n  b\r\n\tc   d",
    "<|im_start|>user\nhi<|im_end|></s><s>",
    "DON'T WE'LL 1,000,000",
    "",
]
GGML = "tokenizer.ggml."


def again(tokenizer: Tokenizer, size: int = 0) -> Tokenizer:
    metadata = tokenizer.to_gguf(size or max(tokenizer.backend.get_vocab().values()) + 1)
    return Tokenizer.from_gguf(metadata, Path("again.gguf"))


@pytest.mark.parametrize("pre", NAMES)
def test_byte_level(pre: str) -> None:
    """A name with the same pattern is found, by what the pre-tokenizer does."""
    tokenizer = byte_level(pre)
    found = again(tokenizer)
    for text in TEXTS:
        assert found.encode(text) == tokenizer.encode(text)
        assert found.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    name = tokenizer.to_gguf(10_000)[f"{GGML}pre"]
    own, other = pre_tokenizer(pre), pre_tokenizer(name)
    assert own is not None
    assert other is not None
    assert own.pre_tokenize_str(TEXTS[0]) == other.pre_tokenize_str(TEXTS[0])
    assert (found.named, found.end_of_generation_ids) == (tokenizer.named, tokenizer.end_of_generation_ids)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool) -> None:
    tokenizer = from_golden("sentencepiece", add_space_prefix=prefix)
    found = again(tokenizer)
    for text in TEXTS:
        assert found.encode(text) == tokenizer.encode(text)
        assert found.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    metadata = tokenizer.to_gguf(10_000)
    kinds = set(metadata[f"{GGML}token_type"])
    assert {NORMAL, UNKNOWN, CONTROL, BYTE, UNUSED} <= kinds
    assert metadata[f"{GGML}add_space_prefix"] == prefix
    assert f"{GGML}merges" not in metadata


def test_merges_in_another_order_than_scores(caplog: pytest.LogCaptureFixture) -> None:
    vocab = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5, "abc": 6}
    for merges, same in (
        ([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")], False),
        ([("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")], False),
        ([("a", "b"), ("b", "c"), ("ab", "c")], True),
    ):
        caplog.clear()
        backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
        tokenizer = Tokenizer(backend, "here", {}, frozenset(), {})
        metadata = tokenizer.to_gguf(7)
        assert (f"{GGML}merges" in metadata) == same == ("not those of SentencePiece" in caplog.text)
        assert again(tokenizer).encode("abc") == tokenizer.encode("abc")


def test_added_tokens_and_edges() -> None:
    metadata = byte_level_metadata(add_bos_token=True, bos_token_id=0, eos_token_id=1)
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.chat_template": "{{ 1 }}"}, Path("a.gguf"))
    tokenizer.backend.add_tokens([AddedToken("<a tool>", special=False, normalized=False)])
    size = tokenizer.vocab_size
    found = tokenizer.to_gguf(size + 3)
    assert found[f"{GGML}tokens"][-4:] == ["<a tool>", *(f"[PAD{size + i}]" for i in range(3))]
    assert found[f"{GGML}token_type"][-4:] == [USER_DEFINED, UNUSED, UNUSED, UNUSED]
    assert found[f"{GGML}add_bos_token"] is True
    assert found["tokenizer.chat_template"] == "{{ 1 }}"
    read = again(tokenizer)
    assert read.encode("a<a tool>b") == tokenizer.encode("a<a tool>b")
    named = Tokenizer(tokenizer.backend, "x", {}, frozenset(), {"default": "a", "tool_use": "b"})
    assert again(named).chat_templates == {"default": "a", "tool_use": "b"}


def test_a_normalizer_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level()
    tokenizer.backend.normalizer = normalizers.NFC()
    tokenizer.to_gguf(10_000)
    assert "GGUF files have no normalizer (NFC)" in caplog.text


def test_what_cannot_be_written() -> None:
    tokenizer = byte_level()
    with pytest.raises(et.InputError, match="the embedding 10 rows"):
        tokenizer.to_gguf(10)
    tokenizer.backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[aeiou]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    with pytest.raises(et.InputError, match=r"llama\.cpp has no pre-tokenizer that splits text like"):
        tokenizer.to_gguf(10_000)
    tokenizer.backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(et.InputError, match="neither byte-level nor has bytes as tokens"):
        tokenizer.to_gguf(10_000)
    with pytest.raises(et.InputError, match="type Unigram cannot be written"):
        from_golden("unigram").to_gguf(10_000)
    unknown = Tokenizer.from_gguf(byte_level_metadata("nobody-knows"), Path("a.gguf"))
    with pytest.raises(et.InputError, match="the tokenizer cannot be written"):
        unknown.to_gguf(10_000)


def test_trained_here() -> None:
    tokenizer = Tokenizer.train(["the cat sat on the mat " * 20], 300)
    assert isinstance(tokenizer.backend.decoder, decoders.ByteLevel)
    found = again(tokenizer)
    for text in TEXTS[:4]:
        assert found.encode(text) == tokenizer.encode(text)


def test_golden_metadata() -> None:
    """What is read from a file is written again: tokens, types and merges."""
    metadata = golden("tiny")["byte_level"]["metadata"]
    found = byte_level().to_gguf(len(metadata[f"{GGML}tokens"]))
    for key in ("tokens", "token_type", "merges"):
        assert found[f"{GGML}{key}"] == list(metadata[f"{GGML}{key}"])
