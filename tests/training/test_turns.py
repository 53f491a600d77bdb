"""Spans of assistant messages in a rendered conversation: equal to rendering every prefix, in linear time."""

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
from einsum_transformer.training.records import Example, read_examples
from einsum_transformer.training.turns import Conversation
from text.text_golden import byte_level, from_golden, golden

TEMPLATES = {name: text for name, text in golden("chat")["templates"].items() if name != "features"}
PLAIN = [name for name, text in TEMPLATES.items() if "endgeneration" not in text]
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


def target_text(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(example.tokens[example.trained].tolist(), skip_special_tokens=False)


def by_prefixes(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> tuple[list[int], np.ndarray] | None:
    """The ids and the mask from the ids of every prefix; None where those of the whole begin otherwise."""
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    mask = np.zeros(len(tokens), bool)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:i]) if i else []
            after = tokenizer.apply_chat_template(messages[: i + 1], add_generation_prompt=False)
            if tokens[: len(before)] != before or tokens[: len(after)] != after:
                return None
            mask[len(before) : len(after)] = True
    return tokens, mask


def drawn(rng: np.random.Generator, system: bool, turns: int) -> list[dict[str, Any]]:
    pairs = [{"role": role, "content": str(rng.choice(WORDS))} for role in ("user", "assistant") * turns]
    return [{"role": "system", "content": "be"}, *pairs] if system else pairs


@pytest.mark.parametrize("template", PLAIN)
def test_masks_equal_those_of_all_prefixes(template: str, tmp_path: Path) -> None:
    """Compared only where no merge crosses the end of a prefix."""
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


def test_turns_of_tools_and_reasoning_equal_those_of_all_prefixes(tmp_path: Path) -> None:
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


