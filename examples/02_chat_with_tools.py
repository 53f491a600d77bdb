"""A conversation, and a tool: its definition in the prompt, the call, the result, the answer.

python examples/02_chat_with_tools.py
"""

import einsum_transformer as et

model = et.load("smollm2-135m")
chat = et.Chat(model, system="Answer in one sentence.", max_new_tokens=16, temperature=0)
for question in ("What is the capital of France?", "And of Italy?"):
    turn = chat.send(question)
    print(f"{turn}  ({turn.cached_tokens} tokens from the KV cache, {turn.prompt_tokens} new)")
assert chat.turns[1].cached_tokens > 0  # a turn computes its new tokens only

# A chat template writes the tools into the prompt. The template of this model does not; this one does.
TEMPLATE = """<|im_start|>system
You are a helpful assistant with these tools:
{% for tool in tools %}
{{ tool.function | tojson }}
{% endfor %}<|im_end|>
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
weather = {"name": "get_weather", "description": "The current weather in a city.", "parameters": city}
settings = {"tools": [{"type": "function", "function": weather}], "chat_template": TEMPLATE}
messages = [{"role": "user", "content": "What is the weather in Paris?"}]
# A model of this size does not call tools by itself: begin its message, so that it fills in the argument.
messages.append({"role": "assistant", "content": '{"name": "get_weather", "arguments": {"city": "'})
start = model.tokenizer.apply_chat_template(messages, continue_final_message=True, **settings)
argument = str(et.generate(model, start, max_new_tokens=8, temperature=0, stop='"'))
assert argument == "Paris"

messages[-1]["content"] += f'{argument}"}}}}'
messages.append({"role": "tool", "content": '{"sky": "sunny", "celsius": 21}'})
prompt = model.tokenizer.apply_chat_template(messages, tokenize=False, **settings)
print(f"{prompt}{et.generate(model, prompt, max_new_tokens=24, temperature=0)}")
