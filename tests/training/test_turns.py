"""The assistant's words in a rendered conversation: as from rendering every prefix, in linear time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from einsum_transformer.errors import InputError
from einsum_transformer.text.tokenizer import Tokenizer
from einsum_transformer.training.data import Example, read_examples
from text.text_golden import byte_level, from_golden, golden

TEMPLATES = {name: text for name, text in golden("chat")["templates"].items() if name != "features"}
BYTES = byte_level()
TOKENIZERS = (BYTES, byte_level("llama-bpe"), from_golden("sentencepiece"), from_golden("unigram"))
WORDS = ["be", " to be ", "or\nnot", "user", "<|im_end|>", "", "the question, that is", "\n\nwhy", "ä ☃", "é"]

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "no"},
]


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return dataclasses.replace(tokenizer, chat_templates={"default": template})


def read(tmp_path: Path, tokenizer: Tokenizer, *records: dict[str, Any], mask: bool = True) -> list[Example]:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return read_examples(path, tokenizer, mask)


def learnt(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(example.tokens[example.trained].tolist(), skip_special_tokens=False)


def by_prefixes(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> tuple[list[int], np.ndarray] | None:
    """The ids and the mask from the ids of every prefix; None where those of the whole begin otherwise."""
    tokens = tokenizer.encode_chat(messages, add_generation_prompt=False)
    mask = np.zeros(len(tokens), bool)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.encode_chat(messages[:i]) if i else []
            after = tokenizer.encode_chat(messages[: i + 1], add_generation_prompt=False)
            if tokens[: len(before)] != before or tokens[: len(after)] != after:
                return None
            mask[len(before) : len(after)] = True
    return tokens, mask


def drawn(rng: np.random.Generator, system: bool, turns: int) -> list[dict[str, Any]]:
    pairs = [{"role": role, "content": str(rng.choice(WORDS))} for role in ("user", "assistant") * turns]
    return [{"role": "system", "content": "be"}, *pairs] if system else pairs


@pytest.mark.parametrize("template", TEMPLATES)
def test_masks_are_those_of_all_prefixes(template: str, tmp_path: Path) -> None:
    """Where the ids of the whole begin with those of the prefixes, which merges over their ends prevent."""
    rng, compared = np.random.default_rng(5), 0
    drawings = [drawn(rng, n % 3 == 0, int(rng.integers(1, 2 + n // 2))) for n in range(12)]
    for each, messages in itertools.product(TOKENIZERS, (CHAT[:2], CHAT, *drawings)):
        tokenizer = with_template(each, TEMPLATES[template])
        try:
            expected = by_prefixes(messages, tokenizer)
        except InputError:
            continue
        if expected is None or not expected[1].any():
            continue
        [example] = read(tmp_path, tokenizer, {"messages": messages})
        assert example.tokens.tolist() == expected[0]
        np.testing.assert_array_equal(example.trained, expected[1], err_msg=str(messages))
        compared += 1
    assert compared >= 4


def test_turns_of_tools_and_reasoning_are_those_of_all_prefixes(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "name": "add"},
        {"role": "assistant", "content": "two", "name": "x"},
    ] * 6
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function|tojson }}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = with_template(BYTES, template)
    expected = by_prefixes(messages, tokenizer)
    assert expected is not None
    [example] = read(tmp_path, tokenizer, {"messages": messages})
    np.testing.assert_array_equal(example.trained, expected[1])


@pytest.mark.parametrize("template", ["smollm2", "phi3", "qwen3"])
def test_a_long_conversation_takes_a_linear_time(template: str, tmp_path: Path) -> None:
    tokenizer = with_template(BYTES, TEMPLATES[template])
    pair = [{"role": "user", "content": "to be or not to be"}, {"role": "assistant", "content": "that is it"}]

    def seconds(messages: list[dict[str, Any]]) -> float:
        begin = time.process_time()
        read(tmp_path, tokenizer, {"messages": messages})
        return time.process_time() - begin

    seconds(pair * 50)
    short, long = (min(seconds(pair * n) for _ in range(3)) for n in (50, 200))
    assert long <= 8 * short  # 4 if it were exactly linear; with all prefixes about 16


# Earlier answers lose what the last has, as with Qwen3 and DeepSeek-R1.
REWRITING = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}BEGIN"
    "{% if loop.last %}<think></think>{% endif %}{{ m.content }}END</s>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_only_the_last_answer_where_the_template_rewrites_earlier_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = with_template(BYTES, REWRITING.replace("BEGIN", "").replace("END", ""))
    records = [{"messages": CHAT}, {"messages": CHAT[:2]}, {"messages": CHAT}]
    examples = read(tmp_path, tokenizer, *records)
    assert [learnt(example, tokenizer) for example in examples] == [
        "<think></think>no</s>",
        "<think></think>yes</s>",
        "<think></think>no</s>",
    ]
    [record] = caplog.records
    assert "of 2 conversations only the last answer is learnt" in record.message


def test_generation_blocks_where_the_template_rewrites_earlier_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = REWRITING.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")
    tokenizer = with_template(BYTES, template)
    [example] = read(tmp_path, tokenizer, {"messages": CHAT})
    assert learnt(example, tokenizer) == "yes<think></think>no"
    messages = [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]]
    [example] = read(tmp_path, tokenizer, {"messages": messages})
    assert learnt(example, tokenizer) == "<think></think>no"
    [example] = read(tmp_path, tokenizer, {"messages": messages}, mask=False)
    assert learnt(example, tokenizer) == "[user]hi[assistant]</s>[user]so[assistant]<think></think>no</s>"
    assert not caplog.records


def test_a_generation_prompt_that_opens_more_than_the_answer_has(tmp_path: Path) -> None:
    """As DeepSeek-R1's, which ends in <think> although answers of the past have none."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    tokenizer = with_template(BYTES, template)
    [example] = read(tmp_path, tokenizer, {"messages": CHAT[:2]})
    assert learnt(example, tokenizer) == "yes</s>"


def test_eos_at_the_end_of_the_conversation_alone(tmp_path: Path) -> None:
    """As Phi-3's template, which writes EOS once, after the last message."""
    tokenizer = with_template(BYTES, TEMPLATES["phi3"])
    [example] = read(tmp_path, tokenizer, {"messages": CHAT})
    eos = tokenizer.token(tokenizer.eos_id or 0)
    assert learnt(example, tokenizer) == f"yes<|end|>\nno<|end|>\n{eos}"
