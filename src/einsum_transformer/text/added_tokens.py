"""Added and named special tokens of a tokenizer's folder, as transformers 5 reads them from its files.

With `added_tokens_decoder` in tokenizer_config.json, that file is complete and special_tokens_map.json and
added_tokens.json are not read; without it both are, and special_tokens_map.json goes before
tokenizer_config.json. Flags in these files go before those in tokenizer.json.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from einsum_transformer.errors import InputError
from einsum_transformer.notes import note
from einsum_transformer.text.native import checked

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_TOKEN_ID = 1 << 24
_CONFIG, _MAP, _LEGACY = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def add_tokens(
    backend: "Tokenizer",
    config: Mapping[str, Any],
    token_map: Mapping[str, Any],
    legacy: Mapping[str, Any],
    defaults: Mapping[str, str],
    folder: str,
) -> dict[str, str]:
    """Add what the three files list to `backend`; returns the named special tokens {name: content}.

    config, token_map, legacy: tokenizer_config.json, special_tokens_map.json and added_tokens.json.
    defaults: named tokens of the tokenizer's class. Raises InputError for a malformed entry and for a new
    token that would get another id than the file states.
    """
    if config.get("added_tokens_decoder") is None:
        config = _with_map(config, token_map)
    named, extra = _named_and_extra(config, defaults, folder)
    if config.get("added_tokens_decoder") is not None:
        stated = _stated(config["added_tokens_decoder"], folder)
    else:
        special = {token.content for token in (*named.values(), *extra)}
        stated = _legacy(legacy, special, folder)
        present = backend.get_added_tokens_decoder()
        stated = [
            (i, token) for i, token in stated if i not in present or present[i].content != token.content
        ]
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    by_content = {token.content: token for _, token in stated}
    wanted = [token for _, token in stated]
    # A named token takes its flags from the list of added tokens, or from tokenizer.json.
    flags = known | by_content
    wanted += [flags.get(token.content, token) for token in named.values()]
    wanted += [token for token in extra if token.content not in known]
    before = {token.content: backend.token_to_id(token.content) for token in wanted}
    names = {token.content for token in named.values()}
    _register(backend, wanted, names, folder)
    _check_ids(backend, stated, before, folder)
    return {name: token.content for name, token in named.items()}


def check_stated_ids(backend: "Tokenizer", entries: Any, path: str) -> None:
    """Check that the tokens listed in tokenizer.json have the ids stated there; `tokenizers` only warns."""
    for entry in entries if isinstance(entries, list) else []:
        if not _is_token(entry):
            continue
        content, wanted = entry["content"], entry.get("id")
        if (found := backend.token_to_id(content)) != wanted:
            raise InputError(
                f"{path}: added token {content!r} has id {wanted}, but it would get {found}: "
                f"ids of added tokens must follow the vocabulary without a gap"
            )


def _with_map(config: Mapping[str, Any], token_map: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with the entries of special_tokens_map.json, which go first."""
    extra, additional = "extra_special_tokens", "additional_special_tokens"
    merged = dict(config) | {key: value for key, value in token_map.items() if value is not None}
    own = config.get(extra) or config.get(additional)
    more = token_map.get(extra)
    if isinstance(own, list) and isinstance(more, list):
        merged[extra] = [*own, *(token for token in more if token not in own)]
    elif own:
        merged[extra] = own
    return merged


def _register(backend: "Tokenizer", wanted: Iterable["AddedToken"], names: set[str], folder: str) -> None:
    from tokenizers import AddedToken

    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    new: dict[str, AddedToken] = {}
    for token in wanted:
        old = known.get(token.content)
        if token.content in new:
            continue
        # A token that was special stays special when text is decoded, whatever a later file says.
        token.special = token.special or token.content in names or (old is not None and old.special)
        if old is None or _flags(old) != _flags(token):
            new[token.content] = token
    checked(f"{folder}: added tokens", lambda: backend.add_tokens(list(new.values())))


def _check_ids(
    backend: "Tokenizer",
    stated: list[tuple[int, "AddedToken"]],
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
                f"ids of added tokens must follow the vocabulary, with no gap and no other token there"
            )
        note(
            f"{folder}: {token.content!r} has id {found} in the vocabulary and {wanted} in the list of added "
            f"tokens; {found} is used"
        )


def _named_and_extra(
    config: Mapping[str, Any], defaults: Mapping[str, str], folder: str
) -> tuple[dict[str, "AddedToken"], list["AddedToken"]]:
    """Named special tokens in transformers' order, and those without a name."""
    values = {name: text for name, text in defaults.items() if name not in config}
    values |= {name: config[name] for name in NAMES if config.get(name) is not None}
    own = {
        key: value
        for key, value in config.items()
        if key.endswith("_token") and key not in NAMES and (isinstance(value, str) or _is_token(value))
    }
    # Strings first: transformers reads the typed form of such a token at a later step.
    typed = [key for key, value in own.items() if not isinstance(value, str)]
    own = {key: own[key] for key in (*typed, *(key for key in own if key not in typed))}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, Mapping):
        own |= extra
        extra = []
    if not isinstance(extra, list):
        raise InputError(f"{folder}: extra_special_tokens: expected a list or an object of tokens")
    named = {name: values[name] for name in NAMES if name in values} | own
    tokens = {name: _token(value, f"{folder}: {name}") for name, value in named.items()}
    others = [_token(value, f"{folder}: extra_special_tokens[{i}]") for i, value in enumerate(extra)]
    return tokens, others


def _is_token(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("content"), str)


def _token(value: Any, where: str, special: bool | None = True) -> "AddedToken":
    """An AddedToken of a string, or of an object with `content` and flags; special=None: as it says."""
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, special=bool(special))
    if not _is_token(value):
        raise InputError(f'{where}: expected a string or {{"content": string}}')
    flags = {name: value[name] for name in _FLAGS if name in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise InputError(f"{where}: {', '.join(flags)} must be true or false")
    if special is not None:
        flags["special"] = special
    return AddedToken(value["content"], **flags)


def _stated(value: Any, folder: str) -> list[tuple[int, "AddedToken"]]:
    """(id, token) of `added_tokens_decoder`, in the order of ids."""
    where = f"{folder}/{_CONFIG}: added_tokens_decoder"
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected an object of id and token")
    pairs = []
    for key, item in value.items():
        text = str(key)
        number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else MAX_TOKEN_ID
        if isinstance(item, str):
            raise InputError(f'{where}[{key!r}]: expected {{"content": string}}')
        pairs.append((_bounded(number, where, key), _token(item, f"{where}[{key!r}]", special=None)))
    return sorted(pairs, key=lambda pair: pair[0])


def _legacy(value: Mapping[str, Any], special: set[str], folder: str) -> list[tuple[int, "AddedToken"]]:
    """(id, token) of added_tokens.json, {content: id}, in the order of ids."""
    from tokenizers import AddedToken

    where = f"{folder}/{_LEGACY}"
    pairs = []
    for content, number in value.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise InputError(f"{where}: {content!r}: expected a token id, got {number!r}")
        is_special = content in special
        token = AddedToken(content, normalized=not is_special, special=is_special)
        pairs.append((_bounded(number, where, content), token))
    return sorted(pairs, key=lambda pair: pair[0])


def _bounded(number: int, where: str, key: Any) -> int:
    if not 0 <= number < MAX_TOKEN_ID:
        raise InputError(f"{where}: {key!r}: a token id is a number from 0 to {MAX_TOKEN_ID - 1}")
    return number


def _flags(token: "AddedToken") -> tuple[Any, ...]:
    return (token.lstrip, token.rstrip, token.normalized, token.single_word, token.special)
