"""Folders as transformers' AutoTokenizer reads them (tools/golden_tokenizers.py), and tables of keys."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from text_golden import golden, streamed, write_files

from einsum_transformer.errors import InputError
from einsum_transformer.text import chat_options, config_keys
from einsum_transformer.text.streaming import clean_up
from einsum_transformer.text.tokenizer import Tokenizer

FOLDERS = golden("folders")
BASE, SIZE = FOLDERS["base"], len(FOLDERS["base"]["model"]["vocab"])


def write(folder: Path, case: dict[str, Any]) -> Path:
    """The files of a case, as tools/golden_tokenizers.py wrote them."""
    files: dict[str, Any] = {name: content for name, content in case.items() if name.endswith(".json")}
    if "layout" in case:
        files["config.json"] = {"model_type": case["layout"]}
        files["vocab.json"] = BASE["model"]["vocab"]
        lines = ["#version: 0.2", *(" ".join(pair) for pair in BASE["model"]["merges"])]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        changed = {"added_tokens": [*BASE["added_tokens"], *case.get("added", [])]}
        changed |= {"post_processor": case["post_processor"]} if "post_processor" in case else {}
        files["tokenizer.json"] = BASE | changed
    return write_files(folder, files)


@pytest.mark.parametrize("name", FOLDERS["cases"])
def test_a_folder_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    case = FOLDERS["cases"][name]
    expected = case["expected"]
    tokenizer = Tokenizer.from_folder(write(tmp_path, case))
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    for made in (tokenizer, Tokenizer.from_folder(tmp_path / "saved")):
        assert [made.encode(text) for text in FOLDERS["strings"]] == expected["ids"]
        assert [made.decode(ids) for ids in expected["ids"]] == expected["decoded"]
        assert [made.decode(ids, skip_special_tokens=False) for ids in expected["ids"]] == expected["kept"]
        assert {key: [text, made.backend.token_to_id(text)] for key, text in made.named.items()} == expected[
            "named"
        ]
        assert made.vocab_size == expected["size"]
        ids = {"bos_token": made.bos_id, "eos_token": made.eos_id}
        assert {key: number for key, number in ids.items() if number is not None} == {
            key: pair[1] for key, pair in expected["named"].items() if key in ids
        }
        for row, text, kept in zip(expected["ids"], expected["decoded"], expected["kept"]):
            assert (streamed(made, row, True), streamed(made, row, False)) == (text, kept)


def test_text_is_cleaned_up_as_transformers_does(tmp_path: Path) -> None:
    case = FOLDERS["clean_up"]
    tokenizer = Tokenizer.from_folder(write(tmp_path, {**case["files"], "layout": "gpt2"}))
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(case["files"]["tokenizer.json"]))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert [tokenizer.decode(row, False) for row in case["rows"]] == case["texts"]
    assert [streamed(tokenizer, row, False) for row in case["rows"]] == case["texts"]


def config(folder: Path, added: tuple[dict[str, Any], ...] = (), **files: Any) -> Tokenizer:
    """BASE with further added tokens, and files by their name without .json."""
    case = {f"{name}.json": content for name, content in files.items()}
    return Tokenizer.from_folder(write(folder, case | {"added": added}))


def listed(*pairs: tuple[Any, str]) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(i): {"content": text, "special": True} for i, text in pairs}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": listed((SIZE + 5, "<x>"))}, f"'<x>' should have id {SIZE + 5}, .* get {SIZE}"),
        ({"tokenizer_config": listed((7, "<x>"))}, "'<x>' should have id 7"),
        ({"tokenizer_config": listed((SIZE, "<x>"), (SIZE + 2, "<y>"))}, "'<y>' should have id"),
        ({"tokenizer_config": listed((SIZE, "<x>"), (SIZE + 1, "<x>"))}, "'<x>' should have id"),
        ({"tokenizer_config": listed((2**32 + SIZE, "<x>"))}, "expected a token id from 0 to 16777215"),
        ({"tokenizer_config": listed((10**30, "<x>"))}, "expected a token id from 0"),
        ({"tokenizer_config": listed((-1, "<x>"))}, "expected a token id from 0"),
        ({"tokenizer_config": listed(("one", "<x>"))}, "'one': expected a token id from 0"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "added_tokens_decoder: expected an object"),
        ({"tokenizer_config": {"added_tokens_decoder": {str(SIZE): "<x>"}}}, 'expected {"content": string}'),
        (
            {"tokenizer_config": {"added_tokens_decoder": {str(SIZE): {"content": "<x>", "lstrip": "yes"}}}},
            "lstrip must be true or false",
        ),
        ({"tokenizer_config": {"extra_special_tokens": "x"}}, "extra_special_tokens: expected a list"),
        ({"tokenizer_config": {"additional_special_tokens": [5]}}, r"tokens\[0\]: expected a string"),
        ({"tokenizer_config": {"extra_special_tokens": {"x": 5}}}, "x: expected a string"),
        ({"added_tokens": {"<x>": SIZE + 3}}, f"'<x>' should have id {SIZE + 3}"),
        ({"added_tokens": {"<x>": "5"}}, "'<x>': expected a token id, got '5'"),
        ({"added_tokens": {"<x>": 2**40}}, "expected a token id from 0"),
        ({"added_tokens": []}, r"added_tokens\.json: expected a JSON object"),
    ],
)
def test_added_tokens_that_cannot_have_their_ids_are_refused(
    files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as error:
        config(tmp_path, **files)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_id_that_tokenizer_json_has_otherwise_is_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = {"id": SIZE, "content": "<x>", "special": True, "normalized": False}
    token |= {"lstrip": False, "rstrip": False, "single_word": False}
    tokenizer = config(tmp_path, (token,), tokenizer_config=listed((SIZE + 1, "<x>")))
    assert tokenizer.encode("<x>") == [SIZE]
    assert f"'<x>' has id {SIZE} in the vocabulary and {SIZE + 1} in the list" in caplog.text


def test_ids_stated_in_tokenizer_json_are_checked(tmp_path: Path) -> None:
    token = {"id": SIZE + 4, "content": "<x>", "special": True, "normalized": False}
    token |= {"lstrip": False, "rstrip": False, "single_word": False}
    with pytest.raises(
        InputError, match=rf"tokenizer\.json: added token '<x>' has id {SIZE + 4}, .* get {SIZE}"
    ):
        config(tmp_path, (token,))


def test_every_key_that_transformers_reads_has_a_meaning_here(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tables = (config_keys.APPLIED, config_keys.IGNORED, config_keys.CONVERTED, config_keys.NOTED.keys())
    assert set(FOLDERS["config_keys"]) <= frozenset().union(*tables)
    assert sum(map(len, tables)) == len(frozenset().union(*tables))
    config(
        tmp_path,
        tokenizer_config={"auto_map": {"a": "b"}, "use_magic": 3, "legacy": True, "sp_model_kwargs": {}},
    )
    (message,) = caplog.messages
    assert "auto_map: Python code in a checkpoint is never run" in message
    assert message.endswith("use_magic: not a known key")


def test_every_key_of_the_gguf_package_has_a_meaning_here() -> None:
    tables = (config_keys.GGUF_APPLIED, config_keys.GGUF_IGNORED, config_keys.GGUF_NOTED.keys())
    keys = set(FOLDERS["gguf_keys"]) - {"tokenizer.chat_template.{name}"}
    assert keys <= frozenset().union(*tables)


def test_every_keyword_of_apply_chat_template_has_a_meaning_here() -> None:
    obeyed = inspect.signature(Tokenizer.render_chat).parameters.keys() - {"self", "messages", "variables"}
    assert set(FOLDERS["template_keywords"]) == obeyed | chat_options.UNSUPPORTED.keys()


def test_unread_gguf_keys_are_noted(caplog: pytest.LogCaptureFixture) -> None:
    metadata = golden("tiny")["byte_level"]["metadata"] | {"tokenizer.ggml.pre": "smollm"}
    metadata |= {"tokenizer.ggml.add_sep_token": True, "tokenizer.ggml.new_rule": 1, "llama.x": 2}
    Tokenizer.from_gguf(metadata, Path("x.gguf"))
    (message,) = caplog.messages
    assert message.startswith("x.gguf: not used: tokenizer.ggml.add_sep_token: a separator")
    assert message.endswith("tokenizer.ggml.new_rule: not a known key")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("tokenizer.model", "a SentencePiece model or a tiktoken vocabulary"),
        ("tekken.json", "a Mistral tekken vocabulary"),
        ("vocab.txt", "a WordPiece vocabulary"),
        ("vocab.json", r"a vocabulary without its merges\.txt"),
    ],
)
def test_a_vocabulary_in_another_form_is_named(
    name: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / name).write_bytes(b"\x00\xff")
    assert Tokenizer.in_folder(tmp_path) is None
    assert f"{name} is {form.replace(chr(92), '')}: convert it with transformers" in caplog.text
    with pytest.raises(InputError, match=rf"{name} is {form}: convert it with transformers, AutoTokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": {}}, "model_type None is not supported with .*supported: GPT2Tokenizer"),
        ({"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}}, "tokenizer_class 'BertTokenizer'"),
        ({"vocab.json": {"a": -1}}, r"vocab\.json: 'a': expected a token id from 0"),
        ({"vocab.json": {"a": 2**33}}, r"vocab\.json: 'a': expected a token id from 0"),
        ({"vocab.json": {"a": 1, "b": 1}}, "two tokens have the same id"),
        ({"merges.txt": "a b c"}, r"merges\.txt, line 1: expected two tokens"),
        ({"merges.txt": "#version: 0.2\nnot there"}, r"unusable vocabulary: .*out of vocabulary"),
    ],
)
def test_unusable_vocab_and_merges_are_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, {"layout": "gpt2"})
    write_files(tmp_path, files)
    with pytest.raises(InputError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_vocab_and_merges_of_an_unknown_class_do_not_stop_a_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert Tokenizer.in_folder(write(tmp_path, {"layout": "mistral"})) is None
    assert "this model accepts token ids only" in caplog.text
    assert "model_type 'mistral'" in caplog.text


def test_cleaned_up_pieces_join_to_the_whole() -> None:
    text = "a ' ' ' s n 't . ! n't ,  ? 're " * 3
    from einsum_transformer.text.streaming import CleanStream, StreamDecoder

    class Letters(StreamDecoder):
        def put(self, token_id: int) -> str:
            return chr(token_id)

        def end(self) -> str:
            return ""

    stream = CleanStream(Letters())
    assert "".join([*(stream.put(ord(c)) for c in text), stream.end()]) == clean_up(text)
