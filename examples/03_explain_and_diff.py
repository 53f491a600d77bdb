"""The equations and costs of a model, and of two models side by side, without any weights.

python examples/03_explain_and_diff.py
"""

import einsum_transformer as et

tokens = 128
llama = et.explain("llama", tokens=tokens, backward=True)  # a packaged config: et.available_configs()
print(f"Llama 3.2 3B: {llama.parameters:,} parameters")
for step in llama.steps:
    if step.path[0] == "forward" and step.role.endswith("_proj"):
        print(f"  {step.role:9} {step.equation:15} {step.flops:.2e} FLOPs in each of {step.times} layers")

# A matrix with n elements costs 2 n FLOPs for each token: a multiplication and an addition.
up_proj = next(step for step in llama.steps if step.role == "up_proj")
assert up_proj.flops == 2 * up_proj.sizes["f"] * up_proj.sizes["d"] * tokens

# The backward pass costs twice the forward pass: a gradient of the input and one of the weight.
forward, backward = llama.totals("forward")["flops"], llama.totals("backward")["flops"]
print(f"backward / forward: {backward / forward:.3f}")
assert abs(backward / forward - 2) < 0.01

# Mixtral has 8 experts in each layer and uses 2 of them for a token.
difference = et.diff("mistral", "mixtral", tokens=tokens)
mistral, mixtral = difference.parameters
print(f"Mixtral / Mistral: {mixtral / mistral:.2f} x the parameters, ", end="")
assert mixtral / mistral > 6
mistral, mixtral = difference.flops
print(f"{mixtral / mistral:.2f} x the FLOPs")
assert mixtral / mistral < 2
# print(llama) lists the whole program, print(difference) all that differs
