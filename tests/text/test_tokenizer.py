"""Tokenizer: folders, saving, BOS and EOS, chats, and inputs that must end in an InputError."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from text_golden import byte_level, byte_level_metadata, from_golden, golden, write_files
from tokenizers import processors
from tokenizers.models import WordLevel

from einsum_transformer.errors import InputError
from einsum_transformer.text.native import checked
from einsum_transformer.text.tokenizer import Tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, hello?"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "It's fine."},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What transformers saved: see tools/make_golden_text.py."""
    return write_files(tmp_path, golden("tiny")["folder"]["files"])


def configure(folder: Path, **changes: Any) -> Tokenizer:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return Tokenizer.from_folder(folder)


def test_a_folder_saved_by_transformers(folder: Path) -> None:
    case, tokenizer = golden("tiny")["folder"], Tokenizer.from_folder(folder)
    assert [tokenizer.encode(text) for text in case["strings"]] == case["ids"]
    assert tokenizer.token(tokenizer.bos_id or 0) == "<|begin|>"
    assert tokenizer.token(tokenizer.eos_id or 0) == "<|im_end|>"
    assert not {"pad_token", "unk_token"} & tokenizer.named.keys()
    assert tokenizer.encode("")[:1] == [tokenizer.bos_id]
    assert {tokenizer.token(i) for i in tokenizer.end_of_generation_ids} == {"<|im_end|>", "<|endoftext|>"}
    assert tokenizer.chat_template == case["files"]["chat_template.jinja"]
    assert tokenizer.vocab_size == 564