# Patterns of the templates of Qwen 2.5 (tool responses share a turn), Llama 3.1 and SmolLM2.
CALLS = "{% for c in m.tool_calls or [] %}\n<call>{{ c.function|tojson }}</call>{% endfor %}"
FRAMES = {
    "shared": (
        "{% for m in messages %}{% if m.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role"
        " != 'tool' %}<s>user{% endif %}\n<r>{{ m.content }}</r>{% if loop.last or messages[loop.index0 + 1]"
        ".role != 'tool' %}</s>\n{% endif %}{% else %}<s>{{ m.role }}\n{{ m.content }}"
        + CALLS
        + "</s>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    ),
    "trimmed": (
        "{{ '<bos>' }}{% for m in messages %}[{{ m.role }}]\n\n{{ (m.content or '')|trim }}" + CALLS + "[end]"
        "{% endfor %}{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
    ),
    "plain": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<s>system\nbe</s>\n{% endif %}"
        "<s>{{ m.role }}\n{{ m.content }}" + CALLS + "</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    ),
}


def calling(rng: np.random.Generator, count: int, kind: str) -> list[dict[str, Any]]:
    """A conversation of about `count` messages in which all tool arguments differ."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "plan it"}]
    for i in range(count // 2):
        arguments = {
            "string": {"city": f"c{i}"},
            "integer": {"n": int(rng.integers(9**9)), "x": round(float(rng.random()), 6)},
            "nested": {"a": {f"k{i}": [i] * (i % 4), "b": bool(i % 2)}, "z": None},
            "key": {f"k{i}": i, "type": f"t{i}"},
        }[kind]
        call = {"type": "function", "function": {"name": "get", "arguments": arguments}}
        messages.append({"role": "assistant", "content": " " * (i % 3), "tool_calls": [call]})
        messages += [{"role": "tool", "content": f"{i} degrees"}] * (1 + i % 5 // 4)
    return [*messages, {"role": "assistant", "content": "done"}]


@pytest.mark.parametrize("kind", ["string", "integer", "nested", "key"])
@pytest.mark.parametrize("template", FRAMES)
def test_masks_of_calls_that_differ_equal_those_of_all_prefixes(
    template: str, kind: str, tmp_path: Path
) -> None:
    tokenizer = with_template(BYTES, FRAMES[template])
    for count in (4, 9, 40):
        messages = calling(np.random.default_rng(count), count, kind)
        expected = {
            i: (
                len(tokenizer.render_chat(messages[:i], True)),
                len(tokenizer.render_chat(messages[: i + 1], False)),
            )
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        }
        assert Conversation.of(tokenizer, messages, None, {}).turns() == expected


def seconds(messages: list[dict[str, Any]], tokenizer: Tokenizer, tmp_path: Path) -> float:
    begin = time.process_time()
    read(tmp_path, tokenizer, {"messages": messages})
    return time.process_time() - begin


@pytest.mark.parametrize("template", ["smollm2", "phi3", "qwen3"])
def test_a_long_conversation_takes_a_linear_time(template: str, tmp_path: Path) -> None:
    tokenizer = with_template(BYTES, TEMPLATES[template])
    pair = [{"role": "user", "content": "to be or not to be"}, {"role": "assistant", "content": "that is it"}]
    seconds(pair * 50, tokenizer, tmp_path)
    short, long = (min(seconds(pair * n, tokenizer, tmp_path) for _ in range(3)) for n in (50, 200))
    assert long <= 8 * short  # linear: 4; rendering all prefixes: about 16


@pytest.mark.parametrize("kind", ["integer", "key"])
def test_calls_that_differ_take_a_linear_time(kind: str, tmp_path: Path) -> None:
    tokenizer, rng = with_template(BYTES, FRAMES["shared"]), np.random.default_rng(0)
    chats = [calling(rng, n, kind) for n in (50, 200)]
    seconds(chats[0], tokenizer, tmp_path)
    short, long = (min(seconds(chat, tokenizer, tmp_path) for _ in range(2)) for chat in chats)
    assert long <= 8 * short


# The template removes reasoning from earlier answers, like those of Qwen3 and DeepSeek-R1.
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
    assert [target_text(example, tokenizer) for example in examples] == [
        "<think></think>no</s>",
        "<think></think>yes</s>",
        "<think></think>no</s>",
    ]
    [record] = caplog.records
    assert "only the last assistant message of 2 conversations is a target" in record.message


def test_generation_blocks_where_the_template_rewrites_earlier_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = REWRITING.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")
    tokenizer = with_template(BYTES, template)
    [example] = read(tmp_path, tokenizer, {"messages": CHAT})
    assert target_text(example, tokenizer) == "yes<think></think>no"
    messages = [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]]
    [example] = read(tmp_path, tokenizer, {"messages": messages})
    assert target_text(example, tokenizer) == "<think></think>no"
    [example] = read(tmp_path, tokenizer, {"messages": messages}, mask=False)
    assert (
        target_text(example, tokenizer) == "[user]hi[assistant]</s>[user]so[assistant]<think></think>no</s>"
    )
    assert not caplog.records


def test_a_generation_prompt_that_opens_more_than_the_answer_has(tmp_path: Path) -> None:
    """DeepSeek-R1: the generation prompt ends in <think>, which earlier answers do not contain."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    tokenizer = with_template(BYTES, template)
    [example] = read(tmp_path, tokenizer, {"messages": CHAT[:2]})
    assert target_text(example, tokenizer) == "yes</s>"


def test_eos_at_the_end_of_the_conversation_alone(tmp_path: Path) -> None:
    """Phi-3: the template writes EOS once, after the last message."""
    tokenizer = with_template(BYTES, TEMPLATES["phi3"])
    [example] = read(tmp_path, tokenizer, {"messages": CHAT})
    eos = tokenizer.token(tokenizer.eos_id or 0)
    assert target_text(example, tokenizer) == f"yes<|end|>\nno<|end|>\n{eos}"


TURN = "<s>{{ m.role }}\n"
ASKED = "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
BLOCKS = {
    "several": "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' %}{% if m.reasoning_content %}"
    "{% generation %}<think>{{ m.reasoning_content }}</think>{% endgeneration %}\n{% endif %}{% generation %}"
    "{{ m.content }}</s>{% endgeneration %}\n{% else %}{{ m.content }}</s>\n{% endif %}{% endfor %}" + ASKED,
    "fewer": "{% for m in messages %}{% if m.role != 'assistant' %}" + TURN + "{{ m.content }}</s>\n"
    "{% elif loop.first or messages[loop.index0 - 1].role != 'assistant' %}<s>assistant\n{% generation %}"
    "{{ m.content }}{% if not loop.last and messages[loop.index0 + 1].role == 'assistant' %}\n"
    "{{ messages[loop.index0 + 1].content }}{% endif %}</s>{% endgeneration %}\n{% endif %}{% endfor %}"
    + ASKED,
    "without end": "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' %}{%- generation -%}"
    "{{ m.content }}{%- endgeneration -%}{% else %}{{ m.content }}{% endif %}</s>{% endfor %}" + ASKED,
    "last only": "{% for m in messages %}"
    + TURN
    + "{% if m.role == 'assistant' and loop.last %}{% generation %}"
    "{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}" + ASKED,
}
LONGER = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes", "reasoning_content": "hm"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "no"},
    {"role": "assistant", "content": "and"},
    {"role": "user", "content": "bye"},
]


@pytest.mark.parametrize(
    ("template", "count", "expected"),
    [
        # transformers 5.24, return_assistant_tokens_mask, with a tokenizer of single characters
        ("several", 6, "<think>hm</think>yes</s>no</s>and</s>"),
        ("several", 4, "<think>hm</think>yes</s>no</s>"),
        ("fewer", 6, "yes</s>noand</s>"),
        ("fewer", 4, "yes</s>no</s>"),
        ("without end", 6, "yesnoand"),
        ("without end", 4, "yesno"),
        ("last only", 4, "no</s>"),
        ("last only", 5, "and</s>"),
    ],
)
def test_generation_blocks_are_the_targets(template: str, count: int, expected: str, tmp_path: Path) -> None:
    tokenizer = with_template(BYTES, BLOCKS[template])
    [example] = read(tmp_path, tokenizer, {"messages": LONGER[:count]})
    assert target_text(example, tokenizer) == expected


