"""The `tokenizer.*` metadata of a GGUF file for a tokenizer: the inverse of `gguf_vocab`.

llama.cpp has its own implementation of each kind of tokenizer. A difference from `tokenizers` that can change
how text is split is reported by a note, or is an error.
"""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from einsum_transformer.errors import InputError
from einsum_transformer.notes import note
from einsum_transformer.text.gguf_vocab import BYTE, CONTROL, NAMES, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from einsum_transformer.text.pre_tokenizers import BEGINS_AND_KEEPS_WORDS, pre_tokenizer
from einsum_transformer.text.pre_tokenizers import NAMES as PRE_TOKENIZERS

_PREFIX = "tokenizer.ggml."
_PER_CATEGORY = 3  # characters of each Unicode category in the text with which pre-tokenizers are compared


def gguf_tokens(
    backend: Tokenizer, named: Mapping[str, str], edges: Mapping[str, bool], size: int, source: str
) -> dict[str, Any]:
    """Return the `tokenizer.ggml.*` metadata. named: special tokens by name; edges: `add_bos_token` and
    `add_eos_token`; size: rows of the embedding, up to which the vocabulary is filled with unused tokens.

    Raises InputError for a tokenizer that GGUF files cannot describe."""
    data = json.loads(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise InputError(
            f"{source}: a tokenizer of type {model['type']} cannot be written as GGUF: only BPE is supported"
        )
    tokens, types = _tokens(backend, model, size, source)
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    kind = _sentencepiece if model.get("byte_fallback") else _byte_level
    found = {"tokens": tokens, "token_type": types} | kind(backend, data, merges, tokens, source)
    ids = {key: backend.token_to_id(named[name]) for name, key in NAMES.items() if name in named}
    found |= {key: token for key, token in ids.items() if token is not None} | dict(edges)
    return {f"{_PREFIX}{key}": value for key, value in found.items()}


def _tokens(
    backend: Tokenizer, model: Mapping[str, Any], size: int, source: str
) -> tuple[list[str], list[int]]:
    """Return the token and the type of each id."""
    vocab = {token_id: token for token, token_id in backend.get_vocab(with_added_tokens=True).items()}
    if vocab and max(vocab) >= size:
        raise InputError(f"{source}: the tokenizer has the id {max(vocab)}, but the embedding {size} rows")
    added = backend.get_added_tokens_decoder()
    tokens: list[str] = []
    types: list[int] = []
    for token_id in range(size):
        token, kind = vocab.get(token_id, f"[PAD{token_id}]"), NORMAL
        if token_id not in vocab:
            kind = UNUSED
        elif token == model.get("unk_token") and model.get("byte_fallback"):
            kind = UNKNOWN
        elif token_id in added:
            kind = CONTROL if added[token_id].special else USER_DEFINED
        elif model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            kind = BYTE
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _byte_level(
    backend: Tokenizer, data: Mapping[str, Any], merges: list[Any], tokens: list[str], source: str
) -> dict[str, Any]:
    if "ByteLevel" not in json.dumps(data.get("pre_tokenizer")):
        raise InputError(
            f"{source}: a BPE that is neither byte-level nor has bytes as tokens cannot be written as GGUF"
        )
    if data.get("normalizer") is not None:
        kinds = data["normalizer"].get("type")
        note(
            f"{source}: GGUF files have no normalizer ({kinds}): programs that load it do not normalize text"
        )
    pre = _pre_tokenizer_name(backend, bool(data["model"].get("ignore_merges")), source)
    return {"model": "gpt2", "pre": pre, "merges": [" ".join(pair) for pair in merges]}


def _pre_tokenizer_name(backend: Tokenizer, keeps_words: bool, source: str) -> str:
    """Return llama.cpp's name of the pre-tokenizer that splits a text of all kinds of characters equally."""
    text = _all_kinds()
    assert backend.pre_tokenizer is not None
    expected = backend.pre_tokenizer.pre_tokenize_str(text)
    for name in PRE_TOKENIZERS:
        other = pre_tokenizer(name)
        if other is None or (name in BEGINS_AND_KEEPS_WORDS) != keeps_words:
            continue
        if other.pre_tokenize_str(text) == expected:
            return name
    raise InputError(
        f"{source}: llama.cpp has no pre-tokenizer that splits text like this tokenizer's, so it cannot be "
        "written as GGUF"
    )


def _all_kinds() -> str:
    """A text with characters of every Unicode category in many contexts, numbers and contractions."""
    kinds: dict[str, list[str]] = {}
    for code in range(0x30000):
        kind = unicodedata.category(chr(code))
        if kind not in ("Cs", "Cn", "Co") and len(found := kinds.setdefault(kind, [])) < _PER_CATEGORY:
            found.append(chr(code))
    some = [each for found in kinds.values() for each in found] + list("aZß日ひ0\n\r\t '/")
    pairs = "".join(f"{a}{b}{b}x {a}" for a in some for b in some)
    words = "I'm you're HE'LL it's we'Ve don'T 1 12 123 1234 x=1.5e-3 a/b  c   d\n\n e \r\n f\t\tg $+<=>^~|"
    return f"{words} {pairs} 北京大学 こんにちは 👍🏽 ﷺ {words}"


def _sentencepiece(
    backend: Tokenizer, data: Mapping[str, Any], merges: list[Any], tokens: list[str], source: str
) -> dict[str, Any]:
    """Vocabularies of SentencePiece: llama.cpp merges the pair whose token has the best score. The score of a
    token is minus the rank of the first merge that forms it."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    steps = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
    prefix = '"Prepend"' in steps or ('"Metaspace"' in steps and '"prepend_scheme": "never"' not in steps)
    found: dict[str, Any] = {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}
    if _reordered(merges, ranks, set(tokens)):
        note(
            f"{source}: its merges are not those of SentencePiece scores: llama.cpp splits some words into "
            "other tokens"
        )
        found["merges"] = [" ".join(pair) for pair in merges]
    return found


def _reordered(merges: Sequence[tuple[str, str]], ranks: Mapping[str, int], tokens: set[str]) -> bool:
    """Whether the merges differ from all pairs of tokens that form a token, in the order of its score."""
    place = 0
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = {
            (token[:cut], token[cut:])
            for cut in range(1, len(token))
            if token[:cut] in tokens and token[cut:] in tokens
        }
        if pairs != set(merges[place : place + len(pairs)]):
            return True
        place += len(pairs)
    return place != len(merges)
