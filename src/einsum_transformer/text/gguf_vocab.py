"""Build a `tokenizers.Tokenizer` from GGUF metadata: byte-level BPE, SentencePiece BPE and unigram.

Keys and their meaning follow the GGUF specification and llama.cpp's `llama-vocab.cpp`. Every count, id and
merge is checked before use.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE, Unigram

from einsum_transformer.errors import InputError
from einsum_transformer.notes import note
from einsum_transformer.text.config_keys import note_gguf_keys
from einsum_transformer.text.native import checked
from einsum_transformer.text.pre_tokenizers import BEGINS_AND_KEEPS_WORDS, pre_tokenizer

T = TypeVar("T")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # the specification's spelling
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
MAX_PIECE = 1024  # characters; splitting a token at every position is quadratic in its length


@dataclass(frozen=True, slots=True)
class GgufVocab:
    """A tokenizer without its post-processor, and the special ids and flags of the metadata."""

    backend: Tokenizer
    named: Mapping[str, str]
    """Special tokens by their names in chat templates."""
    turn_end_ids: tuple[int, ...]
    edges: Mapping[str, bool]
    """`add_bos_token` and `add_eos_token`."""
    refusal: str | None = None
    """Why text cannot be encoded; None if it can."""


class Metadata:
    """Reads and checks `tokenizer.ggml.*` keys; every error names the file and the key."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.source: str = source
        self.out_of_range: dict[str, int] = {}
        self.tokens: list[str] = self.texts("tokens")
        types = self.numbers("token_type", np.int64)
        self.types: np.ndarray = np.full(len(self.tokens), NORMAL) if types is None else types
        if self.types.min() < NORMAL or self.types.max() > BYTE:
            raise self.error("token_type", f"values must be {NORMAL} to {BYTE}")
        self.ids: dict[str, int] = dict(zip(self.tokens, range(len(self.tokens))))
        if len(self.ids) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise self.error("tokens", f"token {twice!r} occurs twice")

    def error(self, key: str, problem: str) -> InputError:
        return InputError(f"{self.source}: tokenizer.ggml.{key}: {problem}")

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self._values.get(f"tokenizer.ggml.{key}", default)
        if value is not default and not isinstance(value, kind):
            raise self.error(key, f"expected {kind.__name__}, got {type(value).__name__}")
        return value

    def has(self, key: str) -> bool:
        return f"tokenizer.ggml.{key}" in self._values

    def texts(self, key: str) -> list[str]:
        value = self._values.get(f"tokenizer.ggml.{key}", ())
        texts = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(texts, Sequence) or not texts or set(map(type, texts)) != {str}:
            raise self.error(key, "missing, empty or not a list of strings")
        return list(texts)

    def numbers(self, key: str, dtype: type) -> np.ndarray | None:
        """Return one number per token, or None if the key is absent."""
        if not self.has(key):
            return None
        try:
            numbers = np.asarray(self._values[f"tokenizer.ggml.{key}"], dtype)
        except (TypeError, ValueError, OverflowError):
            raise self.error(key, "not a list of numbers") from None
        if numbers.shape != (len(self.tokens),) or not np.isfinite(numbers).all():
            raise self.error(
                key, f"{numbers.size} values, expected {len(self.tokens)} finite values, one per token"
            )
        return numbers

    def id(self, key: str, default: int | None = None) -> int | None:
        """Return the token id, or `default` if it is missing or invalid; None without a valid default."""
        if not self.has(key):
            return default if default is not None and default < len(self.tokens) else None
        value = self._values[f"tokenizer.ggml.{key}"]
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise self.error(key, f"{value!r} is not a token id below {len(self.tokens)}")
        if 0 <= value < len(self.tokens):
            return int(value)
        if key not in self.out_of_range:
            self.out_of_range[key] = int(value)
        return default if default is not None and default < len(self.tokens) else None

    def of_type(self, *types: int) -> list[int]:
        return np.flatnonzero(np.isin(self.types, types)).tolist()


