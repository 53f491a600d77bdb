"""Inputs of make_golden_text.py: chat templates of well-known models, conversations, and difficult strings."""

# ruff: noqa: E501

from typing import Any

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA2 = """\
{% if messages and messages[0]['role'] == 'system' %}
    {% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {% set rest = messages[1:] %}
{% else %}
    {% set system = '' %}
    {% set rest = messages %}
{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ ' ' + message['content'].strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You have access to the following functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- if messages and messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages if message.role in ("user", "assistant") and not message.tool_calls is defined %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, conversation roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] " + message.tool_calls | map(attribute="function") | list | tojson + eos_token }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + "}[/TOOL_RESULTS]" }}
    {%- endif %}
{%- endfor %}
"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

GEMMA = """\
{{ bos_token }}{% if messages and messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}\
{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

GEMMA3 = """\
{{ bos_token }}
{%- for message in messages -%}
    {{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

PHI3 = """\
{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}\
{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}\
{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

QWEN2 = """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}
{% generation %}{% set text = message['content'] ~ '<|im_end|>' %}{{ text }}{% endgeneration %}
{% else %}{{ message['content'] ~ '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages and messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string
        and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {%- if call.arguments is string %}{{- call.arguments }}
            {%- else %}{{- call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

FEATURES = """\
{# what else templates are made of #}
{%- macro text_of(content, upper=false) -%}
  {%- if content is string %}{{ content|upper if upper else content }}{% else %}{{ content|map(attribute='text')|join(' + ') }}{% endif -%}
{%- endmacro %}
{%- set ns = namespace(total=0, seen=[]) -%}
{%- for message in messages %}
  {%- if message.role == 'system' %}{% continue %}{% endif %}
  {%- if loop.index > 4 %}{% break %}{% endif %}
  {%- set ns.total = ns.total + (text_of(message.content)|length if message.content else 0) %}
  {%- set ns.seen = ns.seen + [message.role] %}
{{ loop.index }}/{{ loop.length }} {{ message.role|capitalize }}: {{ text_of(message.content, upper=loop.first) }}
{% endfor -%}
{{ ns.seen|unique|sort|join(',') }} {{ ns.total }} {{ '%05d|%-4s|%.2f'|format(ns.total, 'ab', 1.5) }} {{ '{:>4}'.format(7) }}
{%- set block %}{% filter trim %}   kept   {% endfilter %}{% endset %}
{{ block ~ '|' ~ ('a,b,,c'.split(',')|reject('equalto', '')|list) ~ {'k': [1, 2.5, none, true]}|tojson }}
{{ {'b': '<é&>', 'a': [1]}|tojson(indent=2) }}{{ [3, 1, 2]|sort|reverse|list }} {{ 7 // 2 }} {{ 2 ** 10 }} {{ 'ab' * 3 }}
{{ 'x'|indent(4, first=true) }} {{ 'a-b'.replace('-', '+') }} {{ dict(a=1) }} {{ messages|length }} {{ (1, 2) + (3,) }}
{{ 'no' if messages is not defined else 'yes' }} {{ undefined_name|default('fallback') }} {{ [1, 2, 3]|sum }} {{ range(3)|list }}
{%- for key, value in {'x': 1, 'y': 2}.items() %} {{ key }}={{ value }}{{ '' if loop.last else ';' }}{% else %}none{% endfor %}
{%- call text_of('called') %}{% endcall %}{% raw %} {{ raw }} {% endraw %}{{ bos_token }}{{ eos_token }}{{ pad_token }}"""

TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "gemma": GEMMA,
    "gemma3": GEMMA3,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "features": FEATURES,
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter für einen Ort & <Tag>",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [{"role": "user", "content": "What is an einsum?"}],
    "system": [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Hello"},
    ],
    "turns": [
        {"role": "system", "content": " Be kind.\n"},
        {"role": "user", "content": "  1 + 1?  \n"},
        {"role": "assistant", "content": "\n2\n"},
        {"role": "user", "content": "{{ 'injected' }} {% raw %} <|im_end|> & <b> \"quoted\" 'single'"},
    ],
    "unicode": [
        {"role": "user", "content": "日本語 👩‍👩‍👧‍👦 é\u0301 \u200b\t\r\n x"},
        {"role": "assistant", "content": "Ünïcode — ok \U0001f9ea"},
    ],
    "reasoning": [
        {"role": "user", "content": "Think"},
        {"role": "assistant", "reasoning_content": "hmm\n", "content": "Done"},
    ],
    "think tag": [
        {"role": "user", "content": "Think"},
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\nDone"},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
    ],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"sky": "blue"}'},
        {"role": "assistant", "content": "Blue."},
    ],
    "not alternating": [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
    ],
}

STRINGS = [
    "",
    " ",
    "  ",
    "   leading",
    "trailing   ",
    "a  b   c    d",
    "\n",
    "\n\n\n",
    "\t\ttabs\tand spaces \t ",
    "\r\n line ends\r\n\r\n",
    "Hello, world!",
    "hello HELLO Hello hElLo",
    "The capital of France is Paris.",
    "I'm you're he'll she'd we've it's don't CAN'T I'M 'tis ''quotes''",
    "0",
    "1234567890",
    "3.14159 1,000,000 1e-10 0x1F 007",
    "2024-07-26T09:30:00Z",
    "x1y22z333 4444a 55555 666666",
    "½ ² ٣٤ Ⅷ १२३",
    "!!! ??? ... ,,, ;;; --- ___ === ***",
    "a,b;c:d.e!f?g(h)i[j]k{l}m<n>o/p\\q|r~s`t@u#v$w%x^y&z*",
    "def f(x):\n    return x ** 2  # square\n",
    'if (a != b && c >= "d\\n") { return {key: [1, 2]}; }',
    "https://example.org/path?q=1&r=a%20b#frag",
    "user@example.com C:\\temp\\file.txt ~/.bashrc",
    "<div class='a'>&nbsp;</div><!-- c -->",
    "SELECT * FROM t WHERE x='y';",
    "\\frac{a}{b} \\sum_{i=0}^{n} $x^2$",
    "café naïve Zürich smørrebrød façade",
    "cafe\u0301 n\u0303 combining e\u0301\u0327 a\u030a",
    "Привет, мир! Как дела?",
    "Γειά σου Κόσμε",
    "שלום עולם مرحبا بالعالم",
    "नमस्ते दुनिया",
    "你好，世界！今天天气怎么样？",
    "日本語のテキスト、カタカナ。ひらがな",
    "안녕하세요 세계",
    "สวัสดีชาวโลก",
    "😀😃 🎉",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇨🇭",
    "a\u200bb\u200dc\ufeffd\u00a0e\u2009f\u3000g",
    "\x00\x01\x07\x1b[0m\x7f",
    "\u0085\u2028\u2029",
    "\ufffd\ufffe\U0010ffff \U0001d400\U0001d7d8",
    "ﬁ ﬂ ＡＢＣ １２３ ｶﾅ",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|endoftext|>",
    "text<|im_end|>text",
    " <|im_end|> ",
    "<|im_end| > <|im_",
    "<s> </s> <unk> <tool> <think> <|begin|> [INST]",
    "<0x41> <0xE4> ▁ ▁▁ Ġ Ċ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "abababababababab",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "MixedCaseIdentifier snake_case_name SCREAMING_CASE kebab-case-name",
    "a" + " " * 40 + "b",
    "\n \n  \n   \n",
    "word\u0301 \u0301alone",
    "'\u2019s it\u2019s \u201cquoted\u201d \u2018single\u2019 \u2014 \u2013 \u2026",
    "𐍈𐌰 𝕳𝖊𝖑𝖑𝖔 ℵ∀∃∈ ≤≥≠ →←↔",
]

PRE_STRINGS = [
    "Hello, world! It's 2024; I'LL pay $1,234.56 (or 12345678).",
    "a  b   c\n\n\n  d \t e\r\n\r\nf  ",
    "don't DON'T we've' 'tis ''x'' l'école",
    "x1y22z333 4444a 55555 ½² Ⅷ ٣٤",
    "你好，世界！日本語のテキスト。カタカナ 안녕하세요",
    "Привет МИР camelCaseWord HTTPServer ÀÉî ǅ ƻ ʰ",
    "cafe\u0301 नमस्ते e\u0301\u0327 \u0301alone",
    "def f(x):\n    return {x: [1, 2]}  # ok!!! ==>\n\t\tend\n",
    "👩‍👩‍👧 🎉!? …“quoted”— <|im_end|> <think>x</think>   y",
    "...)\n\n\n(!!\n/path/to\r\n\r\n \n \u00a0\u3000z~`^|+=<>$",
]

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "It's a fine day; I'll walk to the market, and you'll stay where you're needed. We've 12 apples and 345 pears.",
    "def square(x):",
    "    return x ** 2  # the product of x and x",
    "for index in range(10):",
    "    print(index, square(index))",
    "In 2024 there were 1,234,567 of them; in 1999 only 42.",
    "A matrix times a vector is a sum of products: y[i] = sum over j of a[i, j] * x[j].",
    "The equation names every axis with one letter, and a letter that is not in the output is summed.",
    "    indented   text  with   runs of    spaces",
    "Zürich café naïve smørrebrød façade",
    "Привет, мир! Здравствуй, мир.",
    "你好，世界！日本語のテキスト。",
    "Hello, hello! HELLO? (hello) [hello] {hello} <hello>",
    "the then them these there their they thing think this that those through thought",
    "sing singing sung walk walking walked talk talking talked jump jumping jumped",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 100 1000",
]
