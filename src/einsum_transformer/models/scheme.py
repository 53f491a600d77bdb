"""The notation of quantization schemes: W4A16KV8g64, with options after commas."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import product
from typing import Any, Literal

import re2  # pyright: ignore[reportMissingTypeStubs]

from einsum_transformer.components.cache_types import UNCHANGED, CacheType, cache_type
from einsum_transformer.errors import ConfigError, InputError

Granularity = Literal["tensor", "channel", "group"]

MODES = ("real", "simulated")
WEIGHT_BITS = (2, 3, 4, 8)
ACTIVATION_BITS = (4, 8, 16)
KV_BITS = (4, 8, 16)
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP = 64
CACHE_BITS: dict[str, int | None] = {
    **{"float32": None, "float16": 16, "int8": 8, "int4": 4},
    **{"f32": None, "f16": 16, "q8_0": 8, "q4_0": 4},
}
"""Name of a type of the KV cache -> its bits. float32: the type of the computation; the others are
llama.cpp's names."""
_NOTATION = re.compile(r"W(\d+)A(\d+)(?:KV(\d+))?(?:g(\d+))?((?:,[a-z]+)*)", re.IGNORECASE)
_OPTIONS = ("tensor", "channel", "symmetric", "asymmetric")
_GRAMMAR = "W{2,3,4,8}A{4,8,16}, then optionally KV{4,8,16} and g{32,64,128}, such as W4A16g64"


@dataclass(frozen=True, slots=True)
class Scheme:
    """The types of weights, activations and cached keys and values.

    weight_bits: 2, 3, 4 or 8. activation_bits: 4 or 8, quantized per token, or 16, rounded to float16.
    kv_bits: 4 or 8 with a scale per token and 64 elements of a head, 16 (float16), or None: the type of the
    computation. granularity: the elements that share a scale: a group of `group_size` elements of a
    row, a row (channel), or the tensor. symmetric: without zero points.
    """

    weight_bits: int
    activation_bits: int
    kv_bits: int | None = None
    granularity: Granularity = "channel"
    group_size: int = DEFAULT_GROUP
    symmetric: bool = True

    @staticmethod
    def parse(text: str) -> Scheme | None:
        """Return the scheme, or None for "none". Without g{N}, 8 bits have one scale per row, and fewer bits
        one per 64 elements. Options: `,tensor`, `,channel`, `,asymmetric`.

        Raises InputError with the grammar and the nearest valid scheme.
        """
        if text.lower() == "none":
            return None
        found = _NOTATION.fullmatch(text)
        if found is None:
            raise _unknown(text)
        weight, activation, kv, group, rest = found.groups()
        bits = int(weight), int(activation), None if kv is None else int(kv)
        allowed = WEIGHT_BITS, ACTIVATION_BITS, (*KV_BITS, None)
        known = all(value in values for value, values in zip(bits, allowed))
        if not known or (group and int(group) not in GROUP_SIZES):
            raise _unknown(text)
        options = [option for option in rest.lower().split(",") if option]
        if unknown := [option for option in options if option not in _OPTIONS]:
            raise InputError(
                f"quantization {text!r}: unknown option {unknown[0]!r}: expected {', '.join(_OPTIONS)}"
            )
        stated = [option for option in options if option in ("tensor", "channel")]
        if len(set(stated)) + bool(group) > 1 or {"symmetric", "asymmetric"} <= set(options):
            choices = "g{N}, tensor or channel" if stated else "symmetric or asymmetric"
            raise InputError(f"quantization {text!r}: give only one of {choices}")
        granularity: Granularity = "group" if group or bits[0] < 8 else "channel"
        if stated:
            granularity = "tensor" if stated[0] == "tensor" else "channel"
        size = int(group) if group else DEFAULT_GROUP
        return Scheme(*bits, granularity, size, "asymmetric" not in options)

    def __str__(self) -> str:
        kv = "" if self.kv_bits is None else f"KV{self.kv_bits}"
        group = f"g{self.group_size}" if self.granularity == "group" else ""
        options = "" if self.granularity == "group" else f",{self.granularity}"
        options += "" if self.symmetric else ",asymmetric"
        return f"W{self.weight_bits}A{self.activation_bits}{kv}{group}{options}"


