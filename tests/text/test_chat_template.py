"""Chat templates: the texts transformers makes, and templates that attack the program or its user's time."""

import contextlib
import datetime
import json
import sys
import threading
from typing import Any

import pytest
from text_golden import golden

from einsum_transformer.errors import InputError
from einsum_transformer.text import sandbox
from einsum_transformer.text.chat_template import render_chat_spans

MESSAGES = [{"role": "user", "content": "hi"}]
PLAIN: dict[str, Any] = {"add_generation_prompt": False, "seconds": 10.0}


def render(template: str, messages: Any = MESSAGES, **options: Any) -> str:
    options = {"add_generation_prompt": True, "seconds": 10.0, **options}
    return render_chat_spans(template, messages, **options)[0]


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return datetime.datetime.fromisoformat(golden("chat")["now"])


@pytest.mark.parametrize("template", golden("chat")["templates"])
def test_as_transformers_renders(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "datetime", Clock)
    for case in golden("chat")["cases"]:
        if case["template"] != template:
            continue
        messages = golden("chat")["conversations"][case["conversation"]]
        options: dict[str, Any] = {
            "add_generation_prompt": case["prompt"],
            "tools": golden("chat")["tools"] if case["conversation"].startswith("tools") else None,
            "bos_token": "<s>",
            "eos_token": "</s>",
        }
        if "text" in case:
            assert render(golden("chat")["templates"][template], messages, **options) == case["text"], case
        else:
            with pytest.raises(InputError) as error:
                render(golden("chat")["templates"][template], messages, **options)
            assert case["error"] in str(error.value), case


HUGE = "creates a value of more than"
SLOW = "ran for more than"
UNSAFE = "unsafe|format fields|undefined|underscore|not safely callable|no attribute"
GROW = "{% set ns = namespace(a=START) %}{% for i in range(100) %}{% set ns.a = STEP %}{% endfor %}{{ ns.a }}"