def has_gguf_tokenizer(values: Mapping[str, Any], source: str) -> bool:
    """Whether GGUF metadata describes a supported tokenizer; a note names one that is not supported."""
    model = values.get("tokenizer.ggml.model")
    if model in (None, "none", "no_vocab"):
        return False
    if isinstance(model, str) and model in _BUILDERS:
        return True
    note(f"{source}: {_not_supported(model)}, so the model accepts token ids only, not text")
    return False


def _not_supported(model: Any) -> str:
    return f"tokenizer.ggml.model {model!r:.60} is not supported (supported: {', '.join(_BUILDERS)})"


def read_gguf_vocab(values: Mapping[str, Any], source: str) -> GgufVocab:
    """Build the tokenizer from GGUF metadata; raises InputError that names `source` and the key."""
    model = values.get("tokenizer.ggml.model")
    build = _BUILDERS.get(model) if isinstance(model, str) else None
    if build is None:
        raise InputError(f"{source}: {_not_supported(model)}")
    data = Metadata(values, source)
    vocab = build(data)
    note_gguf_keys(values, source)
    if data.out_of_range:
        ids = ", ".join(f"tokenizer.ggml.{key} = {value}" for key, value in data.out_of_range.items())
        note(f"{source}: not used, since the vocabulary has {len(data.tokens)} tokens: {ids}")
    for name in ("bos", "eos"):
        wanted = vocab.edges[f"add_{name}_token"]
        if wanted and f"{name}_token" not in vocab.named and f"{name}_token_id" not in data.out_of_range:
            raise InputError(
                f"{source}: tokenizer.ggml.add_{name}_token is true, but {name}_token_id is missing"
            )
    return vocab


def _finish(
    data: Metadata,
    backend: Tokenizer,
    defaults: Mapping[str, int],
    add_bos: bool = False,
    add_eos: bool = False,
) -> GgufVocab:
    """Read the special ids, and register the control and user-defined tokens, which are matched in text."""
    ids = {name: data.id(key, defaults.get(key)) for name, key in NAMES.items()}
    named = {name: data.tokens[token_id] for name, token_id in ids.items() if token_id is not None}
    ends = [token_id for name in ("eot_token_id", "eom_token_id") if (token_id := data.id(name)) is not None]
    stated = {token_id for key in NAMES.values() if (token_id := data.id(key)) is not None}
    special = {*data.of_type(CONTROL, UNKNOWN), *ends, *stated}
    added = [*sorted(special), *(index for index in data.of_type(USER_DEFINED) if index not in special)]
    tokens = [AddedToken(data.tokens[index], special=index in special, normalized=False) for index in added]
    checked(f"{data.source}: tokenizer.ggml.token_type", lambda: backend.add_tokens(tokens))
    edges = {
        "add_bos_token": data.get("add_bos_token", bool, add_bos and "bos_token" in named),
        "add_eos_token": data.get("add_eos_token", bool, add_eos and "eos_token" in named),
    }
    return GgufVocab(backend, named, tuple(ends), edges)


def _byte_level_bpe(data: Metadata) -> GgufVocab:
    name = data.get("pre", str, None)
    if name is None:
        name = "default"
        note(f"{data.source}: no tokenizer.ggml.pre, so text is split like llama.cpp's 'default'")
    splits, refusal = pre_tokenizer(name), None
    if splits is None:
        refusal = (
            f"tokenizer.ggml.pre: {name!r} is not a known pre-tokenizer; without it, text would be split "
            "into wrong tokens, so give token ids (--tokens)"
        )
        note(f"{data.source}: tokenizer.ggml.pre {name!r} is not known, so text cannot be encoded")
    keeps_words = name in BEGINS_AND_KEEPS_WORDS
    merges = _split_merges(data)
    backend = Tokenizer(_built(data, lambda: BPE(data.ids, merges, ignore_merges=keeps_words)))
    if splits is not None:
        backend.pre_tokenizer = splits
    backend.decoder = decoders.ByteLevel()
    return replace(_finish(data, backend, {}, add_bos=keeps_words), refusal=refusal)


