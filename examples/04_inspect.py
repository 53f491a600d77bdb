"""What a checkpoint contains, and why it would not load, from the headers of its files.

python examples/04_inspect.py
"""

import json
import tempfile
from pathlib import Path

import einsum_transformer as et

with tempfile.TemporaryDirectory() as folder:
    et.load("fast_lora", max_layers=2, seed=0).save(folder, dtype="bfloat16")
    found = et.inspect(folder)  # print(found) lists everything
    print(f"{found.model_type}, {found.parameters:,} parameters, bytes: {found.bytes_by_dtype}")
    for tensor in found.tensors[:4]:
        print(f"  {tensor.name}: {tensor.dtype} {tensor.shape}, in the model {tensor.weights[0]}")
    assert found.bytes_by_dtype == {"BF16": 2 * found.parameters}
    assert not found.problems

    # Misspell a key of the config, and let it require a third layer.
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config["rms_norm_epz"] = config.pop("rms_norm_eps")
    config["num_hidden_layers"] = 3
    path.write_text(json.dumps(config))

    found = et.inspect(folder)
    print("ignored: ", ", ".join(found.ignored))
    print("missing: ", len(found.missing), "tensors, such as", found.missing[0])
    assert "rms_norm_epz" in found.ignored
    assert all(name.startswith("model.layers.2.") for name in found.missing)
    message = ""
    try:
        et.load(folder)  # raises the first of found.problems
    except et.InputError as error:
        message = str(error)
    assert found.problems[0] in message
