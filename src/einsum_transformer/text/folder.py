"""Read a tokenizer's folder: tokenizer.json, or vocab.json and merges.txt, and the settings."""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from einsum_transformer.errors import InputError
from einsum_transformer.notes import note
from einsum_transformer.text.added_tokens import TokenFiles, add_tokens, check_stated_ids
from einsum_transformer.text.class_build import build_class, finish_class, parts_of
from einsum_transformer.text.classes import BACKEND, DEFAULT_EXTRA, DEFAULTS, NO_PAD, class_name, class_of
from einsum_transformer.text.config_keys import note_config_keys
from einsum_transformer.text.gguf_vocab import check_charsmap
from einsum_transformer.text.native import checked

_MAX_BYTES = {
    "tokenizer.json": 1 << 29,
    "vocab.json": 1 << 27,
    "merges.txt": 1 << 27,
}  # ten times any published
_MAX_OTHER_BYTES = 1 << 24
_MAX_TEMPLATES = 100
# Files with a vocabulary in an unsupported format.
_OTHER_FORMS = {
    "tokenizer.model": "a SentencePiece model or a tiktoken vocabulary",
    "spiece.model": "a SentencePiece model",
    "sentencepiece.bpe.model": "a SentencePiece model",
    "tiktoken.model": "a tiktoken vocabulary",
    "qwen.tiktoken": "a tiktoken vocabulary",
    "tekken.json": "a Mistral tekken vocabulary",
    "vocab.txt": "a WordPiece vocabulary",
    "vocab.json": "a vocabulary without its merges.txt",
}
_CLEAN_UP = "clean_up_tokenization_spaces"
CLEAN_UP_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


@dataclass(frozen=True, slots=True)
class FolderTokenizer:
    """The contents of a folder: the native tokenizer, special tokens by name, chat templates and settings."""

    backend: Tokenizer
    named: dict[str, str]
    chat_templates: dict[str, str]
    clean_up: bool


def has_tokenizer(folder: Path) -> bool:
    """Whether `read_folder` can read a tokenizer in a folder; a note names an unsupported format."""
    if (folder / "tokenizer.json").is_file():
        return True
    found = _other_form(folder)
    if _has_merges(folder):
        try:
            class_of(
                _read_json(folder, "tokenizer_config.json"), _read_json(folder, "config.json"), str(folder)
            )
            return True
        except InputError as error:
            found = str(error)
    if found is not None:
        note(f"{folder}: no tokenizer, so this model accepts token ids only; {found}")
    return False


def read_folder(folder: Path) -> FolderTokenizer:
    """Read a tokenizer's files; raises InputError that names the invalid file."""
    config = _read_json(folder, "tokenizer_config.json")
    model = _read_json(folder, "config.json")
    started = _start(folder, config, model)
    note_config_keys(config, str(folder / "tokenizer_config.json"))
    token_map, legacy = (
        _read_json(folder, name) for name in ("special_tokens_map.json", "added_tokens.json")
    )
    files = TokenFiles(config, token_map, legacy, started.listed)
    kind, backend = started.kind, started.backend
    specials = add_tokens(backend, files, started.defaults, str(folder), DEFAULT_EXTRA.get(kind, ()))
    named = {name: str(token) for name, token in specials.named.items()}
    if kind != BACKEND:
        where = f"{folder}: post-processor of {kind}"
        checked(where, lambda: finish_class(kind, backend, config, specials, started.shell))
    if started.has_file:
        _note_differences(kind, backend, config, named, folder)
    backend.encode_special_tokens = config.get("split_special_tokens") is True
    templates = {name: text for name, (text, _) in _templates(folder, config).items()}
    return FolderTokenizer(backend, named, templates, _cleans_up(backend, config))


@dataclass(frozen=True, slots=True)
class _Started:
    """A native tokenizer before the added tokens of the other files are added.

    shell: tokenizer.json without a vocabulary, if the class rebuilds the tokenizer. listed: the added tokens
    of tokenizer.json. defaults: named special tokens of the class.
    """

    kind: str
    backend: Tokenizer
    defaults: Mapping[str, str]
    has_file: bool
    shell: Tokenizer | None = None
    listed: Any = ()


