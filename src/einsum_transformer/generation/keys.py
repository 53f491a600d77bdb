"""The keys of generation_config.json (transformers' GenerationConfig): used, ignored or not supported.

`generate` takes the same names as keywords, which override the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from einsum_transformer.arguments import nearest
from einsum_transformer.errors import InputError
from einsum_transformer.models.config import shown
from einsum_transformer.notes import note, note_once

FILE = "generation_config.json"
Parser = Callable[[Any], Any]
"""Converts a value to its internal form; raises ValueError with a description of valid values."""


def whole(least: int) -> Parser:
    """Return a parser of integers of at least `least`."""

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"an integer, {least} or more")
        return int(value)

    return parse


def number(fits: Callable[[float], bool], expected: str) -> Parser:
    """Return a parser of finite numbers for which `fits` is true."""

    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise ValueError(expected)
        try:
            value = float(value)
        except OverflowError:  # an integer of hundreds of digits
            raise ValueError(expected) from None
        if not math.isfinite(value) or not fits(value):
            raise ValueError(expected)
        return value

    return parse


def flag(value: Any) -> bool:
    """Parse true or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _items(value: Any, expected: str) -> list[Any]:
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, set, frozenset)):
        raise ValueError(expected)
    return list(value)


def token_list(value: Any) -> tuple[int, ...]:
    """Parse a token id or a list of token ids."""
    expected = "a token id or a list of token ids"
    items = [value] if isinstance(value, (int, np.integer)) else _items(value, expected)
    if any(isinstance(each, bool) or not isinstance(each, (int, np.integer)) for each in items):
        raise ValueError(expected)
    return tuple(int(each) for each in items)


def _sequence(value: Any, expected: str) -> tuple[int, ...]:
    try:
        tokens = token_list(_items(value, expected))
    except ValueError:
        raise ValueError(expected) from None
    if not tokens or min(tokens) < 0:
        raise ValueError(expected)
    return tokens


def token_lists(value: Any) -> tuple[tuple[int, ...], ...]:
    """Parse a list of non-empty lists of token ids."""
    expected = "a list of non-empty lists of token ids"
    return tuple(_sequence(each, expected) for each in _items(value, expected))


def biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    """Parse [[token ids, bias], ...] or a mapping from tuples of ids; the last of equal sequences is used."""
    expected = "a list of [[token ids], bias]"
    pairs = list(value.items()) if isinstance(value, Mapping) else _items(value, expected)
    found: dict[tuple[int, ...], float] = {}
    for pair in pairs:
        both = _items(pair, expected)
        if len(both) != 2:
            raise ValueError(expected)
        excluded = isinstance(both[1], float) and both[1] == -math.inf
        found[_sequence(both[0], expected)] = both[1] if excluded else _any_number(both[1])
    return tuple(found.items())


_any_number = number(lambda x: True, "a number")
_positive = number(lambda x: x > 0, "a number above 0")
_share = number(lambda x: 0 <= x <= 1, "a number from 0 to 1")
_positive_share = number(lambda x: 0 < x <= 1, "a number above 0, at most 1")


def decay(value: Any) -> tuple[int, float]:
    """Parse [number of new tokens before the decay starts, factor of each further token]."""
    expected = "[start, factor]: an integer, 0 or more, and a number above 0"
    both = _items(value, expected)
    if len(both) != 2:
        raise ValueError(expected)
    try:
        return whole(0)(both[0]), _positive(both[1])
    except ValueError:
        raise ValueError(expected) from None


def strings(value: Any) -> tuple[str, ...]:
    """Parse a string or a list of strings, all of them non-empty."""
    items = [value] if isinstance(value, str) else _items(value, "a string or a list of strings")
    if any(not isinstance(each, str) for each in items):
        raise ValueError("a string or a list of strings")
    if "" in items:
        raise ValueError("texts that are not empty: an empty stop string would stop every text")
    return tuple(items)


