"""Added tokens and named special tokens of a tokenizer's folder, read as in transformers 5.

If tokenizer_config.json has `added_tokens_decoder`, it is complete, and special_tokens_map.json and
added_tokens.json are not read. Otherwise both are read, and special_tokens_map.json takes precedence over
tokenizer_config.json. Flags in these files take precedence over those in tokenizer.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from einsum_transformer.errors import InputError
from einsum_transformer.notes import note
from einsum_transformer.text.native import checked

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_TOKEN_ID = 1 << 24
_CONFIG, _LEGACY = "tokenizer_config.json", "added_tokens.json"
_EXTRA, _ADDITIONAL = "extra_special_tokens", "additional_special_tokens"
_MODEL_SPECIFIC = "model_specific_special_tokens"
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


@dataclass(frozen=True, slots=True)
class Specials:
    """Special tokens with a name, such as `bos_token` or `image_token`, and those without a name."""

    named: dict[str, str | AddedToken]
    extra: list[str | AddedToken]


@dataclass(frozen=True, slots=True)
class TokenFiles:
    """The contents of the files in a folder that list tokens.

    config, token_map, legacy: tokenizer_config.json, special_tokens_map.json and added_tokens.json.
    listed: "added_tokens" of tokenizer.json.
    """

    config: Mapping[str, Any]
    token_map: Mapping[str, Any]
    legacy: Mapping[str, Any]
    listed: Any = ()


def add_tokens(
    backend: Tokenizer,
    files: TokenFiles,
    defaults: Mapping[str, str],
    folder: str,
    default_extra: Sequence[str] = (),
) -> Specials:
    """Add the tokens in the files to `backend`; returns the special tokens.

    defaults, default_extra: special tokens of the tokenizer's class. Raises InputError for a malformed entry
    and for a new token whose id would differ from the id in the file.
    """
    found = _special_values(files, folder)
    if files.config.get("added_tokens_decoder") is not None:
        stated = _stated(files.config["added_tokens_decoder"], folder)
    else:
        by_id = _legacy(files.legacy, found.written, folder) | _listed(files.listed, folder)
        stated = sorted(by_id.items())
    flags = {token.content: token for _, token in stated}
    named: dict[str, str | AddedToken] = {}
    for name, value in (dict(defaults) | found.named).items():
        if value is not None:
            token = _special(value, f"{folder}: {name}")
            named[name] = flags.get(str(token), token) if name in NAMES and name in found.named else token
    listed = default_extra if found.extra is None else found.extra
    extra = [_special(value, f"{folder}: {_EXTRA}[{i}]") for i, value in enumerate(listed)]
    order = (*NAMES, *(name for name in named if name not in NAMES))
    specials = Specials({name: named[name] for name in order if name in named}, extra)
    _register(backend, stated, specials, folder)
    return specials


def check_stated_ids(backend: Tokenizer, entries: Any, path: str) -> None:
    """Check that the added tokens of tokenizer.json have the ids in the file; `tokenizers` only warns."""
    for entry in entries if isinstance(entries, list) else []:
        if not _is_token(entry):
            continue
        content, wanted = entry["content"], entry.get("id")
        if (found := backend.token_to_id(content)) != wanted:
            raise InputError(
                f"{path}: added token {content!r} has id {wanted}, but it would get {found}: "
                f"ids of added tokens must follow the vocabulary without a gap"
            )


@dataclass(frozen=True, slots=True)
class _Values:
    """Special tokens as written in the files; None in `named`: the file sets the token to null.

    extra: None if no file lists such tokens. written: a token of added_tokens.json with one of these contents
    is special; transformers compares them before it reads the typed form of tokenizer_config.json.
    """

    named: dict[str, Any]
    extra: list[Any] | None
    written: set[str]


def _special_values(files: TokenFiles, folder: str) -> _Values:
    """Collect named and unnamed special tokens in the order of transformers' `_from_pretrained`."""
    values = dict(files.config)
    if _ADDITIONAL in values and not values.get(_EXTRA):
        values[_EXTRA] = values.pop(_ADDITIONAL)
    own: dict[str, Any] = {
        key: values.pop(key) for key in [*values] if _is_own(key) and isinstance(values[key], str)
    }
    if isinstance(values.get(_EXTRA), Mapping):
        own |= values.pop(_EXTRA)
    # These tokens replace the object that lists model-specific tokens.
    explicit = own or _object(values.get(_MODEL_SPECIFIC), f"{folder}: {_MODEL_SPECIFIC}")
    token_map: Mapping[str, Any] = {}
    if files.config.get("added_tokens_decoder") is None:
        token_map = files.token_map
        for key, value in token_map.items():
            if key == _EXTRA and isinstance(value, list):
                old = list(values.get(_EXTRA) or [])
                value = [*old, *(token for token in value if token not in old)]
            values[key] = value
        if isinstance(values.get(_EXTRA), Mapping):
            explicit = {**explicit, **values.pop(_EXTRA)}
    first = values.get(_EXTRA)
    extra = first if _EXTRA in values else values.get(_ADDITIONAL)
    for key, value in ((_EXTRA, first), (_ADDITIONAL, extra)):
        if value is not None and not isinstance(value, list):
            raise InputError(f"{folder}: {key}: expected a list or an object of tokens")
    from_map = {key for key, value in token_map.items() if _is_token(value)}
    typed = {
        key: value
        for key, value in values.items()
        if _is_own(key) and (key in from_map or isinstance(value, str) or is_typed(value))
    }
    named = {name: values[name] for name in NAMES if name in values} | typed | explicit
    names = [value["content"] for name, value in values.items() if name in NAMES and name in from_map]
    strings = [values[name] for name in NAMES if isinstance(values.get(name), str)]
    return _Values(named, extra, {*names, *strings, *(text for text in first or [] if isinstance(text, str))})