def _start(folder: Path, config: Mapping[str, Any], model: Mapping[str, Any]) -> _Started:
    if (text := _read(folder, "tokenizer.json")) is not None:
        return _start_from_file(text, folder / "tokenizer.json", config, model)
    if not _has_merges(folder):
        found = _other_form(folder)
        raise InputError(
            f"{folder}: no tokenizer.json, which is required to encode and decode text"
            f"{'' if found is None else f'; {found}'}"
        )
    kind = class_of(config, model, str(folder))
    merges = _merges(_read(folder, "merges.txt") or "", f"{folder}/merges.txt")
    backend = build_class(kind, _read_json(folder, "vocab.json"), merges, config, f"{folder}/vocab.json")
    return _Started(kind, backend, DEFAULTS[kind], has_file=False)


def _start_from_file(text: str, path: Path, config: Mapping[str, Any], model: Mapping[str, Any]) -> _Started:
    _check_normalizer(text, path)
    kind = class_name(config, model, '"ByteLevel"' in text)
    parts = None if kind == BACKEND else parts_of(text, str(path))
    if kind != BACKEND and parts is None:
        note(f"{path}: its vocabulary is not the BPE of {kind}, so the file is used unchanged")
    listed = _added_tokens(text)
    if parts is None:
        backend, padding = _read_backend(text, path)
        check_stated_ids(backend, listed, str(path))
        defaults = DEFAULTS.get(kind, {})
        return _Started(BACKEND, backend, padding | defaults, has_file=True, listed=listed)
    shell, vocab, merges = parts
    backend = build_class(kind, vocab, merges, config, str(path))
    defaults = DEFAULTS[kind] if kind in NO_PAD else _padding(shell) | DEFAULTS[kind]
    return _Started(kind, backend, defaults, True, shell, listed)


def _merges(text: str, path: str) -> list[tuple[str, str]]:
    """Return the pairs of merges.txt: one per line, best first, after a line `#version: ...`."""
    pairs = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise InputError(f"{path}, line {number}: expected two tokens separated by a space")
        pairs.append((parts[0], parts[1]))
    return pairs


def _has_merges(folder: Path) -> bool:
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()


