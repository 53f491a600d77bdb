"""Count the steps, the elementwise operations and the memory of prefill, decode and training in dry runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from einsum_transformer.analysis.dry_run import (
    Counts,
    Mark,
    counted,
    distinct,
    stored_decoder,
    with_lora,
    without_weights,
)
from einsum_transformer.analysis.explain import matrices_of, role_of
from einsum_transformer.analysis.plan import Elementwise, Ledger, Plan, PlanPhase, PlanStep
from einsum_transformer.components.cache_types import UNCHANGED, CacheType
from einsum_transformer.components.kv_cache import KVCache
from einsum_transformer.components.masks import Mask
from einsum_transformer.engine import Equation, Leaf, phase
from einsum_transformer.engine.recorder import Event, Path
from einsum_transformer.generation.rows import PREFILL_CHUNK
from einsum_transformer.models.builder import WeightSpec, weights_of
from einsum_transformer.models.config import ModelConfig
from einsum_transformer.models.decoder import Decoder
from einsum_transformer.models.lora_config import LoRAConfig
from einsum_transformer.models.model import Model
from einsum_transformer.models.parameters import shapes_of, trainable
from einsum_transformer.models.scheme import Quantization
from einsum_transformer.tree import named_leaves

Array = np.ndarray


def plan(
    config: ModelConfig,
    name: str,
    batch: int,
    tokens: int,
    quantization: Quantization | None,
    types: tuple[CacheType, CacheType],
    bfloat16: bool,
    lora: LoRAConfig,
    moments: int,
    recompute: bool,
) -> Plan:
    """Return the plan of a model; see `api.plan.plan`. lora: the adapters of the ledger; moments: arrays of
    the optimizer's state per trained array."""
    decoder, plain = stored_decoder(config, quantization, bfloat16), without_weights(config, name)
    dry = _DryModel(config, decoder)
    cache = dry.cache(batch, tokens + 1, types)
    full, timeline = _DryModel(config, plain.decoder).training(batch, tokens, recompute)
    phases = (*dry.inference(batch, tokens, cache), full)
    weights = weights_of(config)
    parameters = sum(prod(weight.stored) for weight in weights)
    return Plan(
        name,
        batch,
        tokens,
        "bfloat16" if bfloat16 else None if quantization is None else str(quantization.scheme),
        (types[0].name, types[1].name),
        parameters,
        parameters - _idle_parameters(config, weights),
        sum(leaf.nbytes for _, leaf in named_leaves(decoder)),
        dry.cache_bytes(cache, 1) // batch,
        dry.cache_bytes(cache, tokens),
        phases,
        tuple(_ledgers(plain, batch, tokens, quantization, lora, moments, recompute, timeline)),
    )


def inference(config: ModelConfig, scheme: str | None, tokens: int) -> dict[str, PlanPhase]:
    """Return prefill and decode of one row."""
    dry = _DryModel(config, stored_decoder(config, Quantization.of(scheme)))
    cache = dry.cache(1, tokens + 1, (UNCHANGED, UNCHANGED))
    return {phase.name: phase for phase in dry.inference(1, tokens, cache)}


def of_run(model: Model, rows: int, prompt: int, context: int) -> tuple[PlanPhase, PlanPhase]:
    """Return the prefill of `prompt` tokens per row, and the decode step that follows `context` tokens."""
    dry = _DryModel(model.config, shapes_of(model.decoder))
    found: list[PlanPhase] = []
    for tokens in (prompt, context):
        cache = dry.cache(rows, tokens + 1, model.cache_types)
        found.append(list(dry.inference(rows, tokens, cache))[len(found)])
    return found[0], found[1]


def of_training(model: Model, rows: int, tokens: int, recompute: bool) -> PlanPhase:
    """Return a training step of a model, without the update."""
    return _DryModel(model.config, shapes_of(model.decoder)).training(rows, tokens, recompute)[0]


def adapted_training(config: ModelConfig, name: str, batch: int, tokens: int, lora: LoRAConfig) -> PlanPhase:
    """Return the training step of a model whose weights are frozen, and whose adapters are trained."""
    decoder = with_lora(without_weights(config, name), lora)
    return _DryModel(config, decoder).training(batch, tokens, False)[0]


def _idle_parameters(config: ModelConfig, weights: Sequence[WeightSpec]) -> int:
    """The parameters of experts that are not selected for a token."""
    if config.moe is None:
        return 0
    experts = sum(prod(weight.stored) for weight in weights if ".experts." in weight.path)
    return experts - experts * config.moe.num_experts_per_tok // config.moe.num_experts


