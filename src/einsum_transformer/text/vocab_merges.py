"""The files vocab.json and merges.txt of a byte-level BPE, and the class that reads them."""

from collections.abc import Mapping
from typing import Any

from einsum_transformer.errors import InputError
from einsum_transformer.text.classes import class_name, stated_class

_BYTE_LEVEL = ("GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer", "RobertaTokenizer")


def class_of(config: Mapping[str, Any], model: Mapping[str, Any], folder: str) -> str:
    """The tokenizer's class by tokenizer_config.json and config.json; InputError for another one."""
    stated = stated_class(config, model)
    # Where transformers wants a tokenizer.json, a class that can do without one is taken at its word.
    for name in (class_name(config, model, False), stated):
        if name in _BYTE_LEVEL:
            return name
    known = ", ".join(_BYTE_LEVEL)
    what = f"tokenizer_class {stated!r}" if stated is not None else f"model_type {model.get('model_type')!r}"
    raise InputError(
        f"{folder}: vocab.json and merges.txt with {what}: the classes {known} are known; "
        f"convert another one with transformers, AutoTokenizer.from_pretrained({folder!r})"
        f".save_pretrained({folder!r})"
    )


def read_merges(text: str, path: str) -> list[tuple[str, str]]:
    """The pairs of merges.txt, one a line, best first, after a line `#version: ...`."""
    pairs = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise InputError(f"{path}, line {number}: expected two tokens with a space between them")
        pairs.append((parts[0], parts[1]))
    return pairs