def grow(start: str, step: str) -> str:
    return GROW.replace("START", start).replace("STEP", step)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 10**9 }}", HUGE),
        ("{{ 10**9 * 'a' }}", HUGE),
        ("{{ [1] * 10**9 }}", HUGE),
        ("{{ (1,) * 10**9 }}", HUGE),
        ("{{ 9 ** (10**9) }}", HUGE),
        ("{{ 9 ** 9000 * 9 ** 9000 }}", HUGE),
        ("{{ 'a'|center(10**9) }}", HUGE),
        ("{{ 'a'.center(10**9) }}", HUGE),
        ("{{ ('a'|attr('ljust'))(10**9) }}", HUGE),
        ("{{ ['a']|map('center', 10**9)|list }}", HUGE),
        ("{{ '\t'.expandtabs(10**9) }}", HUGE),
        ("{{ 'a'.zfill(10**9) }}", HUGE),
        ("{{ 'a'|indent(10**9) }}", HUGE),
        ("{{ [1]|tojson(indent=10**9) }}", HUGE),
        ("{{ [1]|batch(10**9, 0)|list }}", HUGE),
        ("{{ [1]|slice(10**9)|list }}", HUGE),
        ("{{ 1.5|round(10**9, 'ceil') }}", HUGE),
        ("{{ '%1000000000d' % 1 }}", HUGE),
        ("{{ '%.1000000000f' % 1 }}", HUGE),
        ("{{ '%(a)1000000000s' % {'a': 1} }}", HUGE),
        ("{{ '%*d' % (10**9, 1) }}", HUGE),
        ("{{ ('%99999d' * 100)|format(*range(100)|list) }}", HUGE),
        ("{{ '{:1000000000}'.format(1) }}", HUGE),
        ("{{ '{:{}}'.format(1, 10**9) }}", HUGE),
        ("{{ ('{0}' * 1000).format('a' * 10000) }}", HUGE),
        ("{{ '{a:1000000000}'.format_map({'a': 1}) }}", HUGE),
        ("{{ ('a' * 9999)|replace('a', 'b' * 9999) }}", HUGE),
        ("{{ ('a' * 9999).replace('a', 'b' * 9999) }}", HUGE),
        ("{{ ('a' * 9999)|join('b' * 9999) }}", HUGE),
        ("{{ ('b' * 9999).join('a' * 9999) }}", HUGE),
        ("{{ ('a' * 9999).translate({97: 'b' * 9999}) }}", HUGE),
        ("{{ ('a' * 900000).strip('b' * 90000) }}", HUGE),
        ("{{ ('a' * 900000)|trim('b' * 90000) }}", HUGE),
        ("{{ ('<' * 900000)|escape }}", HUGE),
        ("{{ strftime_now('%Y' * 9999) }}", HUGE),
        (grow("'x'", "ns.a ~ ns.a"), HUGE),
        (grow("'x'", "ns.a + ns.a"), HUGE),
        (grow("2", "ns.a * ns.a"), HUGE),
        (grow("[1]", "[ns.a, ns.a]"), HUGE),
        (grow("{}", "{'a': ns.a, 'b': ns.a}"), HUGE),
        (grow("(1,)", "(ns.a, ns.a)"), HUGE),
        (grow("[1]", "dict(a=ns.a, b=ns.a)"), HUGE),
        (grow("(1,)", "(ns.a,)"), "more than 100 levels"),
        ("{% set x %}{% for i in range(99999) %}long enough text{% endfor %}{% endset %}", HUGE),
        (
            "{% set x %}{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endset %}",
            "characters in total",
        ),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "writes more than"),
        ("{% set s = 'a' * 99999 %}{% for i in range(99999) %}{% set x = s[1:] %}{% endfor %}", "in total"),
        (
            "{% set l = ['a' * 99999] %}{% set x %}{% for i in range(1500) %}{{ l }}{% endfor %}{% endset %}",
            "in total",
        ),
        ("{{ range(10**12)|list }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ " + "(" * 9999 + " }}", "recursion|too many"),
        ("{# " + "x" * 300_000 + " #}", "characters long"),
        ("{{ 'a'.encode() }}", "'encode' is not supported"),
        ("{{ (1).to_bytes(10**9, 'big') }}", "'to_bytes' is not supported"),
        ("{{ (('<!---->' * 99999)|safe).striptags() }}", "'striptags' is not supported"),
        ("{{ ('{_a}' * 1000).format(_a='a' * 10000) }}", HUGE),
        (
            "{% set n = namespace(a='a' * 9999) %}{{ ('{0.a}' * 9999).format(n) }}",
            "in format fields are not supported",
        ),
        ("{% set n = namespace(a='a' * 9999) %}{{ ([n] * 9999)|join(attribute='a') }}", HUGE),
        ("{% set n = namespace(a='a' * 9999) %}{{ ([n] * 9999)|map(attribute='a')|list }}", HUGE),
        ("{{ 'a'|center(999999) }}" * 200, "writes more than"),
    ],
)
def test_memory_bombs_are_refused(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set ns = namespace(n=0) %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{% endfor %}",
        "{% for a in [0] recursive %}{{ loop([0, 0]) if loop.depth < 60 }}{% endfor %}",
        "{{ ([[0]] * 90000)|sum(start=[]) }}",
        "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + [i] %}{% endfor %}",
        "{% for a in range(99999) %}{{ '' }}{{ range(99999)|map('string')|list|length and '' }}{% endfor %}",
    ],
)
def test_endless_templates_are_stopped(template: str) -> None:
    with pytest.raises(InputError, match=SLOW):
        render(template, seconds=0.1)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ joiner.__init__.__globals__.os.system('true') }}",
        "{{ lipsum.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{{ namespace({'__class__': 1}) }}",
        "{{ dict.__call__.__globals__ }}",
        "{{ range.__globals__.sys }}",
        "{{ strftime_now.__globals__.sys }}",
        "{{ raise_exception.__globals__.sys }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages.__class__.append(messages, 1) }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ '{0[__class__].__mro__}'.format('') }}",
        "{{ ('{0.__class__.__mro__}'|attr('format'))(1) }}",
        "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ ['']|map(attribute='__class__.__mro__')|list|first|length }}",
        "{% macro m() %}{% endmacro %}{{ m.__globals__.x }}",
        "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
        "{{ (messages|map('upper')).gi_frame.f_globals }}",
    ],
)
def test_no_way_out_of_the_sandbox(template: str) -> None:
    with pytest.raises(InputError, match=UNSAFE):
        render(template)