SAMPLING: dict[str, Parser] = {
    "temperature": number(lambda x: x >= 0, "a number, 0 or more"),
    "top_k": whole(0),
    "top_p": _share,
    "min_p": _share,
    "repetition_penalty": _positive,
    "top_h": _positive_share,
    "typical_p": _positive_share,
    "epsilon_cutoff": _share,
    "eta_cutoff": _share,
    "sequence_bias": biases,
    "encoder_repetition_penalty": _positive,
    "no_repeat_ngram_size": whole(0),
    "encoder_no_repeat_ngram_size": whole(0),
    "bad_words_ids": token_lists,
    "min_length": whole(0),
    "min_new_tokens": whole(0),
    "forced_bos_token_id": whole(0),
    "forced_eos_token_id": token_list,
    "remove_invalid_values": flag,
    "exponential_decay_length_penalty": decay,
    "suppress_tokens": token_list,
    "begin_suppress_tokens": token_list,
}
"""The fields of `Sampling`."""

SETTINGS: dict[str, Parser] = {
    "max_new_tokens": whole(0),
    "max_length": whole(1),
    "stop_strings": strings,
    "max_time": number(lambda x: x >= 0, "a number of seconds, 0 or more"),
    "eos_token_id": token_list,
}
APPLIED: dict[str, Parser] = SAMPLING | SETTINGS | {"do_sample": flag}

OWN: dict[str, Parser] = {
    "stop": strings,
    "seed": whole(0),
    "ctx_size": whole(1),
    "prefill_step_size": whole(1),
    "ignore_eos": flag,
}
"""Keywords of `generate` that transformers does not have."""

_BEAMS = "only used by beam search"
_MEMORY = "affects speed and memory only"
_OUTPUT = "affects what transformers returns besides the text"
_DRAFTS = "affects the drafts only, not the text"
_ABOUT = "metadata of the file"
IGNORED: dict[str, str] = {
    "renormalize_logits": "a log-softmax at the end changes neither the order nor the distribution",
    "early_stopping": _BEAMS,
    "length_penalty": _BEAMS,
    "diversity_penalty": _BEAMS,
    "use_cache": _MEMORY,
    "cache_implementation": _MEMORY,
    "cache_config": _MEMORY,
    "max_cache_len": _MEMORY,
    "low_memory": _MEMORY,
    "prefill_chunk_size": _MEMORY,
    "compile_config": _MEMORY,
    "disable_compile": _MEMORY,
    "continuous_batching_config": _MEMORY,
    "output_attentions": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "output_scores": _OUTPUT,
    "output_logits": _OUTPUT,
    "return_dict_in_generate": _OUTPUT,
    "pad_token_id": "rows are padded on the left, and padding is masked",
    "bos_token_id": "the tokenizer adds BOS to a prompt",
    "decoder_start_token_id": "only used by encoder-decoder models",
    "use_mtp": _DRAFTS,
    "num_assistant_tokens": _DRAFTS,
    "num_assistant_tokens_schedule": _DRAFTS,
    "assistant_confidence_threshold": _DRAFTS,
    "prompt_lookup_num_tokens": _DRAFTS,
    "max_matching_ngram_size": _DRAFTS,
    "assistant_early_exit": _DRAFTS,
    "assistant_lookbehind": _DRAFTS,
    "target_lookbehind": _DRAFTS,
    "speculation_type": _DRAFTS,
    "_from_model_config": _ABOUT,
    "transformers_version": _ABOUT,
    "_commit_hash": _ABOUT,
    "_original_object_hash": _ABOUT,
    "return_legacy_cache": _OUTPUT,
}
"""Keys that do not change the text, and why. The last key is from transformers 4."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "guidance_scale": (1,),
    "watermarking_config": ({},),
    "token_healing": (False,),
    "num_return_sequences": (1,),
    "is_assistant": (False,),
    "assistant_ensemble_weight": (),
    "forced_decoder_ids": ([],),
    "force_bos_token_to_be_generated": (False,),
}
"""Keys that change the text and are not supported, with the values (besides null) that have no effect. The
last two keys are from transformers 4."""

TOP_K = 50
"""transformers' default of top_k if `do_sample` is true."""
_FILTERS = ("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_TOGETHER = (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length"), ("stop", "stop_strings"))