def _other_form(folder: Path) -> str | None:
    """Return a message about a vocabulary in an unsupported format, or None."""
    for name, form in _OTHER_FORMS.items():
        if (folder / name).is_file():
            return (
                f"{name} is {form}: convert it with transformers, "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
    return None


def _read_backend(text: str, path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """Return the native tokenizer without padding and truncation, and the pad token of its padding."""
    backend = checked(f"{path}: not a usable tokenizer", lambda: Tokenizer.from_str(text))
    padding = _padding(backend)
    backend.no_truncation()
    backend.no_padding()
    return backend, padding


def _padding(backend: Tokenizer) -> dict[str, str]:
    padding = backend.padding
    return {} if padding is None else {"pad_token": padding["pad_token"]}


def _added_tokens(text: str) -> Any:
    """Return the list "added_tokens" of a tokenizer.json without parsing the vocabulary."""
    for match in re.finditer(r'"added_tokens"\s*:\s*(?=\[)', text):
        return json.JSONDecoder().raw_decode(text, match.end())[0]
    return []


def _check_normalizer(text: str, path: Path) -> None:
    """Check the character maps of a tokenizer.json, which is parsed in Python only if it may have one."""
    if "precompiled_charsmap" not in text and not re.search(r"\\u00[4-7]", text):  # the key may be escaped
        return
    level = [checked(f"{path}: not a usable tokenizer", lambda: dict(json.loads(text)).get("normalizer"))]
    while level:
        children: list[Any] = []
        for value in level:
            if isinstance(value, dict) and isinstance(charsmap := value.get("precompiled_charsmap"), str):
                where = f"{path}: normalizer.precompiled_charsmap"
                check_charsmap(checked(where, lambda encoded=charsmap: base64.b64decode(encoded)), where)
            if isinstance(value, dict | list):
                children += value.values() if isinstance(value, dict) else value
        level = children


def _note_differences(
    kind: str,
    backend: Tokenizer,
    config: Mapping[str, Any],
    named: Mapping[str, str],
    folder: Path,
) -> None:
    """Note the keys that contradict tokenizer.json, which takes precedence as in transformers 5."""
    ids = checked(f"{folder}: cannot encode a text", lambda: backend.encode("").ids)
    differing = []
    for key, name, end in (("add_bos_token", "bos_token", ids[:1]), ("add_eos_token", "eos_token", ids[-1:])):
        token = None if name not in named else backend.token_to_id(named[name])
        if isinstance(config.get(key), bool) and token is not None and config[key] != (end == [token]):
            differing.append(f"{key}: {str(config[key]).lower()}")
    state = _byte_level_state(backend)
    prefix = config.get("add_prefix_space")
    if kind == BACKEND and state is not None and isinstance(prefix, bool) and state != prefix:
        differing.append(f"add_prefix_space: {str(prefix).lower()}")
    if differing:
        path = folder / "tokenizer_config.json"
        note(f"{path}: {', '.join(differing)} is not used: tokenizer.json differs and takes precedence")


def _byte_level_state(backend: Tokenizer) -> bool | None:
    """Return `add_prefix_space` of a byte-level pre-tokenizer, or None for another type."""
    pre = backend.pre_tokenizer
    state = b"" if pre is None else pre.__getstate__()
    if b'"ByteLevel"' not in state:
        return None
    return b'"add_prefix_space":true' in state


def _cleans_up(backend: Tokenizer, config: Mapping[str, Any]) -> bool:
    """Whether decoding cleans up spaces; as in transformers 5, BPE requires a second key to force it."""
    forced = config.get(CLEAN_UP_BPE) is True
    return config.get(_CLEAN_UP) is True and (forced or not isinstance(backend.model, BPE))


def _read(folder: Path, name: str) -> str | None:
    """Return the text of a file in a folder, or None if the file does not exist."""
    path = folder / name
    if not path.is_file():
        return None
    size, limit = path.stat().st_size, _MAX_BYTES.get(name, _MAX_OTHER_BYTES)
    if size > limit:
        raise InputError(f"{path}: {size} bytes; at most {limit} are allowed")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    text = _read(folder, name)
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / name}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{folder / name}: expected a JSON object, got {type(value).__name__}")
    return value


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[str, Path]]:
    """Return name -> (chat template, its file).

    Read from chat_template.jinja and additional_chat_templates/NAME.jinja, or else tokenizer_config.json.
    """
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if len(more) > _MAX_TEMPLATES:
        raise InputError(
            f"{folder / 'additional_chat_templates'}: {len(more)} files; at most {_MAX_TEMPLATES} are allowed"
        )
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.name.removesuffix(".jinja"): path for path in more}
    texts = {name: (_read(path.parent, path.name), path) for name, path in files.items()}
    found = {name: (text, path) for name, (text, path) in texts.items() if text is not None}
    return found or _config_templates(config.get("chat_template"), folder / "tokenizer_config.json")


def templates_in(folder: Path) -> dict[str, tuple[str, Path]]:
    """Return name -> (chat template, its file) for a folder that may lack a tokenizer: as in `read_folder`,
    or else from chat_template.json, the file of processors in transformers 4."""
    found = _templates(folder, _read_json(folder, "tokenizer_config.json"))
    old = "chat_template.json"
    return found or _config_templates(_read_json(folder, old).get("chat_template"), folder / old)


def _config_templates(value: Any, path: Path) -> dict[str, tuple[str, Path]]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": (value, path)}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item.get("name"): item.get("template") for item in value}
    if isinstance(value, dict) and all(isinstance(x, str) for pair in value.items() for x in pair):
        return {name: (text, path) for name, text in value.items()}
    raise InputError(f"{path}: chat_template: expected a string or named templates")