def _sentencepiece_bpe(data: Metadata) -> GgufVocab:
    defaults = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    unknown = data.id("unknown_token_id", defaults["unknown_token_id"])
    merges = _split_merges(data) if data.has("merges") else _merges_from_scores(data)
    options = {} if unknown is None else {"unk_token": data.tokens[unknown]}
    model = _built(data, lambda: BPE(data.ids, merges, fuse_unk=True, byte_fallback=True, **options))
    backend = Tokenizer(model)
    _spaces_as_underscores(data, backend, [])
    return _finish(data, backend, defaults, add_bos=True)


def _unigram(data: Metadata) -> GgufVocab:
    defaults = {"eos_token_id": 1, "unknown_token_id": 2, "padding_token_id": 0}
    scores = _scores(data)
    pieces = list(zip(data.tokens, scores.tolist()))
    unknown = data.id("unknown_token_id", defaults["unknown_token_id"])
    has_bytes = bool(data.of_type(BYTE))
    backend = Tokenizer(_built(data, lambda: Unigram(pieces, unknown, has_bytes)))
    before = []
    if data.has("precompiled_charsmap"):
        numbers = data.get("precompiled_charsmap", object, None)
        charsmap = _built(data, lambda: np.asarray(numbers).astype(np.uint8).tobytes())
        check_charsmap(charsmap, f"{data.source}: tokenizer.ggml.precompiled_charsmap")
        before.append(_built(data, lambda: normalizers.Precompiled(charsmap)))
    if data.get("remove_extra_whitespaces", bool, False):
        before += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    _spaces_as_underscores(data, backend, before)
    return _finish(data, backend, defaults, add_eos=True)


def _spaces_as_underscores(data: Metadata, backend: Tokenizer, before: list[Any]) -> None:
    """Replace spaces by U+2581 like SentencePiece, and prepend one unless add_space_prefix is false.

    As in llama.cpp, one is also prepended after a special token and to text that begins with a space.
    """
    prefix = data.get("add_space_prefix", bool, True)
    spaces = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([*before, *spaces])
    strip = [decoders.Strip(" ", 1, 0)] * prefix
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(steps)


def _split_merges(data: Metadata) -> list[tuple[str, str]]:
    merges = data.texts("merges")
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    if set(map(len, pairs)) != {2}:
        wrong = next(merge for merge, pair in zip(merges, pairs) if len(pair) != 2)
        raise data.error("merges", f"{wrong!r} is not two tokens separated by a space")
    return pairs


def _scores(data: Metadata) -> np.ndarray:
    scores = data.numbers("scores", np.float64)
    if scores is None:
        raise data.error("scores", "missing; this type of vocabulary needs one score per token")
    return scores


def _merges_from_scores(data: Metadata) -> list[tuple[str, str]]:
    """Return all pairs of tokens that concatenate to a normal token, best score first.

    SentencePiece merges the pair whose token has the best score, so sorting by score orders the merges.
    """
    ids, longest = data.ids, max(data.tokens, key=len)
    if len(longest) > MAX_PIECE:
        raise data.error(
            "tokens", f"{longest[:20]!r}... has {len(longest)} characters, more than {MAX_PIECE}"
        )
    normal = np.flatnonzero(data.types == NORMAL)
    order = normal[np.argsort(-_scores(data)[normal], kind="stable")].tolist()
    return [
        (left, right)
        for token in map(data.tokens.__getitem__, order)
        for cut in range(len(token) - 1, 0, -1)
        if (left := token[:cut]) in ids and (right := token[cut:]) in ids
    ]


def check_charsmap(charsmap: bytes, where: str) -> None:
    """Check the length field of a SentencePiece character map, because the library allocates that many bytes.

    The map is a little-endian 32-bit length, that many bytes of 32-bit units, and zero-terminated strings.
    """
    size = int.from_bytes(charsmap[:4], "little")
    if size == 0 or size % 4 != 0 or size > len(charsmap) - 4:
        raise InputError(f"{where}: {len(charsmap)} bytes with an invalid length of {size} bytes")


def _built(data: Metadata, make: Callable[[], T]) -> T:
    return checked(f"{data.source}: tokenizer.ggml: unusable vocabulary", make)


_BUILDERS: dict[str, Callable[[Metadata], GgufVocab]] = {
    "gpt2": _byte_level_bpe,
    "llama": _sentencepiece_bpe,
    "t5": _unigram,
}
