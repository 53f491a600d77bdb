"""The options of a chat: what transformers' apply_chat_template does with them, or a one-line refusal."""

import json
from pathlib import Path
from typing import Any

import pytest
from text_golden import byte_level_metadata, golden

from einsum_transformer.errors import InputError
from einsum_transformer.text.tokenizer import Tokenizer

CHATS = golden("folders")["chats"]
HI = [{"role": "user", "content": "Hi"}]


def with_templates(**templates: str) -> Tokenizer:
    keys = {f"tokenizer.chat_template.{name}": text for name, text in templates.items() if name != "default"}
    keys |= {"tokenizer.chat_template": templates["default"]} if "default" in templates else {}
    return Tokenizer.from_gguf(byte_level_metadata() | keys, Path("x.gguf"))


@pytest.mark.parametrize("template", CHATS["templates"])
def test_a_final_message_is_continued_as_transformers_does(template: str, tmp_path: Path) -> None:
    words = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}}
    config = CHATS["named"] | {"chat_template": CHATS["templates"][template]}
    for name, content in (("tokenizer", words), ("tokenizer_config", config)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    for case in CHATS["cases"]:
        if case["template"] != template:
            continue
        options = {"add_generation_prompt": False} | case["options"]
        messages = [CHATS["asked"], CHATS["finals"][case["final"]]]
        if "error" in case:
            with pytest.raises(InputError) as error:
                tokenizer.render_chat(messages, **options)
            assert "\n" not in str(error.value)
        else:
            assert tokenizer.render_chat(messages, **options) == case["text"], case


def test_a_continued_message_needs_no_other_option() -> None:
    tokenizer = with_templates(default=CHATS["templates"]["plain"])
    messages = [*HI, {"role": "assistant", "content": "Sure, I"}]
    ids = tokenizer.apply_chat_template(messages, continue_final_message=True)
    assert tokenizer.decode(ids) == "<user>Hi</user>\n<assistant>Sure, I"
    text = tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    assert text == "<user>Hi</user>\n<assistant>Sure, I"
    with pytest.warns(DeprecationWarning, match="apply_chat_template"):
        assert tokenizer.encode_chat(messages, continue_final_message=True) == ids
    with pytest.raises(InputError, match="continue_final_message and add_generation_prompt"):
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(InputError, match="the last message has no 'content'"):
        tokenizer.apply_chat_template(
            [{"role": "assistant", "tool_calls": [{"name": "f"}]}], continue_final_message=True
        )
    with pytest.raises(InputError, match="changes or omits the last message"):
        tokenizer.apply_chat_template(messages, continue_final_message=True, chat_template="{{ 'content' }}")


@pytest.mark.parametrize(
    "options",
    [
        {"return_dict": True},
        {"return_tensors": "np"},
        {"padding": True},
        {"truncation": True},
        {"max_length": 5},
        {"return_assistant_tokens_mask": True},
        {"tokenizer_kwargs": {"x": 1}},
        {"sanitize_control_tokens": True},
    ],
)
def test_keywords_with_another_meaning_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(options))}"):
        with_templates(default="x").apply_chat_template(HI, **options)


def test_neutral_keywords_are_accepted(caplog: pytest.LogCaptureFixture) -> None:
    neutral = {
        "tokenize": True,
        "return_dict": False,
        "padding": False,
        "truncation": False,
        "max_length": None,
    }
    assert with_templates(default="{{ 'x' }}").render_chat(HI, **neutral) == "x"
    assert caplog.messages == []


def test_what_a_template_does_not_use_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = with_templates(default="{{ messages }}{% if thinking %}{% endif %}{# once #}")
    for _ in range(2):
        tokenizer.render_chat(HI, tools=[{"name": "f"}], enable_thinking=False, thinking=True)
    assert caplog.messages == ["the chat template does not use enable_thinking, tools"]


def test_a_template_is_chosen_by_name_or_given() -> None:
    tokenizer = with_templates(default="{{ 1 }}", rag="{{ 2 }}", tool_use="{{ 3 }}{{ tools }}")
    assert tokenizer.render_chat(HI) == "1"
    assert tokenizer.render_chat(HI, chat_template="rag") == "2"
    assert tokenizer.render_chat(HI, tools=[{}]) == "3[{}]"
    assert tokenizer.render_chat(HI, tools=[], chat_template="default") == "1"
    assert tokenizer.render_chat(HI, chat_template="{{ 4 }}") == "4"
    with pytest.raises(InputError, match=r"'rga' is neither a Jinja template nor the name of one; .*'rag'"):
        tokenizer.render_chat(HI, chat_template="rga")
    assert with_templates().render_chat(HI, chat_template="{{ 4 }}") == "4"


def test_named_templates_without_a_default_are_listed() -> None:
    tokenizer = with_templates(rag="{{ 2 }}", short="{{ 3 }}")
    with pytest.raises(InputError, match=r"choose one of 'rag', 'short' as `chat_template`"):
        tokenizer.apply_chat_template(HI)
    assert tokenizer.render_chat(HI, chat_template="short") == "3"


@pytest.mark.parametrize("default", [True, False])
def test_additional_templates_are_files_of_their_own(default: bool, tmp_path: Path) -> None:
    with_templates(default="{{ 'old' }}").save(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ 'rag' }}")
    if not default:
        (tmp_path / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.from_folder(tmp_path)
    expected = {"rag": "{{ 'rag' }}"} | ({"default": "{{ 'old' }}"} if default else {})
    assert tokenizer.chat_templates == expected
    tokenizer.save(tmp_path / "again")
    assert Tokenizer.from_folder(tmp_path / "again").chat_templates == expected
