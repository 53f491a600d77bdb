"""Build the tokenizer of a class from vocabulary and merges like the class does in transformers 5.24."""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, PreTokenizer, Sequence, Split
from tokenizers.processors import RobertaProcessing, TemplateProcessing

from einsum_transformer.errors import InputError
from einsum_transformer.text.added_tokens import Specials, bounded_id
from einsum_transformer.text.native import checked
from einsum_transformer.text.pre_tokenizers import QWEN2, QWEN35

_SPACE = "▁"
_WORDS = {"Qwen2Tokenizer": QWEN2, "Qwen3_5Tokenizer": QWEN35}
_COMPOSED = frozenset({"GPTNeoXTokenizer", "CohereTokenizer", *_WORDS})  # classes that normalize text to NFC
_SPELLS_SPACES = frozenset({"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"})


def build_class(
    kind: str, vocab: Mapping[str, Any], merges: list[tuple[str, str]], config: Mapping[str, Any], where: str
) -> Tokenizer:
    """Build the tokenizer of a class without added tokens and post-processor; `where` prefixes errors."""
    ids = _ids(vocab, where)
    backend = Tokenizer(checked(f"{where}: unusable vocabulary", lambda: _model(kind, ids, merges, config)))
    if kind in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    elif kind == "GemmaTokenizer":
        backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.pre_tokenizer = _pre_tokenizer(kind, config)
    _set_decoder(kind, backend, config)
    return backend


def parts_of(text: str, path: str) -> tuple[Tokenizer, dict[str, Any], list[tuple[str, str]]] | None:
    """Split a tokenizer.json into (tokenizer without a vocabulary, vocabulary, merges); None if not a BPE."""
    whole: dict[str, Any] = checked(f"{path}: not a usable tokenizer", lambda: dict(json.loads(text)))
    model = whole.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        return None
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        return None
    empty = whole | {"model": {**model, "type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    shell = checked(f"{path}: not a usable tokenizer", lambda: Tokenizer.from_str(json.dumps(empty)))
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, str) for side in pair):
            raise InputError(f"{path}: model.merges: expected pairs of tokens")
    return shell, vocab, [(left, right) for left, right in pairs]


def builds_another(kind: str, text: str, path: str) -> bool:
    """Whether the class would build a tokenizer that encodes or decodes differently from tokenizer.json."""
    parts = parts_of(text, path)
    if parts is None:
        return True
    shell, vocab, merges = parts
    built, own = (json.loads(one.to_str()) for one in (build_class(kind, vocab, merges, {}, path), shell))
    return any(built[part] != own[part] for part in ("normalizer", "pre_tokenizer", "decoder"))


def finish_class(
    kind: str,
    backend: Tokenizer,
    config: Mapping[str, Any],
    specials: Specials,
    shell: Tokenizer | None,
) -> None:
    """Set the post-processor, which may need added tokens; shell: the first result of `parts_of`, if any."""
    named = {name: str(token) for name, token in specials.named.items()}
    values = (*specials.named.values(), *specials.extra)
    if kind == "Qwen2Tokenizer":
        again = dict.fromkeys(str(value) for value in values)
        backend.add_tokens([AddedToken(text, special=True) for text in again])
    if kind == "CohereTokenizer":
        for value in values:
            token = AddedToken(value) if isinstance(value, str) else value
            token.special = True
            backend.add_special_tokens([token])
    if kind == "RobertaTokenizer":
        sep, cls = (
            (named[name], backend.token_to_id(named[name]) or 0) for name in ("sep_token", "cls_token")
        )
        trims = config.get("trim_offsets") is not False
        backend.post_processor = RobertaProcessing(sep, cls, trims, config.get("add_prefix_space") is True)
        return
    adds = {name: shell is None and config.get(f"add_{name}") is True for name in ("bos_token", "eos_token")}
    adds["bos_token"] |= kind == "CodeLlamaTokenizer"
    own = (
        None if shell is None or kind in ("GPTNeoXTokenizer", "CodeLlamaTokenizer") else shell.post_processor
    )
    if own is not None:
        backend.post_processor = own
        return
    before, after = ([named[name]] if add and name in named else [] for name, add in adds.items())
    _begin_and_end(backend, before, after)


def _begin_and_end(backend: Tokenizer, before: list[str], after: list[str]) -> None:
    pieces = {text: backend.token_to_id(text) for text in (*before, *after)}
    tokens: Any = [{"id": text, "ids": [number], "tokens": [text]} for text, number in pieces.items()]
    backend.post_processor = TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", *after, "$B"], special_tokens=tokens
    )


def _model(kind: str, ids: dict[str, int], merges: list[tuple[str, str]], config: Mapping[str, Any]) -> BPE:
    if kind not in _SPELLS_SPACES:
        return BPE(ids, merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    if kind == "LlamaTokenizer":
        return BPE(ids, merges, fuse_unk=True, byte_fallback=True)
    unknown = config.get("unk_token", "<unk>")
    unknown = unknown.get("content") if isinstance(unknown, Mapping) else unknown
    own = {"unk_token": unknown} if isinstance(unknown, str) else {}
    return BPE(ids, merges, fuse_unk=True, byte_fallback=True, **own)


def _pre_tokenizer(kind: str, config: Mapping[str, Any]) -> PreTokenizer:
    if kind == "GemmaTokenizer":
        return Split(" ", "merged_with_previous", invert=False)
    if kind in _SPELLS_SPACES:
        # If `legacy` is false (the default) or null, no space is added to text after a special token.
        always = kind == "LlamaTokenizer" and config.get("legacy") is True
        scheme = ("always" if always else "first") if _prefixes(config) else "never"
        return Metaspace(_SPACE, scheme, split=False)
    prefix = config.get("add_prefix_space") is True
    if kind in _WORDS:
        split = Split(Regex(_WORDS[kind]), "isolated")
        return Sequence([split, ByteLevel(add_prefix_space=prefix, use_regex=False)])
    byte_level = ByteLevel(add_prefix_space=prefix)
    return Sequence([Digits(individual_digits=True), byte_level]) if kind == "CohereTokenizer" else byte_level


def _set_decoder(kind: str, backend: Tokenizer, config: Mapping[str, Any]) -> None:
    if kind not in _SPELLS_SPACES:
        backend.decoder = decoders.ByteLevel()
        return
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "CodeLlamaTokenizer" or (kind == "LlamaTokenizer" and _prefixes(config)):
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)


def _prefixes(config: Mapping[str, Any]) -> bool:
    return config.get("add_prefix_space") is not False


def _ids(vocab: Mapping[str, Any], path: str) -> dict[str, int]:
    for token, number in vocab.items():
        bounded_id(number, path, token[:50])
    if len(set(vocab.values())) != len(vocab):
        raise InputError(f"{path}: two tokens have the same id")
    return dict(vocab)