def merged(stated: Mapping[str, Any] | None, given: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """Return the parsed values of all supported keys that are not null: from `given`, or else from `stated`,
    the generation_config.json of `source`.

    `temperature` is 0 for greedy text. Raises InputError for invalid values and for given options that are
    unknown or not supported; keys of the file that are not used are noted once.
    """
    stated = {name: value for name, value in (stated or {}).items() if value is not None}
    given = {name: value for name, value in given.items() if value is not None}
    for group in _TOGETHER:
        if all(name in given for name in group) and "stop" in group:
            raise InputError("`stop` and `stop_strings` are the same option: give one of them")
        if any(name in given for name in group):
            stated = {name: value for name, value in stated.items() if name not in group}
    _check_given(given)
    _note_unused({name: value for name, value in stated.items() if name not in given}, source)
    values = {
        name: parsed(name, value, APPLIED[name], FILE)
        for name, value in stated.items()
        if name in APPLIED and name not in given
    }
    own = APPLIED | OWN
    values |= {name: parsed(name, value, own[name]) for name, value in given.items() if name in own}
    if "min_new_tokens" in values:
        values.pop("min_length", None)
    if "max_new_tokens" in values:
        values.pop("max_length", None)
    return values | _strategy(values, given, source)


def parsed(name: str, value: Any, parser: Parser, source: str = "") -> Any:
    """Return the value in its internal form, or raise an InputError that names the key."""
    try:
        return parser(value)
    except ValueError as error:
        where = f"{source}: key {name!r}" if source else f"`{name}`"
        raise InputError(f"{where} is {shown(value)}: expected {error}") from None


def _strategy(values: Mapping[str, Any], given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return temperature and top_k after applying `do_sample`; a given temperature implies sampling."""
    sampled = values.get("do_sample", False)
    temperature = values.get("temperature", 1.0)
    if not ("do_sample" in given or "temperature" in given):
        temperature = temperature if sampled else 0.0
    elif given.get("do_sample") is False and temperature and "temperature" in given:
        note("`do_sample` is false: decoding is greedy, and `temperature` has no effect")
        temperature = 0.0
    elif "do_sample" in given:
        temperature = temperature if sampled else 0.0
    if sampled and temperature == 0 and "temperature" not in given:
        note_once(f"{FILE}: temperature is 0: decoding is greedy, although do_sample is true", source)
    if temperature == 0 and "temperature" not in given and "do_sample" not in given:
        off = {"top_p": 1, "typical_p": 1}
        unused = [f"`{name}`" for name in _FILTERS if name in given and values[name] != off.get(name, 0)]
        if unused:
            note(f"{', '.join(unused)}: no effect on greedy decoding; set `temperature` above 0 to sample")
    if sampled and temperature > 0 and "top_k" not in values:
        return {"temperature": temperature, "top_k": TOP_K}
    return {"temperature": temperature}


def _check_given(given: Mapping[str, Any]) -> None:
    """Raise InputError for options that are unknown or not supported."""
    known = [*APPLIED, *OWN, *IGNORED, *UNSUPPORTED]
    for name, value in given.items():
        if name not in known:
            raise InputError(f"generate has no option {name!r}{nearest(name, known)}")
        if _changes_text(name, value):
            raise InputError(f"`{name}` is {shown(value)}, which is not supported; omit it")


def _changes_text(name: str, value: Any) -> bool:
    """Whether the value of an unsupported key has an effect."""
    plain = isinstance(value, (bool, int, float, np.number, list, dict))
    return name in UNSUPPORTED and not (plain and any(value == off for off in UNSUPPORTED[name]))


def _note_unused(stated: Mapping[str, Any], source: str) -> None:
    """Note all keys of a file that have an effect but are not used, in one line."""
    active = [f"{name} = {shown(value)}" for name, value in stated.items() if _changes_text(name, value)]
    unknown = [name for name in stated if name not in {**APPLIED, **IGNORED, **UNSUPPORTED}]
    reasons = [f"not supported: {', '.join(active)}"] * bool(active)
    reasons += [f"not known: {', '.join(map(shown, unknown))}"] * bool(unknown)
    if reasons:
        note_once(f"{FILE}: not used: {'; '.join(reasons)}", source)