def test_the_post_processor_of_tokenizer_json_decides_about_bos_and_eos(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = Tokenizer.from_folder(folder).encode("hello")
    assert caplog.messages == []
    tokenizer = configure(folder, add_bos_token=False, add_eos_token=True)
    assert tokenizer.encode("hello") == ids  # as transformers 5.24: it drops both keys beside tokenizer.json
    assert "add_bos_token: false, add_eos_token: true is not used" in caplog.text
    caplog.clear()
    assert configure(folder, add_bos_token=True, add_eos_token=False).encode("hello") == ids
    assert caplog.messages == []


def test_special_tokens_in_their_forms(folder: Path) -> None:
    tokenizer = configure(folder, eos_token={"content": "<think>", "lstrip": False}, pad_token="hel")
    assert tokenizer.token(tokenizer.eos_id or 0) == "<think>"
    assert tokenizer.decode(tokenizer.encode("<|im_end|>hello")) == "lo"
    assert tokenizer.encode("hel", add_special_tokens=False) == [tokenizer.backend.token_to_id("hel")]
    assert tokenizer.named["pad_token"] == "hel"
    (folder / "tokenizer_config.json").unlink()
    write_files(
        folder, {"special_tokens_map.json": {"eos_token": "<|im_end|>", "unk_token": {"content": "<think>"}}}
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.token(tokenizer.eos_id or 0) == "<|im_end|>"
    assert tokenizer.named["unk_token"] == "<think>"
    write_files(folder, {"tokenizer_config.json": {"eos_token": "<|begin|>", "unk_token": None}})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.token(tokenizer.eos_id or 0) == "<|im_end|>"  # special_tokens_map.json goes first
    assert tokenizer.named["unk_token"] == "<think>"


def test_where_the_chat_template_comes_from(folder: Path) -> None:
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    assert configure(folder, chat_template="other").chat_template == golden("chat")["templates"]["chatml"]
    (folder / "chat_template.jinja").unlink()
    assert configure(folder, chat_template="other").chat_template == "other"
    tokenizer = configure(folder, chat_template=named)
    assert tokenizer.chat_template == "one"
    assert tokenizer.decode(tokenizer.apply_chat_template(CONVERSATION)) == "one"
    assert tokenizer.decode(tokenizer.apply_chat_template(CONVERSATION, tools=[{"name": "f"}])) == "two"
    tokenizer = configure(folder, chat_template=None)
    assert tokenizer.chat_template is None
    with pytest.raises(InputError, match="has no chat template"):
        tokenizer.apply_chat_template(CONVERSATION)


def test_truncation_and_padding_of_the_file_are_ignored(folder: Path) -> None:
    expected = Tokenizer.from_folder(folder).encode("the lazy dog")
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    saved["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    write_files(folder, {"tokenizer.json": saved})
    assert Tokenizer.from_folder(folder).encode("the lazy dog") == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json, which is required"),
        (
            {"tokenizer.model": "x", "vocab.json": "{}"},
            r"tokenizer.model is a SentencePiece model or .*: convert it with transformers, AutoTokenizer",
        ),
        ({"tokenizer.json": "{"}, "tokenizer.json: not a usable tokenizer"),
        ({"tokenizer.json": "{}"}, "tokenizer.json: not a usable tokenizer"),
        ({"tokenizer.json": "[" * 100_000}, "tokenizer.json: not a usable tokenizer"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer_config.json": "[" * 100_000}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json: expected a JSON object, got list"),
        ({"tokenizer_config.json": {"eos_token": 5}}, "eos_token: expected a string or"),
        ({"tokenizer_config.json": {"bos_token": {"text": 5, "content": 5}}}, "bos_token: expected a string"),
        ({"tokenizer_config.json": {"chat_template": 5}}, "chat_template: expected a string or named"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "a"}]}}, "chat_template: expected a string"),
        ({"special_tokens_map.json": "5"}, "special_tokens_map.json: expected a JSON object, got int"),
    ],
)
def test_bad_folders_are_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    if files.keys() & {"tokenizer_config.json", "special_tokens_map.json"}:
        write_files(tmp_path, {"tokenizer.json": golden("tiny")["folder"]["files"]["tokenizer.json"]})
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.from_folder(write_files(tmp_path, files))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["precompiled_charsmap", "\\u0070recompiled_charsmap"])
def test_a_character_map_that_lies_about_its_length_is_refused(key: str, folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    saved = json.loads(text) | {"normalizer": "HERE"}
    nested = '{"type": "Sequence", "normalizers": [{"type": "Precompiled", "KEY": "/////////w=="}]}'
    write_files(folder, {"tokenizer.json": json.dumps(saved).replace('"HERE"', nested.replace("KEY", key))})
    with pytest.raises(InputError, match=r"charsmap: 7 bytes with an invalid length of 4294967295 bytes"):
        Tokenizer.from_folder(folder)


def test_files_that_are_not_text_or_too_large_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"chat_template\.jinja: cannot be read as UTF-8"):
        Tokenizer.from_folder(folder)
    monkeypatch.setattr("einsum_transformer.text.folder._MAX_OTHER_BYTES", 50)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: \d+ bytes; at most 50 are allowed"):
        Tokenizer.from_folder(folder)


MADE = {
    "byte level": lambda: byte_level("qwen2"),
    "with bos": lambda: byte_level("llama-bpe", add_eos_token=True, padding_token_id=0),
    "sentencepiece": lambda: from_golden("sentencepiece"),
    "unigram": lambda: from_golden("unigram", add_eos_token=True),
}


@pytest.mark.parametrize("name", MADE)
def test_saved_and_read_again(name: str, tmp_path: Path) -> None:
    ours = MADE[name]()
    ours.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    for text in golden("smollm2")["strings"]:
        for special in (True, False):
            assert again.encode(text, special) == ours.encode(text, special)
    ids = [0, 1, 2, 300, 301, ours.vocab_size - 1]
    assert again.decode(ids) == ours.decode(ids)
    for attribute in ("bos_id", "eos_id", "named", "vocab_size", "end_of_generation_ids"):
        assert getattr(again, attribute) == getattr(ours, attribute), attribute


