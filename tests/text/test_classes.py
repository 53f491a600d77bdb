"""The classes that AutoTokenizer takes and builds anew (tools/golden_tokenizers.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
from text_golden import golden, streamed, write_files

from einsum_transformer.errors import InputError
from einsum_transformer.text import classes
from einsum_transformer.text.tokenizer import Tokenizer

GOLDEN = golden("classes")
CASES = {
    f"{case['base']} {case['model_type']} {json.dumps(case['config'])[:80]}": case for case in GOLDEN["cases"]
}


def write(folder: Path, case: dict[str, Any], **changes: Any) -> Path:
    files = {
        "tokenizer.json": GOLDEN["bases"][case["base"]] | changes,
        "tokenizer_config.json": case["config"],
        "config.json": {"model_type": case["model_type"]},
    }
    return write_files(folder, files)


@pytest.mark.parametrize("name", CASES)
def test_a_class_builds_its_tokenizer_as_in_transformers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    expected = case["expected"]
    tokenizer = Tokenizer.from_folder(write(tmp_path, case))
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    for made in (tokenizer, Tokenizer.from_folder(tmp_path / "saved")):
        assert [made.encode(text) for text in GOLDEN["strings"]] == expected["ids"]
        named = {key: [text, made.backend.token_to_id(text)] for key, text in made.named.items()}
        assert (named, made.vocab_size) == (expected["named"], expected["size"])
        assert [made.bos_id, made.eos_id] == [
            expected["named"].get(name, [None, None])[1] for name in ("bos_token", "eos_token")
        ]
        for row, text, kept in zip(expected["ids"], expected["decoded"], expected["kept"], strict=True):
            assert (made.decode(row), made.decode(row, skip_special_tokens=False)) == (text, kept)
            assert (streamed(made, row, True), streamed(made, row, False)) == (text, kept)


def test_a_folder_that_names_no_tokens_gives_templates_and_training_texts_an_eos(tmp_path: Path) -> None:
    case = next(case for case in GOLDEN["cases"] if case["config"] == {"model_max_length": 1024})
    tokenizer = Tokenizer.from_folder(write(tmp_path, case))
    assert tokenizer.encode_once("x", end=True)[-1] == tokenizer.eos_id == 0
    text = tokenizer.render_chat([{"role": "user", "content": "x"}], chat_template="{{ eos_token }}")
    assert text == "<|endoftext|>"


def test_the_tables_of_classes_are_those_of_transformers() -> None:
    known = {*classes.DEFAULTS, classes.BACKEND}
    built = {model: name for model, name in GOLDEN["class_of_model"].items() if name in known}
    assert built == classes.CLASS_OF_MODEL
    registered = {model for model, name in classes.CLASS_OF_MODEL.items() if name != classes.BACKEND}
    assert {*GOLDEN["misstated"]} & registered == classes.MISSTATED
    for name, defaults in GOLDEN["defaults"].items():
        assert classes.DEFAULTS[name] == defaults, name


def test_a_class_of_bpe_leaves_another_vocabulary_as_the_file_has_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = {
        "base": "prepend",
        "model_type": "llama",
        "config": {"tokenizer_class": "LlamaTokenizer"},
    }
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁hello", -1.0], ["▁", -2.0]]}
    changes = {"added_tokens": GOLDEN["bases"]["prepend"]["added_tokens"][:1], "post_processor": None}
    folder = write(tmp_path, case, model=unigram, **changes)
    assert Tokenizer.from_folder(folder).encode("hello") == [1]
    assert "not the BPE of LlamaTokenizer, so the file is used unchanged" in caplog.text


def test_a_saved_tokenizer_stays_the_same_beside_a_model_whose_class_is_fixed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = Tokenizer.train(["hello 2024 hello 2024"] * 3, 280)
    trained.save(tmp_path, "qwen2")
    assert "builds a Qwen2Tokenizer from the vocabulary of every qwen2 model" in caplog.text
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    again = Tokenizer.from_folder(tmp_path)
    assert again.encode("hello 2024") == trained.encode("hello 2024")
    assert (again.bos_id, again.eos_id, "pad_token" in again.named) == (None, 0, False)
    caplog.clear()
    case = next(case for case in GOLDEN["cases"] if case["model_type"] == "qwen2")
    for kind in ("qwen2", "llama"):
        Tokenizer.from_folder(write(tmp_path, case)).save(tmp_path / kind, kind)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"merges": ["a"]}, "model.merges: expected pairs of tokens"),
        ({"merges": [["a", 1]]}, "model.merges: expected pairs of tokens"),
        ({"merges": [["no", "such"]]}, "unusable vocabulary"),
        ({"vocab": {"a": -1}}, "expected a token id from 0"),
        ({"vocab": {"a": 1, "b": 1}}, "two tokens have the same id"),
        ({"dropout": "x"}, "not a usable tokenizer"),
    ],
)
def test_a_wrong_vocabulary_of_a_class_ends_in_one_line(
    model: dict[str, Any], message: str, tmp_path: Path
) -> None:
    case = GOLDEN["cases"][0]
    changed = GOLDEN["bases"][case["base"]]["model"] | model
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.from_folder(write(tmp_path, case, model=changed))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_panic_while_text_is_streamed_ends_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case = {
        "base": "prepend",
        "model_type": "llama",
        "config": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    decoder = json.loads(json.dumps(GOLDEN["bases"]["prepend"]["decoder"]))
    decoder["decoders"][-1] |= {"start": 1, "stop": 1}
    tokenizer = Tokenizer.from_folder(write(tmp_path, case, decoder=decoder))
    space = tokenizer.backend.token_to_id("▁")
    assert space is not None
    with pytest.raises(InputError, match="cannot decode the ids") as error:
        tokenizer.stream().put(space)
    assert str(tmp_path) in str(error.value)
    assert capfd.readouterr().err == ""
