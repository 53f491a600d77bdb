"""Byte-level BPE from vocab.json and merges.txt, as transformers' class for the model reads them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from einsum_transformer.errors import InputError
from einsum_transformer.text.added_tokens import MAX_TOKEN_ID
from einsum_transformer.text.native import checked
from einsum_transformer.text.pre_tokenizers import QWEN2

if TYPE_CHECKING:
    import tokenizers

_END = "<|endoftext|>"
# The named special tokens of each class where tokenizer_config.json does not name them.
_DEFAULTS: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "CodeGenTokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "GPTNeoXTokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END, "pad_token": "<|padding|>"},
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
    "RobertaTokenizer": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "cls_token": "<s>",
        "mask_token": "<mask>",
    },
}
# The class of a model whose tokenizer_config.json names none.
_CLASS_OF_MODEL = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "codegen", "opt", "phi", "starcoder2"), "GPT2Tokenizer"),
    **dict.fromkeys(("gpt_neox", "mpt", "olmo"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("roberta",), "RobertaTokenizer"),
}
_COMPOSED = frozenset({"GPTNeoXTokenizer", "Qwen2Tokenizer"})  # classes that normalize text to NFC


def class_of(config: Mapping[str, Any], model: Mapping[str, Any], folder: str) -> str:
    """The tokenizer's class by tokenizer_config.json, or else by config.json; InputError for another one."""
    stated = config.get("tokenizer_class") or model.get("tokenizer_class")
    model_type = model.get("model_type")
    if stated is None:
        name = _CLASS_OF_MODEL.get(model_type) if isinstance(model_type, str) else None
    else:
        name = str(stated).removesuffix("Fast")
    if name in _DEFAULTS:
        return name
    known = ", ".join(_DEFAULTS)
    what = f"tokenizer_class {stated!r}" if stated is not None else f"model_type {model_type!r}"
    raise InputError(
        f"{folder}: vocab.json and merges.txt with {what}: the classes {known} are known; "
        f"convert another one with transformers, AutoTokenizer.from_pretrained({folder!r})"
        f".save_pretrained({folder!r})"
    )


def build_from_merges(
    kind: str, vocab: Mapping[str, Any], merges: str, config: Mapping[str, Any], folder: str
) -> tuple["tokenizers.Tokenizer", dict[str, str]]:
    """The tokenizer without a post-processor, and the special tokens that its class names by default."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    pairs = _merges(merges, f"{folder}/merges.txt")
    ids = _ids(vocab, f"{folder}/vocab.json")
    model = checked(
        f"{folder}: vocab.json and merges.txt: unusable vocabulary",
        lambda: BPE(ids, pairs, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False),
    )
    backend = Tokenizer(model)
    prefix = config.get("add_prefix_space") is True
    if kind in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    if kind == "Qwen2Tokenizer":
        split = Split(Regex(QWEN2), "isolated")
        backend.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=prefix, use_regex=False)])
    else:
        backend.pre_tokenizer = ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return backend, _DEFAULTS[kind]


def finish_class(
    kind: str, backend: "tokenizers.Tokenizer", config: Mapping[str, Any], named: Mapping[str, str]
) -> None:
    """Set the post-processor, which may need added tokens."""
    from tokenizers import AddedToken
    from tokenizers.processors import RobertaProcessing, TemplateProcessing

    if kind == "Qwen2Tokenizer":
        backend.add_tokens([AddedToken(text, special=True) for text in dict.fromkeys(named.values())])
    if kind == "RobertaTokenizer":
        sep, cls = (
            (named[name], backend.token_to_id(named[name]) or 0) for name in ("sep_token", "cls_token")
        )
        trims = config.get("trim_offsets") is not False
        backend.post_processor = RobertaProcessing(sep, cls, trims, config.get("add_prefix_space") is True)
        return
    before, after = (
        [named[name]] if config.get(f"add_{name}") is True and name in named else []
        for name in ("bos_token", "eos_token")
    )
    pieces = {text: backend.token_to_id(text) for text in (*before, *after)}
    tokens: Any = [{"id": text, "ids": [number], "tokens": [text]} for text, number in pieces.items()]
    backend.post_processor = TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", *after, "$B"], special_tokens=tokens
    )


def _ids(vocab: Mapping[str, Any], path: str) -> dict[str, int]:
    for token, number in vocab.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < MAX_TOKEN_ID:
            raise InputError(f"{path}: {token[:50]!r}: a token id is a number from 0 to {MAX_TOKEN_ID - 1}")
    if len(set(vocab.values())) != len(vocab):
        raise InputError(f"{path}: two tokens have the same id")
    return dict(vocab)


def _merges(text: str, path: str) -> list[tuple[str, str]]:
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
