"""The processes that bench_quantized.py starts, one candidate each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
from machine import touch_memory
from processes import Answer
from workers import LlamaCpp, Ours, Transformers, prepare, time_decode, time_prefill

FTYPES = {"Q8_0": 7, "Q4_0": 2}
"""llama.cpp's numbers of the types of a file."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """kind: "ours", "transformers" or "llama.cpp". form: a dtype or scheme, a dtype, or a type of GGUF."""

    label: str
    kind: str
    form: str


CANDIDATES = {
    "float32": Candidate("ours, float32", "ours", "float32"),
    "bfloat16": Candidate("ours, bfloat16", "ours", "bfloat16"),
    "W8A8": Candidate("ours, W8A8", "ours", "W8A8"),
    "W8A16": Candidate("ours, W8A16", "ours", "W8A16"),
    "W4A16g64": Candidate("ours, W4A16g64", "ours", "W4A16g64"),
    "W4A8g64": Candidate("ours, W4A8g64", "ours", "W4A8g64"),
    "Q8_0": Candidate("ours, a file in Q8_0, packed", "ours", "Q8_0"),
    "Q4_0": Candidate("ours, a file in Q4_0, packed", "ours", "Q4_0"),
    "llama.cpp F32": Candidate("llama.cpp, F32", "llama.cpp", "F32"),
    "llama.cpp Q8_0": Candidate("llama.cpp, Q8_0", "llama.cpp", "Q8_0"),
    "llama.cpp Q4_0": Candidate("llama.cpp, Q4_0", "llama.cpp", "Q4_0"),
    "transformers": Candidate("transformers, bfloat16", "transformers", "bfloat16"),
}


def requantize(source: str, target: str, form: str) -> None:
    """Write a GGUF file with the matrices in another type, by llama.cpp."""
    import llama_cpp  # type: ignore[import-not-found]

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.pure = FTYPES[form], True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings):
        raise ValueError(f"llama.cpp could not write {form}")


def opened(candidate: Candidate, source: str, threads: int, context: int) -> tuple[Any, int | None]:
    """The engine, and the bytes of its weights if they are known."""
    if candidate.kind == "llama.cpp":
        return LlamaCpp(source, threads, context), Path(source).stat().st_size
    if candidate.kind == "transformers":
        engine = Transformers(source, threads, context)
        engine.model = engine.model.to(engine.torch.bfloat16)
        return engine, sum(each.numel() * each.element_size() for each in engine.model.parameters())
    engine = Ours.__new__(Ours)  # with another way of loading
    import numpy as np

    import einsum_transformer as et
    from einsum_transformer.engine import blas
    from einsum_transformer.tree import named_leaves

    engine.np, engine.blas, engine._generate, engine._threads = np, blas, et.generate, threads
    blas.set_threads(threads)
    settings: dict[str, Any] = {"dtype": candidate.form}
    if candidate.form.startswith("W"):
        settings = {"quantization": candidate.form}
    elif candidate.form in FTYPES:
        settings = {"packed": True}
    engine.model = et.load(source, **settings)
    return engine, sum(weight.nbytes for _, weight in named_leaves(engine.model.decoder))


def work(task: dict[str, Any], answer: Answer) -> None:
    if "prepare" in task:
        answer(prepare(**task["prepare"]))
        return
    if "requantize" in task:
        requantize(**task["requantize"])
        answer("written")
        return
    touch_memory(1_000_000_000)
    engine, held = opened(CANDIDATES[task["candidate"]], task["source"], task["threads"], task["context"])
    answer({"versions": engine.versions(), "bytes": held})
    processes.serve(engine, answer, {"prefill": time_prefill, "decode": time_decode})


if __name__ == "__main__":
    processes.run(work)