@dataclass(frozen=True, slots=True)
class Quantization:
    """A scheme, its mode, the weights that are excluded, and those with a scheme of their own.

    simulated: the weights are rounded and stored as floats; otherwise (real) codes and scales are stored.
    exclude: names of modules ("down_proj") or regular expressions (RE2) for whole names.
    by_name: (name or regular expression, scheme); the first that matches a module replaces `scheme`. The
    bits of activations and of the cache are those of `scheme`.
    """

    scheme: Scheme
    simulated: bool = False
    exclude: tuple[str, ...] = ()
    by_name: tuple[tuple[str, Scheme], ...] = ()

    @staticmethod
    def of(
        scheme: str | None,
        mode: str = "real",
        exclude: Sequence[str] = (),
        by_name: Mapping[str, str] | None = None,
    ) -> Quantization | None:
        """Return the quantization, or None for no scheme. Raises InputError for what is not supported."""
        if mode not in MODES:
            raise InputError(f"`quantization_mode` is {mode!r}: expected {' or '.join(MODES)}")
        parsed = None if scheme is None else Scheme.parse(scheme)
        if parsed is None:
            return None
        for pattern in (*exclude, *(by_name or ())):
            _compiled(pattern)
        own = tuple((name, _own_scheme(name, text, parsed)) for name, text in (by_name or {}).items())
        return Quantization(parsed, mode == "simulated", tuple(exclude), own)

    @staticmethod
    def saved(settings: Mapping[str, Any], source: str) -> Quantization:
        """Return the quantization of a `quantization_config` that `Model.save` wrote. Errors: ConfigError."""
        scheme, exclude = settings.get("scheme"), settings.get("exclude", [])
        by_name = settings.get("by_name", {})
        if not isinstance(scheme, str) or not isinstance(exclude, list):
            raise ConfigError(f"{source}: quantization_config: expected `scheme`, and a list `exclude`")
        if not isinstance(by_name, dict):
            raise ConfigError(f"{source}: quantization_config: expected an object `by_name`")
        try:
            own = {str(name): str(each) for name, each in by_name.items()}
            found = Quantization.of(scheme, "real", [str(each) for each in exclude], own)
        except InputError as error:
            raise ConfigError(f"{source}: quantization_config: {error}") from None
        if found is None:
            raise ConfigError(f"{source}: quantization_config: `scheme` is {scheme!r}")
        weights = settings.get("weights")
        known = {8, found.scheme.weight_bits, *(each.weight_bits for _, each in found.by_name)}
        bits = [each[2] for each in weights.values()] if isinstance(weights, dict) else []
        if settings.get("activation_bits") != found.scheme.activation_bits or not set(bits) <= known:
            raise ConfigError(f"{source}: quantization_config: `scheme` {scheme} contradicts the rest")
        return found

    @property
    def cache_types(self) -> tuple[CacheType, CacheType]:
        """The types of cached keys and values."""
        found = cache_type(self.scheme.kv_bits, self.simulated)
        return found, found

    @property
    def mode(self) -> str:
        return "simulated" if self.simulated else "real"

    def __str__(self) -> str:
        others = dict.fromkeys(str(scheme) for _, scheme in self.by_name if scheme != self.scheme)
        mixed = f" mixed with {', '.join(others)}" if others else ""
        return f"{self.scheme}{mixed} ({self.mode})"

    def scheme_of(self, name: str) -> Scheme:
        """Return the scheme of a module of this name."""
        return next((scheme for pattern, scheme in self.by_name if _matches(pattern, name)), self.scheme)

    def excludes(self, name: str) -> bool:
        """Return whether a module of this name is excluded."""
        return any(_matches(pattern, name) for pattern in self.exclude)

    def check_names(self, names: Collection[str]) -> None:
        """Raise InputError for a name in `exclude` or `by_name` that matches none of these modules."""
        patterns = [("exclude", pattern) for pattern in self.exclude]
        patterns += [("by_name", pattern) for pattern, _ in self.by_name]
        for kind, pattern in patterns:
            if not any(_matches(pattern, name) for name in names):
                last = dict.fromkeys(name.rpartition(".")[2] for name in names)
                raise InputError(
                    f"`quantization_{kind}` {pattern!r}: no matrix has this name; the last parts of their "
                    f"names are {', '.join(last)}"
                )


def _own_scheme(name: str, text: str, base: Scheme) -> Scheme:
    """The scheme of the modules `name` in a model of scheme `base`."""
    scheme = Scheme.parse(text)
    if scheme is None:
        raise InputError(f"`quantization_by_name` {name!r} is none: exclude it (`quantization_exclude`)")
    if scheme.kv_bits is None:
        scheme = replace(scheme, kv_bits=base.kv_bits)
    if (scheme.activation_bits, scheme.kv_bits) != (base.activation_bits, base.kv_bits):
        raise InputError(
            f"`quantization_by_name` {name!r}: {text} has other bits of activations or of the cache than "
            f"{base}: only weights can have a scheme by name"
        )
    return scheme


def cache_types(
    k: str | None, v: str | None, quantization: Quantization | None, simulated: bool = False
) -> tuple[CacheType, CacheType]:
    """Return the types of cached keys and values: those named (see `CACHE_BITS`), else of the scheme."""
    keys, values = (UNCHANGED, UNCHANGED) if quantization is None else quantization.cache_types
    return (
        keys if k is None else _cache_type("cache_type_k", k, simulated),
        values if v is None else _cache_type("cache_type_v", v, simulated),
    )


def _cache_type(name: str, value: str, simulated: bool) -> CacheType:
    if value.lower() not in CACHE_BITS:
        raise InputError(f"`{name}` is {value!r}: expected one of {', '.join(CACHE_BITS)}")
    return cache_type(CACHE_BITS[value.lower()], simulated)


def _matches(pattern: str, name: str) -> bool:
    whole = name == pattern or name.endswith(f".{pattern}")
    return whole or _compiled(pattern).fullmatch(name) is not None


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Any:
    try:
        options = re2.Options()
        options.log_errors = False
        return re2.compile(pattern, options)
    except re2.error:
        raise InputError(f"`quantization` {pattern!r}: not a regular expression (RE2)") from None


def _unknown(text: str) -> InputError:
    kinds = product(WEIGHT_BITS, ACTIVATION_BITS, ("", *KV_BITS), ("", *GROUP_SIZES))
    valid = [f"W{w}A{a}{f'KV{kv}' if kv else ''}{f'g{group}' if group else ''}" for w, a, kv, group in kinds]
    wanted = text.upper().replace("G", "g")

    def likeness(each: str) -> tuple[int, float]:
        equal = [a == b for a, b in zip(each, wanted)]
        return (*equal, False).index(False), SequenceMatcher(None, each, wanted).ratio()

    nearest = max(valid, key=likeness)
    return InputError(
        f"quantization {text[:60]!r}: expected none or {_GRAMMAR}; the nearest valid one is {nearest}"
    )
