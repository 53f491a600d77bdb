"""Write tests/golden/config_keys.json: all keys of transformers' configs of our families, with defaults.

Requires transformers 5.24.0.
"""

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "config_keys.json"
FAMILIES = (
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3",
        "phi",
        "phi3",
        "gpt2",
    ),
    *("gpt_neox", "mpt", "olmo2", "olmo3", "smollm3", "granite", "mixtral", "qwen2_moe", "qwen3_moe"),
    "deepseek_v2",
)


def plain(value: Any) -> Any:
    """The value if it is a JSON scalar, else None."""
    return value if isinstance(value, (int, float, str, bool)) else None


def main() -> None:
    """Write the file."""
    found = {}
    for name in FAMILIES:
        keys = CONFIG_MAPPING[name]().to_dict()
        found[name] = {key: plain(value) for key, value in keys.items() if key != "text_config"}
    GOLDEN.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
