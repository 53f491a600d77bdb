"""A conversation, and a tool: its definition in the prompt, the call, the result, the answer.

python examples/02_chat_with_tools.py
"""

import einsum_transformer as et

model = et.load("smollm2-135m")
tokenizer = model.tokenizer
assert tokenizer is not None

chat = et.Chat(model, system="Answer in one sentence.", max_new_tokens=16, temperature=0)
for question in ("What is the capital of France?", "And of Italy?"):
    turn = chat.send(question)
    print(f"{turn}  ({turn.cached_tokens} tokens from the KV cache, {turn.prompt_tokens} new)")
assert chat.turns[1].cached_tokens > 0  # a turn computes its new tokens only

# A chat template writes tools into the prompt. The template of this model does not; this one does.
template = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% if loop.first %}{% for tool in tools %}
Tool: {{ tool.function | tojson }}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
tools = [{"type": "function", "function": {"name": "get_weather", "parameters": city}}]
messages = [{"role": "user", "content": "What is the weather in Paris?"}]
print(tokenizer.apply_chat_template(messages, tools, chat_template=template, tokenize=False))

# A model of this size does not call tools by itself: begin its message, so that it fills in the argument.
messages.append({"role": "assistant", "content": '{"name": "get_weather", "arguments": {"city": "'})
start = tokenizer.apply_chat_template(messages, tools, chat_template=template, continue_final_message=True)
argument = str(et.generate(model, start, max_new_tokens=8, temperature=0, stop='"'))
assert argument == "Paris"

messages[-1]["content"] += f'{argument}"}}}}'
messages.append({"role": "tool", "content": '{"sky": "sunny", "celsius": 21}'})
prompt = tokenizer.apply_chat_template(messages, tools, chat_template=template)
print(messages[-2]["content"], "->", et.generate(model, prompt, max_new_tokens=24, temperature=0))
