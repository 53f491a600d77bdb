"""The records of data files: every form and key is used, ignored with a note, or rejected by name."""

from __future__ import annotations

import codecs
import gzip
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from einsum_transformer.errors import InputError
from einsum_transformer.text.tokenizer import Tokenizer
from einsum_transformer.training import record_keys as keys
from einsum_transformer.training.records import Example, read_examples

TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t.function.name }}{% endfor %}</tools>{% endif %}"
    "{% for d in documents or [] %}<doc>{{ d.text }}</doc>{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }}</call>{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{% if enable_thinking %}<think>{% endif %}"
)
END = "<|endoftext|>"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
LONGER = [*CHAT, {"role": "user", "content": "so"}, {"role": "assistant", "content": "no"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    trained = Tokenizer.train(["to be or not to be, that is the question"] * 3, 270)
    return replace(trained, source="test", chat_templates={"default": TEMPLATE})


def read(
    folder: Path, tokenizer: Tokenizer, *records: Any, mask: bool = False, name: str = "a.jsonl"
) -> list[Example]:
    path = folder / name
    texts = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(texts), encoding="utf-8")
    return read_examples(path, tokenizer, mask)


def text(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(example.tokens.tolist(), skip_special_tokens=False)


def target_text(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(example.tokens[example.trained].tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": CHAT, "tools": [TOOL]}, f"<tools>add</tools><user>hi{END}<assistant>yes{END}"),
        (
            {"messages": CHAT, "tools": json.dumps([TOOL])},
            f"<tools>add</tools><user>hi{END}<assistant>yes{END}",
        ),
        ({"messages": CHAT, "tools": None, "documents": []}, f"<user>hi{END}<assistant>yes{END}"),
        ({"messages": CHAT, "documents": [{"text": "d"}]}, f"<doc>d</doc><user>hi{END}<assistant>yes{END}"),
        (
            {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": True}},
            f"<user>hi{END}<assistant>yes{END}<think>",
        ),
        (
            {"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [TOOL]}]},
            f"<user>hi{END}<assistant><call>add</call>{END}",
        ),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, f"<user>hi{END}<assistant>yes{END}"),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:], "tools": [TOOL]},
            f"<tools>add</tools><user>hi{END}<assistant>yes{END}",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}],
                "system": "s",
            },
            f"<system>s{END}<user>hi{END}<assistant>yes{END}",
        ),
        ({"conversations": CHAT}, f"<user>hi{END}<assistant>yes{END}"),
        ({"messages": CHAT, "system": "s"}, f"<system>s{END}<user>hi{END}<assistant>yes{END}"),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:], "system": "s"},
            f"<system>s{END}<user>hi{END}<assistant>yes{END}",
        ),
        ({"prompt": "to ", "completion": "be", "id": 7}, f"to be{END}"),
        ({"text": "to be"}, f"to be{END}"),
        ({"text": f"to be{END}"}, f"to be{END}"),
        ({"prompt": "to ", "completion": f"be{END}"}, f"to be{END}"),
        ({"prompt": f"to{END}", "completion": "be"}, f"to{END}be{END}"),
        ({"text": "a\u2028b"}, f"a\u2028b{END}"),
    ],
)
def test_every_form_is_rendered(record: Any, expected: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    for line in (json.dumps(record), json.dumps(record, ensure_ascii=False)):
        [example] = read(tmp_path, tokenizer, line)
        assert text(example, tokenizer) == target_text(example, tokenizer) == expected


def test_the_completion_of_messages_is_the_target(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = {"prompt": LONGER[:3], "completion": LONGER[3:]}
    [example] = read(tmp_path, tokenizer, record, mask=True)
    assert target_text(example, tokenizer) == f"no{END}"


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"training": False}, {"loss": 0.0}])
def test_messages_can_be_left_out(flag: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer) -> None:
    """weight 0 or 1 (OpenAI), or train (axolotl), of a message."""
    first = [LONGER[0], LONGER[1] | flag, *LONGER[2:]]
    [example] = read(tmp_path, tokenizer, {"messages": first}, mask=True)
    assert target_text(example, tokenizer) == f"no{END}"
    [example] = read(tmp_path, tokenizer, {"messages": first})
    assert target_text(example, tokenizer) == f"<user>hi{END}<assistant><user>so{END}<assistant>no{END}"
    user = [LONGER[0] | flag, *LONGER[1:]]
    [example] = read(tmp_path, tokenizer, {"messages": user})
    assert target_text(example, tokenizer) == f"<assistant>yes{END}<user>so{END}<assistant>no{END}"
    with pytest.raises(InputError, match="line 1: no targets are left"):
        read(tmp_path, tokenizer, {"messages": [CHAT[0], CHAT[1] | flag]}, mask=True)


