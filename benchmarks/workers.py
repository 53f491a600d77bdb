"""The processes that bench_generate.py starts, one candidate each.

Each candidate imports its own libraries only, so that the time to its first token does not include others.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import machine
import processes
from processes import PREFIX, ROOT, Answer


class Engine(Protocol):
    """Greedy generation from token ids, one sequence at a time, by one candidate."""

    def versions(self) -> dict[str, str]: ...
    def encode(self, text: str) -> list[int]: ...
    def tokens(self, ids: list[int]) -> Any:
        """Convert ids to the input type of the library."""

    def first(self, tokens: Any) -> int:
        """Return the first token after a prompt, by the generation function of the library."""
        ...

    def prefill(self, tokens: Any) -> int:
        """Return the first token after a prompt, and start a new cache for `step`."""
        ...

    def step(self, token: int) -> int:
        """Append a token to the cache and return the next one."""
        ...

    def sgemm(self, size: int) -> float | None:
        """GFLOP/s of the float32 product of the library, or None if it does not offer one."""


def choose_library(provider: str, threads: int) -> None:
    """Use a BLAS provider. `auto` is measured first, if it was not before and this checkout can."""
    from einsum_transformer.engine import blas

    blas.set_threads(threads)
    blas.use(provider)
    if provider == "auto":
        with suppress(ImportError):  # an older checkout
            from einsum_transformer.loading import libraries

            if libraries.installed_version() and libraries.stored_choice(threads) is None:
                from einsum_transformer.api.machine import machine as measure_machine

                measure_machine(threads)
            libraries.use("auto")


class Ours:
    """This package on one of its BLAS providers.

    Uses only an API that older checkouts have too, because --against runs them with this file.
    """

    def __init__(self, source: str, threads: int, context: int, provider: str) -> None:
        # Imported before NumPy, because it configures NumPy's BLAS.
        import einsum_transformer as et  # isort: skip
        import numpy as np

        from einsum_transformer.engine import blas

        self.np, self.blas, self._generate, self._threads = np, blas, et.generate, threads
        choose_library(provider, threads)
        self.model = et.load(source)

    def versions(self) -> dict[str, str]:
        import einsum_transformer

        provider = self.blas.current()
        versions = {"einsum-transformer": einsum_transformer.__version__, "numpy": self.np.__version__}
        return versions | {provider.name: provider.version}

    def encode(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text)

    def tokens(self, ids: list[int]) -> Any:
        return ids

    def first(self, tokens: Any) -> int:
        return self._generate(self.model, tokens, max_new_tokens=1, temperature=0, ignore_eos=True).tokens[0]

    def prefill(self, tokens: Any) -> int:
        self.cache = self.model.cache(len(tokens) + 128)
        return self._next(tokens)

    def step(self, token: int) -> int:
        return self._next([token])

    def decode_rows(self, rows: list[list[int]], steps: int) -> float:
        """The time of greedy steps of several rows at once, in milliseconds per step."""
        tokens = self.np.array(rows)
        cache = self.model.cache(tokens.shape[1] + steps)
        forward = self.model.decoder.forward
        logits, _ = forward(tokens, cache, "last")
        start = time.perf_counter()
        for _ in range(steps):
            logits, _ = forward(logits[:, -1].argmax(axis=-1)[:, None], cache, "last")
        return (time.perf_counter() - start) * 1e3 / steps

    def _next(self, tokens: list[int]) -> int:
        logits, _ = self.model.decoder.forward(self.np.array([tokens]), self.cache, "last")
        return int(logits[0, -1].argmax())

    def sgemm(self, size: int) -> float | None:
        return machine.sgemm_gflops(self.blas.matmul, lambda a: a, size)

    def stream(self, size: int) -> float:
        self.blas.set_threads(1)
        try:
            return machine.stream_gbs(self._threads, size)
        finally:
            self.blas.set_threads(self._threads)


class Transformers:
    """transformers in float32 with its default attention, on the folder saved by this package."""

    def __init__(self, source: str, threads: int, context: int) -> None:
        import torch  # type: ignore[import-not-found]
        import transformers  # type: ignore[import-not-found]

        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self.torch, self.package = torch, transformers
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    def versions(self) -> dict[str, str]:
        attention = self.model.config._attn_implementation
        return {"torch": self.torch.__version__, "transformers": f"{self.package.__version__} ({attention})"}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids

    def tokens(self, ids: list[int]) -> Any:
        return self.torch.tensor([ids])

    def first(self, tokens: Any) -> int:
        return self.prefill(tokens)

    def prefill(self, tokens: Any) -> int:
        self.cache = None
        return self._next(tokens)

    def step(self, token: int) -> int:
        return self._next(self.torch.tensor([[token]]))

    def _next(self, tokens: Any) -> int:
        with self.torch.inference_mode():
            output = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        return int(output.logits[0, -1].argmax())

    def sgemm(self, size: int) -> float | None:
        return machine.sgemm_gflops(self.torch.mm, self.torch.from_numpy, size)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on the same weights as F32 GGUF, with its default float16 cache."""

    def __init__(self, source: str, threads: int, context: int) -> None:
        import llama_cpp  # type: ignore[import-not-found]
        import numpy as np

        self.np, self.package = np, llama_cpp
        self.model = llama_cpp.Llama(
            source, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def versions(self) -> dict[str, str]:
        return {"llama-cpp-python": self.package.__version__}

    def encode(self, text: str) -> list[int]:
        return self.model.tokenize(text.encode())

    def tokens(self, ids: list[int]) -> Any:
        return ids

    def first(self, tokens: Any) -> int:
        return self.prefill(tokens)

    def prefill(self, tokens: Any) -> int:
        self.model.reset()
        return self._next(tokens)

    def step(self, token: int) -> int:
        return self._next([token])

    def _next(self, tokens: list[int]) -> int:
        self.model.eval(tokens)
        last = self.package.llama_get_logits_ith(self.model.ctx, -1)
        return int(self.np.ctypeslib.as_array(last, (self.model.n_vocab(),)).argmax())

    def sgemm(self, size: int) -> float | None:
        return None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row of the tables. checkout: the checkout of this project that it runs, or None. sources: names of
    the sources that it can load; the first is used for prefill and decode."""

    label: str
    engine: Callable[[str, int, int], Engine]
    checkout: Path | None
    sources: tuple[str, ...]


CANDIDATES = {
    "numpy": Candidate(
        "ours, NumPy's BLAS", partial(Ours, provider="numpy"), ROOT, ("safetensors", "default")
    ),
    "mkl": Candidate("ours, mkl", partial(Ours, provider="mkl"), ROOT, ("safetensors", "default")),
    "auto": Candidate("ours, auto", partial(Ours, provider="auto"), ROOT, ("safetensors", "default")),
    "transformers": Candidate("transformers", Transformers, None, ("safetensors",)),
    "llama.cpp": Candidate("llama.cpp", LlamaCpp, None, ("gguf",)),
}


def random_tokens(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    """Uniformly random token ids, the same for every candidate."""
    return random.Random(seed).choices(range(vocabulary), k=count)


def prepare(model_name: str, folder: str, lengths: list[int]) -> dict[str, Any]:
    """Save the model as safetensors, and as float32 GGUF if its source is GGUF; count bytes and FLOPs."""
    import numpy as np

    import einsum_transformer as et
    from einsum_transformer.engine import Recorder
    from einsum_transformer.generation.decode import prefill
    from einsum_transformer.loading.sources import Options, resolve

    model = et.load(model_name)
    model.save(Path(folder, "safetensors"))
    sources = {"default": model_name, "safetensors": str(Path(folder, "safetensors"))}
    if (path := resolve(model_name, Options())).suffix == ".gguf":
        sources["gguf"] = str(Path(folder, "float32.gguf"))
        write_float32_gguf(path, sources["gguf"])
    flops = {}
    for length in lengths:
        tokens = np.array([random_tokens(length, model.config.vocab_size)])
        with Recorder(events=True) as recorder:
            prefill(model, tokens, model.cache(length))
        flops[str(length)] = sum(event.flops for event in recorder.events)
    parameters = model.named_parameters()
    weights = sum(array.size for array in parameters.values()) * 4
    embedding = model.config.vocab_size * model.config.hidden_size * 4
    read = weights if model.config.tie_word_embeddings else weights - embedding
    facts = {"vocabulary": model.config.vocab_size, "weight_bytes": weights, "bytes_per_token": read}
    return facts | {"sources": sources, "flops": flops}


def write_float32_gguf(source: Path, target: str) -> None:
    """Copy a GGUF file with its metadata (tokenizer, RoPE, ...) and all tensors dequantized."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, dequantize  # type: ignore

    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_file_type(LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def time_prefill(engine: Engine, ids: list[int]) -> dict[str, Any]:
    tokens = engine.tokens(ids)
    start = time.perf_counter()
    token = engine.first(tokens)
    return {"ms": (time.perf_counter() - start) * 1e3, "token": token}


def time_decode(engine: Engine, ids: list[int], steps: int) -> dict[str, Any]:
    """The time of `steps` greedy steps after a prompt, in milliseconds per step.

    All steps count: this package prepares the replay of later steps in the first ones.
    """
    chosen = [engine.prefill(engine.tokens(ids))]
    start = time.perf_counter()
    for _ in range(steps):
        chosen.append(engine.step(chosen[-1]))
    return {"ms": (time.perf_counter() - start) * 1e3 / steps, "tokens": chosen}


def time_rows(engine: Engine, rows: list[list[int]], steps: int) -> float:
    """The time of a step of several rows, in milliseconds (this package only)."""
    assert isinstance(engine, Ours)
    return engine.decode_rows(rows, steps)


REQUESTS: dict[str, Callable[..., Any]] = {
    "rows": time_rows,
    "prefill": time_prefill,
    "decode": time_decode,
    "sgemm": lambda engine, size: engine.sgemm(size),
    "stream": lambda engine, size: engine.stream(size),
}


def work(task: dict[str, Any], answer: Answer) -> None:
    if "prepare" in task:
        answer(prepare(**task["prepare"]))
        return
    known = CANDIDATES[task["candidate"].removeprefix(PREFIX)]
    engine = known.engine(task["source"], task["threads"], task["context"])
    if task.get("fresh"):
        fresh(engine, answer, **task["fresh"])
        return
    answer({"versions": engine.versions()})
    processes.serve(engine, answer, REQUESTS)


def fresh(engine: Engine, answer: Answer, prompt: str, ids: list[int], steps: int) -> None:
    """Answer the first token, then the peak memory after a long prompt and some steps."""
    answer({"token": engine.first(engine.tokens(engine.encode(prompt)))})
    token = engine.prefill(engine.tokens(ids))
    for _ in range(steps):
        token = engine.step(token)
    answer({"peak_bytes": machine.peak_bytes()})


if __name__ == "__main__":
    processes.run(work)
