"""The phases of the program: their names, how they nest, and what tables call them.

Every `phase(...)` of the package is named here, and every table of seconds takes its lines from here.
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
    (*LAYER, "recomputed"): "blocks run again",
    ("head",): "output head",
}
"""A pass through the model, in the order of a forward pass: phases -> the line of a table."""
COUNTED_AS: dict[Path, Path] = {(*ATTENTION, "mix"): (*ATTENTION, "output")}
"""Phases whose seconds are on the line of another one."""
STAGES = ("prefill", "decode")
"""What a generation spends its passes in."""
GENERATION = ("setup", *STAGES, "draft", "sampling", "text")
TRAINING = ("batch", "forward", "loss", "backward", "share", "workers", "sum", "clipping", "update")
"""A training step. Forward, loss and backward where this process computes; share, workers and sum where a
cluster does."""
OPTIMIZER = ("clipping", "update")
NAMES = frozenset({*(path[-1] for path in (*PASS, *COUNTED_AS)), *GENERATION, *TRAINING})
"""The name of every phase."""
