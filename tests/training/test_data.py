"""Text data: tokens, targets, rows and batches, and the errors for malformed files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from einsum_transformer.errors import InputError
from einsum_transformer.text.tokenizer import Tokenizer
from einsum_transformer.training.data import Rows, TextBatches, arrange, held_out, mean_loss
from einsum_transformer.training.files import Data, Record
from einsum_transformer.training.records import Example, examples_of, read_examples
from tiny_models import tiny_model

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "no"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    trained = Tokenizer.train(["to be or not to be, that is the question"] * 3, 270)
    return dataclasses.replace(trained, source="test", chat_templates={"default": TEMPLATE})


def write(path: Path, lines: list[Any]) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def target_text(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(example.tokens[example.trained].tolist(), skip_special_tokens=False)


def test_a_text_is_one_example_that_ends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.txt", ["to be", "or not"])
    [example] = read_examples(path, tokenizer)
    assert target_text(example, tokenizer) == "to be\nor not\n<|endoftext|>"


def test_prompts_are_masked_on_request(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "to be", "completion": " or not"}, "", {"messages": CHAT}])
    plain = read_examples(path, tokenizer)
    assert [target_text(example, tokenizer) for example in plain] == [
        "to be or not<|endoftext|>",
        "<|user|>hi<|endoftext|><|assistant|>yes<|endoftext|><|user|>so<|endoftext|><|assistant|>no<|endoftext|>",
    ]
    masked = read_examples(path, tokenizer, mask_prompt=True)
    assert [target_text(example, tokenizer) for example in masked] == [
        " or not<|endoftext|>",
        "yes<|endoftext|>no<|endoftext|>",
    ]
    assert masked[1].place == f"{path}: line 3"
    for one, two in zip(plain, masked):
        np.testing.assert_array_equal(one.tokens, two.tokens)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"text": 1}', "line 2: 'text' is int, expected a string"),
        ('{"txt": "a"}', "line 2: expected text, prompt and completion, or messages, got txt"),
        ('{"prompt": "a"}', "line 2: expected text"),
        ('{"messages": []}', "line 2: messages: empty"),
        ('{"messages": [{"role": "user"}]}', r"line 2: messages\[0\]: 'content' must be"),
        ('{"text": "\\ud800"}', "line 2: text: character 0 is half a surrogate pair"),
        ('{"text": "a", "text": "b"}', "line 2 .* occurs twice"),
    ],
)
def test_a_malformed_line_is_named(line: str, message: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "a b"}, line])
    with pytest.raises(InputError, match=message) as caught:
        read_examples(path, tokenizer)
    assert str(caught.value).startswith(str(path))


def test_errors_of_masking_and_reading(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = write(tmp_path / "a.txt", ["abc"])
    with pytest.raises(InputError, match="no prompt to mask"):
        read_examples(text, tokenizer, mask_prompt=True)
    lines = write(tmp_path / "a.jsonl", [{"messages": CHAT[:1]}])
    with pytest.raises(InputError, match="line 1: no message is the assistant's"):
        read_examples(lines, tokenizer, mask_prompt=True)
    for content, message in ((b" \n", "contains no text"), (b"a\n\xff", "line 2: byte 2 is not UTF-8")):
        text.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_examples(text, tokenizer)
    lines.write_bytes(b"\n\n")
    with pytest.raises(InputError, match="contains no lines"):
        read_examples(lines, tokenizer)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_examples(tmp_path / "none.txt", tokenizer)


def example(*tokens: int, masked: int = 0) -> Example:
    return Example(np.array(tokens, np.int32), np.arange(len(tokens)) >= masked, "here")


def test_every_token_but_the_first_is_a_target_once_in_packed_rows() -> None:
    rows = arrange([example(1, 2, 3), example(4, 5, 6, 7, masked=2)], 4)
    np.testing.assert_array_equal(rows.tokens, [[1, 2, 3, 4], [5, 6, 0, 0]])
    np.testing.assert_array_equal(rows.targets, [[2, 3, -100, -100], [6, 7, -100, -100]])


def test_padded_rows_begin_with_their_example() -> None:
    rows = arrange([example(1, 2, 3), example(4), example(5, 6, 7, 8, 9, 10)], 4, pack=False)
    np.testing.assert_array_equal(rows.tokens, [[1, 2, 0, 0], [5, 6, 7, 8], [9, 0, 0, 0]])
    np.testing.assert_array_equal(rows.targets, [[2, 3, -100, -100], [6, 7, 8, 9], [10, -100, -100, -100]])
    tokens, targets = rows.batch(np.array([0, 2]))
    np.testing.assert_array_equal(tokens, [[1, 2], [9, 0]])
    np.testing.assert_array_equal(targets, [[2, 3], [10, -100]])


def test_long_examples_can_be_rejected() -> None:
    arrange([example(1, 2, 3, 4, 5)], 4, split_long=False)
    with pytest.raises(InputError, match="here: 6 tokens do not fit in rows of 4"):
        arrange([example(1, 2, 3, 4, 5, 6)], 4, split_long=False)
    with pytest.raises(InputError, match="the data contains no targets"):
        arrange([example(1)], 4)


def test_every_row_comes_once_an_epoch_and_by_number() -> None:
    rows = arrange([example(*range(1, 42))], 4)
    batches = TextBatches(rows, 3, seed=1, accumulation=2)
    assert len(rows) == 10
    first = [tokens[:, 0] for step in range(10) for tokens, _ in batches.batch(step)]
    seen = np.concatenate(first)
    for epoch in range(3):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == sorted(rows.tokens[:, 0])
    assert (seen[:10] != seen[10:20]).any()
    np.testing.assert_array_equal(batches.batch(7)[1][0], TextBatches(rows, 3, 1, 2).batch(7)[1][0])
    assert [len(tokens) for tokens, _ in batches.batch(0)] == [2, 1]
    fixed = TextBatches(rows, 3, fixed=True)
    np.testing.assert_array_equal(fixed.batch(0)[0][0], fixed.batch(5)[0][0])
    assert batches.description() != TextBatches(Rows(rows.tokens + 1, rows.targets), 3, 1, 2).description()
    with pytest.raises(InputError, match="`batch_size` is 11: expected at most the rows of the data, 10"):
        TextBatches(rows, 11)


def test_held_out_examples_are_not_trained_on() -> None:
    train, valid = held_out([example(i, i) for i in range(10)], 0.2, seed=3)
    assert (len(train), len(valid)) == (8, 2)
    assert {int(e.tokens[0]) for e in (*train, *valid)} == set(range(10))
    [before], [after] = held_out([example(*range(100))], 0.1)
    assert before.tokens[-1] + 1 == after.tokens[0] == 90
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(InputError, match="validation share"):
            held_out(train, share)
    with pytest.raises(InputError, match="too short"):
        held_out([example(1, 2, 3)], 0.5)


def test_a_single_conversation_is_not_split(caplog: pytest.LogCaptureFixture) -> None:
    whole = dataclasses.replace(example(*range(100)), divisible=False)
    assert held_out([whole], 0.1) == ([whole], [])
    assert "here: the only example, so nothing is held out" in caplog.text


def test_the_mean_loss_does_not_depend_on_the_batches() -> None:
    model = tiny_model("float64")
    rows = arrange([example(1, 2, 3), example(4, 5, 6, 7, 8, masked=2), example(9, 10)], 4, pack=False)
    whole = model.loss_and_gradients(rows.tokens, rows.targets)[0]
    for batch_size in (1, 2, 5):
        assert mean_loss(model, rows, batch_size) == pytest.approx(whole, rel=1e-12)


def test_a_trained_tokenizer_gives_the_text_back(tmp_path: Path) -> None:
    trained = Tokenizer.train(["the cat and the hat"] * 4, 300)
    assert trained.decode(trained.encode("the hat: ä ☃\n")) == "the hat: ä ☃\n"
    assert len(trained.encode("the cat")) < len("the cat")
    trained.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert again.encode("the cat") == trained.encode("the cat")
    assert again.eos_id == 0
    with pytest.raises(InputError, match="expected at least 257, 256 bytes and EOS"):
        Tokenizer.train(["a"], 256)


def test_batches_of_texts() -> None:
    """Texts of a list give the rows that the same texts give as records."""
    texts = ["one two three four five", "six seven eight nine ten"]
    tokenizer = Tokenizer.train(texts, 300)
    batches = TextBatches.from_texts(texts, tokenizer, batch_size=1, seq_len=4, seed=3)
    examples = examples_of(Data(Path("x"), "", [Record({"text": text}, "x") for text in texts]), tokenizer)
    expected = TextBatches(arrange(examples, 4), 1, 3)
    assert batches.description() == expected.description()
    with pytest.raises(InputError, match="`texts` is 'one'"):
        TextBatches.from_texts("one", tokenizer, 1, 4)