class Timeline:
    """The memory of a training step through all layers, from a dry run with two blocks of each kind."""

    def __init__(self, marks: Sequence[Mark], members: Sequence[Sequence[int]]) -> None:
        kinds = {layer: kind for kind, layers in enumerate(members) for layer in layers}
        order = sorted(kinds)
        changes: dict[tuple[Path, int | None], list[tuple[int, int]]] = {}
        before = 0
        for mark in marks:
            own = changes.setdefault((mark.path, _half(mark.layer)), [])
            own.append((mark.peak - before, mark.live - before))
            before = mark.live
        live = 0
        self.peak: int = 0
        """Most bytes of activations and gradients at any time."""
        self.saved: int = 0
        """Bytes of the activations that all layers save for the backward pass."""
        for path in dict.fromkeys(mark.path for mark in marks):
            outer = (path, None) in changes
            layers = order[::-1] if path[0] == "backward" else order
            for i, key in enumerate([(path, None)] if outer else [(path, kinds[layer]) for layer in layers]):
                # Before the first block of a pass, no other block has anything to free.
                peak, change = changes[key][0 if i == 0 else -1]
                self.peak = max(self.peak, live + peak)
                live += change
            if path == ("forward", "layer"):
                self.saved = live


def _half(layer: int | None) -> int | None:
    return None if layer is None else layer // 2


def _is_odd(layer: int | None) -> bool:
    return layer is not None and layer % 2 == 1