def test_messages_can_be_chosen(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """weight 1 is the default; train true includes a user message."""
    for flag, expected in (
        ({"weight": 1}, f"yes{END}no{END}"),
        ({"train": True}, f"<user>hi{END}yes{END}no{END}"),
    ):
        messages = [LONGER[0] | flag, LONGER[1] | flag, *LONGER[2:]]
        [example] = read(tmp_path, tokenizer, {"messages": messages}, mask=True)
        assert target_text(example, tokenizer) == expected
        assert text(example, tokenizer) == f"<user>hi{END}<assistant>yes{END}<user>so{END}<assistant>no{END}"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "got prompt, chosen, rejected: preference data"),
        ({"chosen": CHAT, "rejected": CHAT}, "preference data"),
        ({"instruction": "a", "input": "", "output": "b"}, "Alpaca"),
        ({"question": "a", "answer": "b"}, "write prompt for question and completion for answer"),
        ({"prompt": "a", "completion": "b", "label": False}, "'label': unpaired preference data"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "stepwise supervision"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "token ids"),
        ({"prompt": "a"}, "expected text, .*a prompt without a completion"),
        ({"role": "user", "content": "a"}, "a message; a record is"),
        ({"data": [{"text": "a"}]}, "if data is the list of records, write it alone"),
        ({"prompt": "a", "completion": CHAT}, "two strings or two lists of messages"),
        ({"text": "a", "tools": [TOOL]}, "'tools': used by chat templates only, which require messages"),
        ({"prompt": "a", "completion": "b", "suffix": "c"}, "'suffix': fill-in-the-middle"),
        ({"messages": CHAT, "images": ["a.png"]}, "'images': images are not supported"),
        ({"messages": CHAT, "functions": [TOOL]}, "'functions': .*write tools"),
        ({"messages": CHAT, "weight": 0.5}, "'weight' is 0.5: weights are not supported"),
        ({"messages": CHAT, "tools": {"a": 1}}, "tools: expected a list of objects"),
        ({"messages": CHAT, "tools": "[1"}, "tools: the string is not valid JSON"),
        (
            {"messages": CHAT, "chat_template_kwargs": {"seconds": 9e9}},
            "'seconds' is not a template variable",
        ),
        (
            {"messages": CHAT, "chat_template_kwargs": {"messages": []}},
            "'messages' is not a template variable",
        ),
        ({"messages": CHAT, "chat_template_kwargs": [1]}, "expected an object, got list"),
        (
            {"messages": [CHAT[0], CHAT[1] | {"weight": 0.5}]},
            r"messages\[1\]: 'weight' is 0.5: expected 0 or 1",
        ),
        ({"messages": [CHAT[0], CHAT[1] | {"train": "no"}]}, r"messages\[1\]: 'train' is \"no\""),
        (
            {"messages": [CHAT[0], CHAT[1] | {"weight": 0, "train": True}]},
            "weight, train contradict each other",
        ),
        ({"messages": [CHAT[0], CHAT[1] | {"train_detail": [{}]}]}, "'train_detail': parts of a message"),
        ({"prompt": CHAT[:1], "completion": [CHAT[1] | {"weight": 0}]}, r"completion\[0\]: weights"),
        ({"conversations": [{"from": "bard", "value": "a"}]}, r"conversations\[0\]: 'from' is \"bard\""),
        ({"conversations": [{"from": "gpt", "role": "user", "value": "a"}]}, "has both from and value"),
        ({"conversations": CHAT, "system": 1}, "'system': expected a string"),
        (
            {"messages": [{"role": "system", "content": "a"}], "system": "b"},
            "without a system message in addition",
        ),
        ({"prompt": "a", "completion": "b", "system": "c"}, "'system': used by chat templates only"),
    ],
)
def test_unsupported_records_are_rejected(
    record: Any, message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(InputError, match=f"line 2: .*{message}") as caught:
        read(tmp_path, tokenizer, {"text": "a"}, record)
    assert str(caught.value).startswith(str(tmp_path / "a.jsonl"))


def test_one_note_lists_ignored_keys(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    named = CHAT[0] | {"mood": "x"}
    records = [
        {"messages": CHAT, "prompt": "hi", "difficulty": 3, "source": "here", "score": None},
        {"messages": [named, CHAT[1]], "difficulty": 4, "chat_template_kwargs": {"speed": 1}},
    ]
    read(tmp_path, tokenizer, *records)
    [record] = caplog.records
    assert record.message == (
        f"{tmp_path / 'a.jsonl'}: ignored keys, with the number of records that contain them: "
        "difficulty (2), prompt (1), speed (1), mood (1)"
    )


def test_tools_that_the_template_does_not_read_are_noted(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    other = replace(tokenizer, chat_templates={"default": plain})
    read(tmp_path, other, {"messages": CHAT, "tools": [TOOL]})
    assert "tools (1)" in caplog.text


def test_the_tables_of_keys_are_disjoint() -> None:
    used = {key for names in keys.FORMS.values() for key in names}
    tables = [used, keys.IGNORED, set(keys.UNSUPPORTED), set(keys.WEIGHTS)]
    for i, one in enumerate(tables):
        for other in tables[i + 1 :]:
            assert not one & other
    for key in keys.IGNORED:
        form, names = keys.form_of({"messages": CHAT, key: "x"})
        assert (form, keys.unused({"messages": CHAT, key: "x"}, names)) == ("messages", [])
    for key in keys.UNSUPPORTED:
        with pytest.raises(InputError, match=key):
            keys.form_of({"messages": CHAT, key: "x"})
    for names, _ in keys.OTHER_FORMS:
        assert keys.has_form(dict.fromkeys(names, "x"))
        with pytest.raises(InputError, match="expected text, prompt and completion, or messages"):
            keys.form_of(dict.fromkeys(names, "x"))


ROWS = [{"prompt": "to ", "completion": "be"}, {"prompt": "or ", "completion": "not"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", "\n".join(map(json.dumps, ROWS))),
        ("a.json", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a.jsonl", json.dumps(ROWS)),
        ("a.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a.jsonl", "\r\n".join(map(json.dumps, ROWS)) + "\r\n"),
        ("a.jsonl", "\ufeff" + "\n".join(map(json.dumps, ROWS))),
        ("a.json", "\ufeff" + json.dumps(ROWS)),
        ("a.JSONL", "\n\n".join(map(json.dumps, ROWS))),
        ("a.ndjson", "\n".join(map(json.dumps, ROWS))),
        ("a", "\n".join(map(json.dumps, ROWS))),
        ("a.txt", json.dumps(ROWS)),
        ("train.jsonl", "\n".join(map(json.dumps, ROWS))),
    ],
)
def test_json_is_read_by_its_content(name: str, content: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / name).write_bytes(content.encode())
    path = tmp_path if name == "train.jsonl" else tmp_path / name
    examples = read_examples(path, tokenizer, mask_prompt=True)
    assert [target_text(example, tokenizer) for example in examples] == [f"be{END}", f"not{END}"]
    assert examples[1].place.startswith(f"{tmp_path / name}: ")


def test_text_that_begins_like_json_is_read_as_text(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    for name, content in (("a.txt", "[Verse 1]\nto be"), ("a.c", "{ return 1; }")):
        [example] = read(tmp_path, tokenizer, content, name=name)
        assert text(example, tokenizer) == content + END
    assert not caplog.records
    [example] = read(tmp_path, tokenizer, '{"level": 3}', name="a.log")
    assert text(example, tokenizer) == '{"level": 3}' + END
    assert "contains JSON, but not in a form of training records" in caplog.text
    read(tmp_path, tokenizer, "<!DOCTYPE html><p>to be", name="a.txt")
    assert "an HTML page" in caplog.text


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n1,2\n", "comma-separated values; convert it to JSONL"),
        ("a.tsv", b"a\tb\n", "tab-separated values"),
        ("a.jsonl", gzip.compress(b'{"text": "a"}', mtime=0), r"a compressed file \(gzip\); unpack it first"),
        ("a.zip", b"PK\x03\x04" + bytes(40), "a compressed file"),
        ("a.parquet", b"PAR1" + bytes(40), "a Parquet file; convert it to JSONL"),
        ("a.arrow", b"ARROW1\x00\x00" + bytes(40), "an Arrow file"),
        ("a.txt", npy(), "a npy file"),
        ("a.pkl", b"\x80\x04\x95" + bytes(40), "a pickle file"),
        ("a.pdf", b"%PDF-1.7\n", "a PDF file; extract its text"),
        ("a.bin", b"abc\x00\x01", "a binary file"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("a.gguf", b"GGUF" + bytes(40), "a weights file"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("a.txt", codecs.BOM_UTF16_BE + "a".encode("utf-16-be"), "UTF-16 text"),
        ("a.txt", "abc".encode("utf-32"), "UTF-32 text"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.txt", b"\xef\xbb\xbf \n", "contains no text"),
        ("a.json", b"{", "record 1 is not valid JSON"),
        ("a.json", b'[{"text": "a"}', "record 1 is not valid JSON"),
        ("a.json", b'[{"text": "a"},]', "record 1 is not valid JSON"),
        ("a.json", b'["a"]', "record 1 is not a JSON object"),
        ("a.json", b"hello", "record 1 is not valid JSON"),
        ("a.json", b"[]", "contains no records"),
        ("a.json", b'[{"text": "a", "text": "b"}]', "record 1 is not valid JSON: the key .* occurs twice"),
        ("a.json", b"[" * 100_000, "record 1 is not valid JSON"),
        ("a.jsonl", b'{"text": "a"\n{"text": "b"}', "line 1 is not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n\xff', "line 2: byte 14 is not UTF-8 text"),
    ],
)
def test_files_that_are_not_text_are_rejected_by_kind(
    name: str, content: bytes, message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_examples(path, tokenizer)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_folders_without_data_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"a folder without train\.jsonl"):
        read_examples(tmp_path, tokenizer)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(InputError, match="a dataset of Arrow files"):
        read_examples(tmp_path, tokenizer)


def test_a_completion_follows_its_prompt_without_a_space(tmp_path: Path) -> None:
    """SentencePiece adds a space at the start of a text, which a completion must not get."""
    from text.text_golden import from_golden

    tokenizer = from_golden("sentencepiece", add_bos_token=True, add_eos_token=True)
    [example] = read(tmp_path, tokenizer, {"prompt": "2+2=", "completion": "4"}, mask=True)
    assert tokenizer.decode(example.tokens.tolist()) == "2+2=4"
    assert (example.tokens == tokenizer.eos_id).nonzero()[0].tolist() == [len(example.tokens) - 1]
    assert tokenizer.decode(example.tokens[example.trained].tolist()) == "4"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a", "train": False}, "'train' is false"),
        ({"text": "a", "training": 0}, "'training' is 0"),
        ({"messages": [{"role": "user", "content": "a"}], "loss": False}, "'loss' is false"),
        ({"prompt": "a", "completion": "b", "loss": 0}, "'loss' is 0"),
        ({"prompt": "a", "completion": "b", "label": 0}, "'label': unpaired"),
        ({"prompt": "a", "completion": "b", "label": 1}, "'label': unpaired"),
        ({"messages": [{"role": "user", "content": "a"}], "label": 0}, "'label': unpaired"),
        ({"text": "a", "label": False}, "'label': unpaired"),
    ],
)
def test_a_record_that_is_switched_off_is_rejected(record: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        keys.form_of(record)


def test_a_record_that_is_switched_on_is_used() -> None:
    record = {"text": "a", "train": True, "loss": 0.25, "label": 0}
    form, used = keys.form_of(record)
    assert form == "text"
    assert keys.unused(record, used) == ["loss", "label"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"\n', "line 2"),
        ('{"messages": [{"role": "user", "content": "a"}]}\nTrailing line\n', "line 2"),
        ('["one", "two"]', "begins like JSON"),
        ('[{"prompt": "a", "completion": "b"}, ]', "begins like JSON"),
        ('{prompt: "a", completion: "b"}', "begins like JSON"),
        ("{'prompt': 'a', 'completion': 'b'}\n", "Python dict"),
        ("[{'prompt': 'a', 'completion': 'b'}]\n", "Python dict"),
        ('// header\n{"prompt": "a", "completion": "b"}\n', "line 2 is a JSON record"),
        ('# header\n\n{"text": "a"}\n', "line 3 is a JSON record"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_text_that_looks_like_records_is_noted(
    content: str,
    message: str,
    name: str,
    tmp_path: Path,
    tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    read_examples(tmp_path / name, tokenizer)
    [record] = caplog.records
    assert message in record.message
    assert "is read as plain text" in record.message
    with pytest.raises(InputError, match=f"{message}.*no prompt to mask"):
        read_examples(tmp_path / name, tokenizer, mask_prompt=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{\\rtf1\\ansi to be}", "an RTF document"),
        ("to be or not to be".encode("utf-16-le"), "UTF-16LE text without a byte order mark"),
        ("to be or not to be".encode("utf-16-be"), "UTF-16BE text without a byte order mark"),
    ],
)
def test_unsupported_text_formats_are_rejected(
    content: bytes, message: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_examples(tmp_path / "a.txt", tokenizer)


def test_byte_order_marks_within_a_file_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [codecs.BOM_UTF8 + json.dumps({"text": each}).encode() for each in ("be", "not")]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    examples = read_examples(tmp_path / "a.jsonl", tokenizer)
    assert [text(example, tokenizer) for example in examples] == [f"be{END}", f"not{END}"]


def test_messages_of_other_dialects(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    calls = [CHAT[0], {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}}]
    rejected: tuple[tuple[dict[str, Any], str], ...] = (
        ({"messages": calls}, "function_call.*write tool_calls"),
        ({"conversation": CHAT}, "write messages for conversation"),
        ({"dialogue": CHAT}, "write messages for dialogue"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "role assistant with tool_calls"),
    )
    for record, message in rejected:
        with pytest.raises(InputError, match=message):
            read(tmp_path, tokenizer, record)
    turns = [("Human", "a"), ("chatgpt", "b"), ("observation", "c"), ("bing", "d")]
    [example] = read(tmp_path, tokenizer, {"conversations": [{"from": a, "value": b} for a, b in turns]})
    assert text(example, tokenizer) == f"<user>a{END}<assistant>b{END}<tool>c{END}<assistant>d{END}"
    read(tmp_path, tokenizer, {"messages": [*CHAT, {"role": "tool", "content": "2", "tool_call_id": "x"}]})
    assert not caplog.records
