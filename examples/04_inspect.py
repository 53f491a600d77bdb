"""What a checkpoint contains, and why it would not load, from the headers of its files.

python examples/04_inspect.py
"""

import json
import tempfile
from pathlib import Path

import einsum_transformer as et

with tempfile.TemporaryDirectory() as folder:
    et.load("fast_lora", max_layers=2, seed=0).save(folder, dtype="bfloat16")
    print(et.inspect(folder))
    assert not et.inspect(folder).problems

    # A misspelled key is ignored, and a config with a third layer has no weights for it.
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config["rms_norm_epz"] = config.pop("rms_norm_eps")
    config["num_hidden_layers"] = 3
    path.write_text(json.dumps(config))

    found = et.inspect(folder)
    print("\nignored: ", *found.ignored)
    print("missing: ", len(found.missing), "tensors, such as", found.missing[0])
    print("problems:", *found.problems)
    assert "rms_norm_epz" in found.ignored and found.missing[0].startswith("model.layers.2.")
    try:
        et.load(folder)
    except et.InputError as error:
        print("load:    ", error)
    else:
        raise AssertionError("load accepts what inspect rejects")