class _DryModel:
    """A decoder of shapes with one block of each kind."""

    def __init__(self, config: ModelConfig, decoder: Decoder) -> None:
        self.config = config
        blocks, self.members = distinct(decoder)
        self.decoder: Decoder = replace(decoder, layers=blocks)
        self.windows = [config.windows[members[0]] for members in self.members]
        self.nbytes = {path: leaf.nbytes for path, leaf in named_leaves(self.decoder)}
        self.types = {
            path: leaf.product_type if isinstance(leaf, Leaf) else str(leaf.dtype)
            for path, leaf in named_leaves(self.decoder)
        }
        self.matrices = matrices_of(config)

    def cache(self, batch: int, capacity: int, types: tuple[CacheType, CacheType]) -> KVCache:
        """An empty cache whose memory is allocated."""
        cache = KVCache(self.windows, capacity, horizon=capacity, types=types)
        self.decoder.forward(np.zeros((batch, 1), np.int64), cache, "none")
        cache.truncate(0)
        return cache

    def cache_bytes(self, cache: KVCache, tokens: int) -> int:
        """The bytes of the first tokens of all rows in all layers, without reserved memory."""
        return sum(
            len(members) * layer.token_bytes * (tokens if window is None else min(tokens, window))
            for members, layer, window in zip(self.members, cache.layers, self.windows)
        )

    def inference(self, batch: int, tokens: int, cache: KVCache) -> Iterator[PlanPhase]:
        """The prefill of all tokens, in the chunks of a real run, and the decode of one more token."""

        def prefill() -> None:
            with phase("prefill"):
                for start in range(0, tokens, PREFILL_CHUNK):
                    stop = min(start + PREFILL_CHUNK, tokens)
                    part = np.zeros((batch, stop - start), np.int64)
                    self.decoder.forward(part, cache, "last" if stop == tokens else "none")

        def decode() -> None:
            with phase("decode"):
                self.decoder.forward(np.zeros((batch, 1), np.int64), cache)

        for run in (prefill, decode):
            before = cache.length
            counts = counted(run)
            peak = max(mark.peak for mark in counts.marks)
            yield self._phase(run.__name__, counts, batch, before, cache.length, peak)

    def training(self, batch: int, tokens: int, recompute: bool) -> tuple[PlanPhase, Timeline]:
        """A training step without the update, and its memory."""
        given = np.zeros((batch, tokens), np.int64)
        # Two blocks of each kind: the activations of a block are freed while the next one is computed.
        twice = replace(self.decoder, layers=tuple(each for each in self.decoder.layers for _ in range(2)))
        with np.errstate(divide="ignore", invalid="ignore"):
            counts = counted(lambda: twice.loss_and_gradient(given, given, recompute=recompute))
        timeline = Timeline(counts.marks, self.members)
        first = Counts(
            [replace(each, layer=_half(each.layer)) for each in counts.events if not _is_odd(each.layer)],
            [replace(each, layer=_half(each.layer)) for each in counts.passes if not _is_odd(each.layer)],
        )
        return self._phase("training", first, batch, 0, tokens, timeline.peak), timeline

    def _phase(self, name: str, counts: Counts, batch: int, before: int, after: int, peak: int) -> PlanPhase:
        heads = batch * self.config.num_attention_heads
        pairs = {
            window: (heads * _visible(window, before, after), heads * (after - before) * after)
            for window in {*self.windows, None}
        }
        steps = tuple(self._steps(counts.events, pairs))
        return PlanPhase(name, batch, after - before, after, steps, tuple(self._elementwise(counts)), peak)

    def _steps(
        self, events: Sequence[Event], pairs: Mapping[int | None, tuple[int, int]]
    ) -> Iterator[PlanStep]:
        """Yield one step for all calls of an equation in one role; pairs: window -> pairs of queries and keys
        that are visible, and all of them."""
        alike: defaultdict[Any, list[Event]] = defaultdict(list)
        for event in events:
            role = role_of(event, self.matrices)
            alike[event.layer, event.path, role, event.equation].append(event)
        # Pairs of a query and a key in the tiles of all heads: those of equations that use each tile once.
        tiles: dict[tuple[int | None, Path], int] = {}
        for (layer, path, _, _), calls in alike.items():
            if computed := _pairs(calls):
                tiles[layer, path[:-1]] = min(computed, tiles.get((layer, path[:-1]), computed))
        for (layer, path, role, equation), calls in alike.items():
            window = None if layer is None else self.windows[layer]
            once = tiles.get((layer, path[:-1]), 0)
            yield self._step(path, role, equation, calls, layer, pairs[window], once)

    def _step(
        self,
        path: Path,
        role: str,
        equation: str,
        calls: Sequence[Event],
        layer: int | None,
        pairs: tuple[int, int],
        once: int,
    ) -> PlanStep:
        """once: pairs of a query and a key in all tiles."""
        parsed = Equation.parse(equation)
        flops = sum(call.flops for call in calls)
        sizes = {letter: max(call.sizes[letter] for call in calls) for letter in parsed.letters}
        causal = dense = flops
        if computed := _pairs(calls):
            # The backward pass uses this equation twice per tile: for the scores, and for their gradient.
            products = round(computed / once)
            causal, dense = (flops * products * heads_pairs // computed for heads_pairs in pairs)
        weight, cached, other = (sum(each) for each in zip(*map(self._bytes, calls)))
        layers = () if layer is None else self.members[layer]
        dtype = self.types.get(calls[0].weight or "", "float32")
        return PlanStep(
            path,
            role,
            equation,
            sizes,
            dtype,
            layers,
            len(calls),
            flops,
            causal,
            dense,
            weight,
            cached,
            other,
        )

    def _bytes(self, event: Event) -> tuple[int, int, int]:
        """The bytes of weights, of cached keys and values, and of other arrays of a call."""
        parsed, cached = Equation.parse(event.equation), event.path[0] in ("prefill", "decode")
        itemsize = np.dtype(event.dtype).itemsize
        weight = kv = 0
        other = event.bytes_written
        for term in parsed.inputs:
            size = itemsize * prod(event.sizes[letter] for letter in term)
            is_weight = event.weight is not None and not event.gradient and not set(term) & set("bts")
            if is_weight and event.weight is not None:
                weight += self.nbytes.get(event.weight, size)
            elif cached and "s" in term and "t" not in term and "b" in term:
                kv += size
            else:
                other += size
        return weight, kv, other

    def _elementwise(self, counts: Counts) -> Iterator[Elementwise]:
        for each in counts.passes:
            layers = () if each.layer is None else self.members[each.layer]
            yield Elementwise(each.path, each.function, each.dtype, layers, each.calls, each.elements)


def _pairs(calls: Sequence[Event]) -> int:
    """The pairs of a query and a key in the calls of an equation of attention, over all heads; else 0."""
    return sum(
        prod(call.sizes[letter] for letter in "bkgts") for call in calls if set("bkgts") <= set(call.sizes)
    )


def _visible(window: int | None, before: int, after: int) -> int:
    """The number of pairs of a query at one of these positions and a key that it attends to."""
    mask = Mask(np.arange(before, after), np.arange(after), window)
    blocks = (mask.keys(slice(i, i + 1)) for i in range(after - before))
    return sum(block.stop - block.start for block in blocks)


def _ledgers(
    plain: Model,
    batch: int,
    tokens: int,
    quantization: Quantization | None,
    lora: LoRAConfig,
    moments: int,
    recompute: bool,
    full: Timeline,
) -> Iterator[Ledger]:
    """The memory of training all weights, adapters, and adapters on quantized weights."""
    adapted = with_lora(plain, lora)
    yield _ledger("full", plain.decoder, moments, full)
    # Activations and gradients do not depend on the type of the frozen weights.
    _, timeline = _DryModel(plain.config, adapted).training(batch, tokens, recompute)
    yield _ledger(f"LoRA r={lora.r}", adapted, moments, timeline)
    small = quantization or Quantization.of(QLORA)
    packed = with_lora(replace(plain, decoder=stored_decoder(plain.config, small)), lora)
    yield _ledger(f"LoRA r={lora.r} on {small and small.scheme}", packed, moments, timeline)


def training_memory(
    kind: str, config: ModelConfig, decoder: Decoder, batch: int, tokens: int, recompute: bool, moments: int
) -> Ledger:
    """Return the memory of a training step of a decoder whose weights have only shapes."""
    _, timeline = _DryModel(config, decoder).training(batch, tokens, recompute)
    return _ledger(kind, decoder, moments, timeline)


def _ledger(kind: str, decoder: Decoder, moments: int, timeline: Timeline) -> Ledger:
    arrays = trainable(decoder).values()
    gradients = sum(array.nbytes for array in arrays)
    weights = sum(leaf.nbytes for _, leaf in named_leaves(decoder))
    trained, state = sum(array.size for array in arrays), moments * gradients
    return Ledger(kind, trained, weights, gradients, state, timeline.saved, weights + state + timeline.peak)


QLORA = "W4A16g64"
"""The scheme of the frozen weights if none is given."""
