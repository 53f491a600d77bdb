"""The golden files of tools/make_golden_text.py, and tokenizers made from them."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from einsum_transformer.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"


@lru_cache
def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"text_{name}.json").read_text(encoding="ascii"))


def ggml(**keys: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def byte_level_metadata(pre: str = "smollm", **keys: Any) -> dict[str, Any]:
    return golden("tiny")["byte_level"]["metadata"] | ggml(pre=pre, **keys)


def byte_level(pre: str = "smollm", **keys: Any) -> Tokenizer:
    return Tokenizer.from_gguf(byte_level_metadata(pre, **keys), Path("tiny.gguf"))


def from_golden(name: str, **keys: Any) -> Tokenizer:
    """The golden "sentencepiece" or "unigram" tokenizer."""
    return Tokenizer.from_gguf(golden("tiny")[name]["metadata"] | ggml(**keys), Path("tiny.gguf"))


def write_files(folder: Path, files: Mapping[str, Any]) -> Path:
    """Write each file's text, or its value as JSON."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    decoder = tokenizer.stream(skip)
    return "".join([*(decoder.put(i) for i in ids), decoder.end()])