def test_what_a_saved_folder_says(tmp_path: Path) -> None:
    metadata = byte_level_metadata(add_bos_token=True) | {"tokenizer.chat_template": "{{ 'é\r\n' }}"}
    tokenizer = Tokenizer.from_gguf(metadata, Path("x.gguf"))
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<|begin|>",
        "eos_token": "<|im_end|>",
    }
    assert (tmp_path / "chat_template.jinja").read_bytes() == "{{ 'é\r\n' }}".encode()
    named = Tokenizer.from_gguf(metadata | {"tokenizer.chat_template.tool_use": "two"}, Path("x.gguf"))
    named.save(tmp_path / "named")
    assert Tokenizer.from_folder(tmp_path / "named").chat_templates == named.chat_templates


def test_a_post_processor_of_its_own_survives_saving(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(WordLevel({"[A]": 0, "[B]": 1, "x": 2, "<unk>": 3}, "<unk>"))
    backend.post_processor = processors.TemplateProcessing("[A] [B] $A", None, [("[A]", 0), ("[B]", 1)])
    backend.add_special_tokens(["[A]", "[B]"])
    write_files(tmp_path, {"tokenizer.json": backend.to_str(), "tokenizer_config.json": {"bos_token": "[A]"}})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("x") == [0, 1, 2]
    assert tokenizer.bos_id == 0
    tokenizer.save(tmp_path / "again")
    assert Tokenizer.from_folder(tmp_path / "again").encode("x") == [0, 1, 2]


@pytest.mark.parametrize("template", ["llama2", "gemma3", "mistral", "chatml"])
def test_a_chat_has_the_bos_that_its_template_writes_and_no_other(template: str) -> None:
    text = golden("chat")["templates"][template]
    metadata = byte_level_metadata("llama-bpe", add_bos_token=True) | {"tokenizer.chat_template": text}
    tokenizer = Tokenizer.from_gguf(metadata, Path("x.gguf"))
    ids = tokenizer.apply_chat_template(CONVERSATION)
    written = {"llama2": 2, "chatml": 0}.get(template, 1)  # Llama 2 begins each of its two exchanges with one
    assert ids.count(tokenizer.bos_id or 0) == written
    assert (ids[0] == tokenizer.bos_id) is (written > 0) or template == "llama2"
    assert tokenizer.encode(tokenizer.decode(ids, skip_special_tokens=False)) == [tokenizer.bos_id, *ids]


def test_chat_options_reach_the_template() -> None:
    template = (
        "{{ messages|length }} {{ add_generation_prompt }} {{ tools }} {{ style }} {{ eos_token }}{{ x }}"
    )
    tokenizer = Tokenizer.from_gguf(
        byte_level_metadata() | {"tokenizer.chat_template": template}, Path("x.gguf")
    )
    ids = tokenizer.apply_chat_template(
        CONVERSATION, add_generation_prompt=False, tools=[{"n": 1}], style="terse"
    )
    assert tokenizer.decode(ids, skip_special_tokens=False) == "4 False [{'n': 1}] terse <|im_end|>"


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(InputError, match="text: character 3 is half a surrogate pair"):
        byte_level().encode("abc\ud800")
    metadata = byte_level_metadata() | {"tokenizer.chat_template": "{{ messages[0].content }}"}
    with pytest.raises(InputError, match="text: character 1 is half a surrogate pair"):
        Tokenizer.from_gguf(metadata, Path("x.gguf")).apply_chat_template(
            [{"role": "user", "content": "a\udfff"}]
        )


def test_ids() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(iter(ids)) == "hello"
    assert tokenizer.decode([*ids, 10**6]) == "hello"
    for outside in ([-1], [2**40]):
        with pytest.raises(InputError, match=r"tiny\.gguf: cannot decode the ids"):
            tokenizer.decode(outside)
    for bad in (["x"], [None]):
        with pytest.raises(InputError, match=r"decode\(\): `ids` is .*, expected iterable of int"):
            tokenizer.decode(bad)  # type: ignore[arg-type]
    for bad_id in (-1, tokenizer.vocab_size, 2**40):
        with pytest.raises(InputError, match=f"token id {bad_id} is not in the vocabulary"):
            tokenizer.token(bad_id)


def test_a_panic_of_the_library_is_an_input_error() -> None:
    tokenizer = from_golden("unigram", precompiled_charsmap=[4, 0, 0, 0, 1, 2, 3, 4, 5])
    with pytest.raises(InputError, match=r"tiny\.gguf: cannot encode the text: index out of bounds"):
        tokenizer.encode("a")


def test_an_interrupt_is_not() -> None:
    class Backend:
        def encode(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    tokenizer = byte_level()
    object.__setattr__(tokenizer, "backend", Backend())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("a")


def marked(folder: Path, single: str, special: dict[str, int], **config: Any) -> Tokenizer:
    """A tokenizer of words whose post-processor is `single`."""
    words = {"<s>": 0, "</s>": 1, "[A]": 2, "x": 3, "y": 4, "<unk>": 5}
    backend = tokenizers.Tokenizer(WordLevel(words, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>", "[A]"])
    backend.post_processor = processors.TemplateProcessing(single, None, list(special.items()))
    return Tokenizer.from_folder(
        write_files(folder, {"tokenizer.json": backend.to_str(), "tokenizer_config.json": config})
    )


BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
SAME = {"bos_token": "<s>", "eos_token": "<s>"}
FORMS = {
    "neither": ("$A", {}, BOTH),
    "bos": ("<s> $A", {"<s>": 0}, BOTH),
    "bos and eos": ("<s> $A </s>", {"<s>": 0, "</s>": 1}, BOTH),
    "eos": ("$A </s>", {"</s>": 1}, BOTH),
    "several": ("[A] <s> $A </s>", {"[A]": 2, "<s>": 0, "</s>": 1}, BOTH),
    "bos is eos": ("<s> $A <s>", {"<s>": 0}, SAME),
    "bos is eos, begins": ("<s> $A", {"<s>": 0}, SAME),
}


@pytest.mark.parametrize(
    ("form", "text", "ids", "ended"),
    [
        ("neither", "x y", [3, 4], [3, 4, 1]),
        ("neither", "<s> x </s>", [0, 3, 1], [0, 3, 1]),
        ("bos", "x", [0, 3], [0, 3, 1]),
        ("bos", "<s> x", [0, 3], [0, 3, 1]),
        ("bos", "<s> x </s>", [0, 3, 1], [0, 3, 1]),
        ("bos", "<s> x </s> <s> y </s>", [0, 3, 1, 0, 4, 1], [0, 3, 1, 0, 4, 1]),
        ("bos", "x <s> y", [0, 3, 0, 4], [0, 3, 0, 4, 1]),
        ("bos", "", [0], [0, 1]),
        ("bos", "<s>", [0], [0, 1]),
        ("bos", "</s>", [0, 1], [0, 1]),
        ("bos and eos", "x", [0, 3, 1], [0, 3, 1]),
        ("bos and eos", "<s> x </s>", [0, 3, 1], [0, 3, 1]),
        ("bos and eos", "<s> x", [0, 3, 1], [0, 3, 1]),
        ("bos and eos", "x </s>", [0, 3, 1], [0, 3, 1]),
        ("bos and eos", "", [0, 1], [0, 1]),
        ("bos and eos", "<s> </s>", [0, 1], [0, 1]),
        ("eos", "<s> x </s>", [0, 3, 1], [0, 3, 1]),
        ("eos", "x", [3, 1], [3, 1]),
        ("several", "x", [2, 0, 3, 1], [2, 0, 3, 1]),
        ("several", "[A] <s> x </s>", [2, 0, 3, 1], [2, 0, 3, 1]),
        ("several", "<s> x", [2, 0, 3, 1], [2, 0, 3, 1]),
        ("bos is eos", "x", [0, 3, 0], [0, 3, 0]),
        ("bos is eos", "<s> x <s>", [0, 3, 0], [0, 3, 0]),
        ("bos is eos", "<s>", [0, 0], [0, 0]),
        ("bos is eos, begins", "<s> x", [0, 3], [0, 3, 0]),
        ("bos is eos, begins", "x <s>", [0, 3, 0], [0, 3, 0]),
    ],
)
def test_a_text_that_has_its_marks_gets_no_second_ones(
    form: str, text: str, ids: list[int], ended: list[int], tmp_path: Path
) -> None:
    single, special, config = FORMS[form]
    tokenizer = marked(tmp_path, single, special, **config)
    assert (tokenizer.encode_once(text), tokenizer.encode_once(text, end=True)) == (ids, ended)


@pytest.mark.parametrize(
    ("single", "config", "text", "ids", "ended"),
    [
        ("<s> $A", BOTH, "<s>hi</s>\n", [0, 3, 1, 5], [0, 3, 1, 5]),
        ("<s> $A", BOTH, " <s>hi</s> \n", [4, 0, 3, 1, 4, 5], [4, 0, 3, 1, 4, 5]),
        ("<s> $A", BOTH, "\nhi\n", [0, 5, 3, 5], [0, 5, 3, 5, 1]),
        ("<s> $A", BOTH, "\n", [0, 5], [0, 5, 1]),
        ("<s> $A </s>", BOTH, "<s>hi</s>\n", [0, 3, 1, 5], [0, 3, 1, 5]),
        ("<s> $A </s>", BOTH, "hi\n", [0, 3, 5, 1], [0, 3, 5, 1]),
        ("<s> $A", SAME, " <s>\n", [4, 0, 5], [4, 0, 5, 0]),
        ("<s> $A", SAME, "hi<s>\n", [0, 3, 0, 5], [0, 3, 0, 5]),
        # Long texts, of which both ends are looked at.
        ("<s> $A </s>", BOTH, "hi " * 5000, [0, *[3, 4] * 5000, 1], [0, *[3, 4] * 5000, 1]),
        ("<s> $A", BOTH, "\n<s>" + "hi " * 5000 + "</s>\n", [5, 0, *[3, 4] * 5000, 1, 5], []),
        ("<s> $A", BOTH, "hi " * 5000 + "\n", [0, *[3, 4] * 5000, 5], [0, *[3, 4] * 5000, 5, 1]),
    ],
)
def test_white_space_around_the_marks_of_a_text_does_not_count(
    single: str, config: dict[str, str], text: str, ids: list[int], ended: list[int], tmp_path: Path
) -> None:
    backend = tokenizers.Tokenizer(
        WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "hi": 3, " ": 4, "\n": 5}, "<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\s"), "isolated")
    backend.add_special_tokens(["<s>", "</s>"])
    special = [(mark, i) for i, mark in enumerate(("<s>", "</s>")) if mark in single]
    backend.post_processor = processors.TemplateProcessing(single, None, special)
    files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": config}
    tokenizer = Tokenizer.from_folder(write_files(tmp_path, files))
    assert (tokenizer.encode_once(text), tokenizer.encode_once(text, end=True)) == (ids, ended or ids)


def test_one_line_and_no_more_is_written_about_a_panic(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = from_golden("unigram", precompiled_charsmap=[4, 0, 0, 0, 1, 2, 3, 4, 5])
    with pytest.raises(InputError, match="index out of bounds"):
        tokenizer.encode("a")
    assert capfd.readouterr().err == ""


def test_what_else_goes_to_stderr_during_a_call_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    assert checked("x", lambda: os.write(2, b"from another thread\n")) == 20
    with pytest.raises(InputError, match="x: 'no'"):
        checked("x", lambda: [os.write(2, b"once more\n"), {}["no"]])
    assert capfd.readouterr().err == "from another thread\nonce more\n"


def test_calls_of_many_threads_restore_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_level()
    expected = tokenizer.encode("the lazy dog")
    with ThreadPoolExecutor(8) as pool:
        assert set(map(tuple, pool.map(lambda _: tokenizer.encode("the lazy dog"), range(400)))) == {
            tuple(expected)
        }
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"