def test_a_weight_of_zero_switches_off_the_blocks_of_its_message(tmp_path: Path) -> None:
    off = [LONGER[0], LONGER[1] | {"weight": 0}, *LONGER[2:]]
    for template, expected in (("several", "no</s>and</s>"), ("without end", "noand")):
        tokenizer = with_template(BYTES, BLOCKS[template])
        [example] = read(tmp_path, tokenizer, {"messages": off})
        assert target_text(example, tokenizer) == expected


def test_a_conversation_without_a_block_is_skipped_where_the_template_has_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = with_template(BYTES, BLOCKS["last only"])
    examples = read(tmp_path, tokenizer, {"messages": LONGER[:5]}, {"messages": LONGER})
    assert len(examples) == 1
    assert "1 of 2 records are skipped" in caplog.text
    with pytest.raises(InputError, match="without `mask_prompt`"):
        read(tmp_path, tokenizer, {"messages": LONGER})


def test_an_answer_that_begins_as_the_generation_prompt_goes_on(tmp_path: Path) -> None:
    """QwQ: the prompt opens <think>, and the answer begins with the same character."""
    template = (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<tool>{{ c.function.name }}</tool>{% endfor %}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n<think>\n{% endif %}"
    )
    tokenizer = with_template(BYTES, template)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    for answer, expected in (
        (CHAT[1] | {"content": "<b>x"}, "<b>x</s>\n"),
        (CHAT[1] | {"content": "<think hard"}, "<think hard</s>\n"),
        (call, "<tool>f</tool></s>\n"),
    ):
        [example] = read(tmp_path, tokenizer, {"messages": [CHAT[0], answer]})
        assert target_text(example, tokenizer) == expected
        halves = {"prompt": CHAT[:1], "completion": [answer]}
        [example] = read(tmp_path, tokenizer, halves)
        assert target_text(example, tokenizer) == expected


def test_the_answer_before_a_last_question_where_the_template_rewrites_turns(tmp_path: Path) -> None:
    """Qwen3: an answer contains <think></think> until a question follows."""
    tokenizer = with_template(BYTES, REWRITING.replace("BEGIN", "").replace("END", ""))
    [example] = read(tmp_path, tokenizer, {"messages": CHAT[:3]})
    assert target_text(example, tokenizer) == "yes</s>"


def test_the_last_answer_where_the_first_lines_depend_on_the_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as a system prompt before the last question, or a date: no prefix is in the text."""
    template = "{{ messages|length }}\n" + REWRITING.replace("BEGIN", "").replace("END", "")
    tokenizer = with_template(BYTES, template)
    [example] = read(tmp_path, tokenizer, {"messages": CHAT})
    assert target_text(example, tokenizer) == "<think></think>no</s>"
    [example] = read(tmp_path, tokenizer, {"messages": [*CHAT[:3], CHAT[3] | {"weight": 0}]})
    assert target_text(example, tokenizer) == "yes</s>"
    off = {"messages": [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[2], CHAT[3] | {"train": False}]}
    with pytest.raises(InputError, match="excludes every message"):
        read(tmp_path, tokenizer, off)


def test_conversations_without_locatable_answers_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = (
        "{% for m in messages %}{{ m.content|length }}{{ messages|length }}{% endfor %}"
        "{{ add_generation_prompt }}"
    )
    tokenizer = with_template(BYTES, template)
    with pytest.raises(
        InputError, match=r"a\.jsonl: the assistant's messages cannot be located .*without `mask_prompt`"
    ):
        read(tmp_path, tokenizer, {"messages": CHAT})
    examples = read(tmp_path, tokenizer, {"messages": CHAT}, {"prompt": "a", "completion": "b"})
    assert len(examples) == 1
    assert "1 of 2 records are skipped" in caplog.text


def test_a_template_that_rejects_a_part_of_a_conversation(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% if loop.last and m.role == 'tool' %}"
        "{{ raise_exception('an answer must follow') }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    messages = [*CHAT[:2], {"role": "tool", "content": "2"}, CHAT[3]]
    [example] = read(tmp_path, with_template(BYTES, template), {"messages": messages})
    assert target_text(example, BYTES) == "no</s>\n"


def test_messages_without_a_chat_template_say_what_to_do(tmp_path: Path) -> None:
    tokenizer = dataclasses.replace(BYTES, chat_templates={})
    with pytest.raises(InputError, match=r"has no chat template, .*chat_template\.jinja") as caught:
        read(tmp_path, tokenizer, {"messages": CHAT})
    assert "--chat-template" not in str(caught.value)
