"""Find the step at which two models differ: activations of one, compared with those of the other.

python examples/05_parity.py
"""

import tempfile
from pathlib import Path

import numpy as np

import einsum_transformer as et

original = et.load("fast_lora", max_layers=3, seed=0)
tokens = np.arange(1, 17)[None]  # (batch, time)

# A reference is a .npz file of tokens, logits and module outputs under their names in the checkpoint.
# Another program can write it as well: tools/dump_reference.py does for transformers.
with et.Recorder(values="*") as recorder:
    original.logits(tokens)
logits = recorder.values.pop("logits")
modules = {original.module(name): value for name, value in recorder.values.items()}

port = et.load("fast_lora", max_layers=3, seed=0)
name = "model.layers.1.mlp.up_proj.weight"
port.named_parameters()[name][0, 0] += 0.1  # a view of the weight: this changes the model

with tempfile.TemporaryDirectory() as folder:
    reference = Path(folder) / "reference.npz"
    np.savez(reference, tokens=tokens, logits=logits, **modules)
    assert et.parity(original, reference).passed
    found = et.parity(port, reference)

print(found.text(every=False))
assert found.first_diverging is not None
assert found.first_diverging.name == "model.layers.1.mlp"