def test_reaching_for_internals_gives_nothing() -> None:
    for template in (
        "{{ self._TemplateReference__context }}",
        "{{ ''|attr('__class__') }}",
        "{{ range.__globals__ }}",
    ):
        assert render(template) == ""
    given = json.loads(json.dumps(MESSAGES))
    render("{% set messages = messages + [1] %}{% set x = dict(messages[0], role='x') %}", given)
    assert given == MESSAGES


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "line 1: Expected an expression"),
        ("ok\n\n{% for x in y %}", "line 3: Unexpected end"),
        ("a\n{{ x|no_such_filter }}", "line 2: No filter named 'no_such_filter'"),
        ("{{ 'a' + 1 }}", "TypeError: can only concatenate"),
        ("{{ messages[0].content.x.y }}", "no attribute 'x'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'other' %}", "no loader"),
        ("{{ raise_exception('two\nlines') }}", "chat template: two lines"),
        ("{{ raise_exception(messages) }}", "'content': 'hi'"),
    ],
)
def test_wrong_templates(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        render(template)
    assert "\n" not in str(error.value)


TEXT = {"role": "user", "content": "x"}
DEEP: Any = "x"
for _ in range(200):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("text", "messages: expected a list"),
        ([], "messages: empty"),
        ({"role": "user"}, "messages: expected a list"),
        ([TEXT, "text"], r"messages\[1\]: expected a dict"),
        ([TEXT, {"content": "x"}], r"messages\[1\]: 'role' must be a string"),
        ([{"role": 1, "content": "x"}], r"messages\[0\]: 'role' must be a string .* got 1"),
        ([TEXT, TEXT, {"role": "user"}], r"messages\[2\]: 'content' must be a string or a list"),
        ([{"role": "user", "content": 5}], r"messages\[0\]: 'content' must be .* got int"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\]: expected {'type': 'text'"),
        ([{"role": "user", "content": [{"type": "image", "text": ""}]}], r"content\[0\]: expected"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]: expected"),
        ([TEXT | {"extra": object()}], r"messages\[0\].extra: expected a JSON value, got object"),
        ([TEXT | {"extra": [{1: 2}]}], r"messages\[0\].extra\[0\]: keys must be strings, got 1"),
        ([TEXT | {"extra": DEEP}], "nested more than 90 levels"),
    ],
)
def test_wrong_messages(messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render("x", messages)


def test_a_tool_call_needs_no_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    template = "{% for m in messages %}{{ m.content or m.tool_calls[0].function.name }} {% endfor %}"
    assert render(template, [TEXT, call]) == "x f "


def test_reasoning_is_given_under_the_names_templates_know() -> None:
    template = "{{ messages[0].thinking }} {{ messages[0].reasoning_content }}"
    for name in ("reasoning", "thinking", "reasoning_content"):
        assert render(template, [TEXT | {name: "r"}]) == "r r"


def test_tools_documents_and_variables() -> None:
    template = (
        "{{ tools[0].name }} {{ documents[0].title }} {{ depth }} {{ undefined_name }}|{{ tools|tojson }}"
    )
    text = render(template, tools=[{"name": "f"}], documents=[{"title": "T"}], depth=3)
    assert text == 'f T 3 |[{"name": "f"}]'
    with pytest.raises(InputError, match="tools: expected a list of JSON objects"):
        render(template, tools=[print])
    with pytest.raises(InputError, match=r"variables\.depth: expected a JSON value, got function"):
        render(template, depth=test_tools_documents_and_variables)


def test_limits_are_arguments() -> None:
    assert render("{{ 'a' * 100 }}", max_chars=100) == "a" * 100
    with pytest.raises(InputError, match="more than 99 characters"):
        render("{{ 'a' * 100 }}", max_chars=99)


def test_long_conversations_fit() -> None:
    messages = [{"role": "user", "content": f"{index} " + "word " * 400} for index in range(300)]
    text = render(golden("chat")["templates"]["qwen3"], messages)
    assert all(message["content"] in text for message in messages)


@pytest.mark.parametrize("template", ["{{ messages }}", "{{ 1 / 0 }}", "{% if %}", "{{ 'a' * 10**9 }}"])
def test_the_callers_trace_function_is_restored(template: str) -> None:
    def trace(frame: Any, event: str, argument: Any) -> Any:
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(InputError):
            render(template)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


def test_threads_have_limits_of_their_own() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    errors: list[str] = []

    def run() -> None:
        try:
            render(endless, seconds=0.2)
        except InputError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert render("{{ messages[0].content }}") == "hi"
    for thread in threads:
        thread.join()
    assert len(errors) == 3
    assert all(SLOW in error for error in errors)


def test_generation_blocks_give_their_characters() -> None:
    """transformers' return_assistant_tokens_mask: the characters that the blocks wrote."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    answers = [{"role": "assistant", "content": "ä b"}, {"role": "assistant", "content": ""}]
    text, spans = render_chat_spans(template, [*MESSAGES, answers[0], *MESSAGES, answers[1]], **PLAIN)
    assert text == "<user>hi<assistant>ä b</s><user>hi<assistant></s>"
    assert [text[first:end] for first, end in spans] == ["ä b</s>", "</s>"]
    broken = "{% for m in messages %}{% generation %}x{% break %}{% endgeneration %}{% endfor %}y"
    assert render_chat_spans(broken, MESSAGES, **PLAIN) == ("xy", [])
    assert render_chat_spans("{{ messages[0].content }}", MESSAGES, **PLAIN) == ("hi", [])
