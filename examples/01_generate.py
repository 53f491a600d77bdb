"""Load the default model, continue a text, look at the next-token scores.

python examples/01_generate.py
"""

import numpy as np

import einsum_transformer as et

model = et.load("smollm2-135m")
for text in ("The capital of France is", "The sky is"):
    print(repr(text), "->", repr(str(et.generate(model, text, max_new_tokens=8, temperature=0))))

assert model.tokenizer is not None
tokens = model.tokenizer.encode("The capital of France is")
scores = model.logits([tokens])[0, -1]
best = np.argsort(scores)[::-1][:5]
print("most probable next tokens:", [model.tokenizer.decode([i]) for i in best])
