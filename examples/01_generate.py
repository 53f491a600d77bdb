"""Load the default model, generate and stream text, and look at the next-token logits.

python examples/01_generate.py
"""

import numpy as np

import einsum_transformer as et

model = et.load("smollm2-135m")  # also: a Hugging Face folder or hub id, a .gguf file, a config
assert model.tokenizer is not None

# temperature=0 is greedy decoding; str() of a Generation is its text.
print(et.generate(model, "The capital of France is", max_new_tokens=8, temperature=0))

# stream yields the text in pieces, as it is generated.
for piece in et.stream(model, "The sky is", max_new_tokens=8, temperature=0):
    print(piece, end="|", flush=True)
print()

# logits: (batch, time, vocabulary). The last position predicts the next token.
tokens = model.tokenizer.encode("The capital of France is")
logits = model.logits([tokens])[0, -1]
probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
best = np.argsort(logits)[::-1][:5]
for token in best:
    print(f"{model.tokenizer.decode([token])!r:10} {probabilities[token]:.3f}")
assert model.tokenizer.decode([best[0]]) == " Paris"
