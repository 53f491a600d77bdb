"""The phases of the program: their names, their nesting and their labels in tables.

Every `phase(...)` of the package is listed here, and every timing table takes its rows from here.
"""

from __future__ import annotations

Path = tuple[str, ...]

LAYER = ("layer",)
ATTENTION = (*LAYER, "attention")
FEED_FORWARD = (*LAYER, "feed-forward")

PASS: dict[Path, str] = {
    ("embedding",): "embedding",
    LAYER: "layers",
    (*LAYER, "norm"): "norm",
    ATTENTION: "attention",
    (*ATTENTION, "load"): "load",
    (*ATTENTION, "qkv"): "QKV projection",
    (*ATTENTION, "rope"): "RoPE",
    (*ATTENTION, "cache"): "KV cache",
    (*ATTENTION, "scores"): "scores + softmax",
    (*ATTENTION, "output"): "output (mix + projection)",
    FEED_FORWARD: "feed-forward",
    (*FEED_FORWARD, "load"): "load",
    (*FEED_FORWARD, "router"): "router",
    (*FEED_FORWARD, "experts"): "experts",
    (*FEED_FORWARD, "shared expert"): "shared expert",
    (*LAYER, "recomputed"): "recomputed blocks",
    ("head",): "output head",
}
"""The phases of a pass through the model, in the order of a forward pass -> label of the table row."""
COUNTED_AS: dict[Path, Path] = {(*ATTENTION, "mix"): (*ATTENTION, "output")}
"""Phases whose seconds are added to the row of another phase."""
STAGES = ("prefill", "decode")
"""The phases of a generation that run the model."""
GENERATION = ("setup", *STAGES, "draft", "sampling", "text")
TRAINING = ("batch", "forward", "loss", "backward", "share", "workers", "sum", "clipping", "update")
"""A training step. Forward, loss and backward occur if this process computes; share, workers and sum if a
cluster does."""
OPTIMIZER = ("clipping", "update")
NAMES = frozenset({*(path[-1] for path in (*PASS, *COUNTED_AS)), *GENERATION, *TRAINING})
"""The names of all phases."""