def is_typed(value: Any) -> bool:
    """Whether transformers reads a value as a token with flags."""
    return _is_token(value) and value.get("__type") == "AddedToken"


def _is_own(key: str) -> bool:
    """Whether a key names a model-specific special token, such as `image_token`."""
    return key.endswith("_token") and key not in NAMES


def _object(value: Any, where: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{where}: expected an object of names and tokens")
    return value or {}


def _register(
    backend: Tokenizer, stated: list[tuple[int, AddedToken]], specials: Specials, folder: str
) -> None:
    """Add the stated tokens, and the special tokens that are neither stated nor already in `backend`."""
    present = backend.get_added_tokens_decoder().values()
    tokens: list[str | AddedToken] = [token for _, token in stated]
    known = {token.content for token in present} | {str(token) for token in tokens}
    for token in (*specials.named.values(), *specials.extra):
        # As in transformers, a string and a token with flags are different values: the later one is used.
        if str(token) not in known and token not in tokens:
            tokens.append(token)
    wanted = [AddedToken(token, special=True) if isinstance(token, str) else token for token in tokens]
    before = {token.content: backend.token_to_id(token.content) for token in wanted}
    special = {str(token) for token in specials.named.values()}
    special |= {token.content for token in present if token.special}
    for token in wanted:
        # A token that is special in one file stays special, even if a later file sets special to false.
        token.special = token.special or token.content in special
        special |= {token.content} if token.special else set()
    checked(f"{folder}: added tokens", lambda: backend.add_tokens(wanted))
    _check_ids(backend, stated, before, folder)


def _check_ids(
    backend: Tokenizer,
    stated: list[tuple[int, AddedToken]],
    before: Mapping[str, int | None],
    folder: str,
) -> None:
    for wanted, token in stated:
        found = backend.token_to_id(token.content)
        if found == wanted:
            continue
        if before[token.content] is None:
            raise InputError(
                f"{folder}: added token {token.content!r} should have id {wanted}, but it would get {found}: "
                f"ids of added tokens must follow the vocabulary without a gap and without another token"
            )
        note(
            f"{folder}: {token.content!r} has id {found} in the vocabulary and {wanted} in the list of added "
            f"tokens; {found} is used"
        )


def _is_token(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("content"), str)


def _token(value: Any, where: str, special: bool | None = None) -> AddedToken:
    """Return the AddedToken of an object with `content` and flags; special=None: use the object's flag."""
    if not _is_token(value):
        raise InputError(f'{where}: expected a string or {{"content": string}}')
    flags = {name: value[name] for name in _FLAGS if name in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise InputError(f"{where}: {', '.join(flags)} must be true or false")
    if special is not None:
        flags["special"] = special
    return AddedToken(value["content"], **flags)


def _special(value: Any, where: str) -> str | AddedToken:
    """Return a token that is special unless its flag `special` is false; a string stays a string."""
    stated = isinstance(value, Mapping) and ("special" in value or "__type" in value)
    return value if isinstance(value, str) else _token(value, where, special=None if stated else True)


def _stated(value: Any, folder: str) -> list[tuple[int, AddedToken]]:
    """Return the pairs (id, token) of `added_tokens_decoder`, sorted by id."""
    where = f"{folder}/{_CONFIG}: added_tokens_decoder"
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected an object of ids and tokens")
    pairs = []
    for key, item in value.items():
        text = str(key)
        number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else MAX_TOKEN_ID
        if isinstance(item, str):
            raise InputError(f'{where}[{key!r}]: expected {{"content": string}}')
        pairs.append((bounded_id(number, where, key), _token(item, f"{where}[{key!r}]")))
    return sorted(pairs, key=lambda pair: pair[0])


def _legacy(value: Mapping[str, Any], special: set[str], folder: str) -> dict[int, AddedToken]:
    """Return the tokens of added_tokens.json, {content: id}, by id."""
    where = f"{folder}/{_LEGACY}"
    tokens = {}
    for content, number in value.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise InputError(f"{where}: {content!r}: expected a token id, got {number!r}")
        is_special = content in special
        token = AddedToken(content, normalized=not is_special, special=is_special)
        tokens[bounded_id(number, where, content)] = token
    return tokens


def _listed(entries: Any, folder: str) -> dict[int, AddedToken]:
    """Return the added tokens of tokenizer.json by id."""
    where = f"{folder}/tokenizer.json: added_tokens"
    tokens = {}
    for entry in entries if isinstance(entries, list) else []:
        number = entry.get("id") if isinstance(entry, Mapping) else None
        if not isinstance(number, int) or isinstance(number, bool):
            raise InputError(f"{where}: expected objects with an id and a content")
        tokens[bounded_id(number, where, number)] = _token(entry, where)
    return tokens


def bounded_id(number: Any, where: str, key: Any) -> int:
    """Return a token id after checking its range; `key` names its entry in the message."""
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < MAX_TOKEN_ID:
        raise InputError(f"{where}: {key!r}: expected a token id from 0 to {MAX_TOKEN_ID - 1}")
    return number
