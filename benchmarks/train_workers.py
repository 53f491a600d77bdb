"""The processes that bench_train.py starts, each with one candidate and one kind of training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import machine
import processes
from processes import PREFIX, ROOT, Answer

LEARNING_RATE = 1e-3
LORA_TARGETS = ("q_proj", "v_proj")


class Engine(Protocol):
    """A model that is trained with SGD: a step is forward, loss, backward and update."""

    def versions(self) -> dict[str, str]: ...
    def step(self, rows: list[list[int]]) -> float:
        """Train on rows, each one token longer than the input, and return the loss before the update."""
        ...

    def sgemm(self, size: int) -> float: ...


class Ours:
    """This package on one of its BLAS providers.

    Uses only an API that older checkouts have too, because --against runs them with this file.
    """

    def __init__(self, source: str, adapter: str | None, threads: int, provider: str) -> None:
        # Imported before NumPy, because it configures NumPy's BLAS.
        import einsum_transformer as et  # isort: skip
        import numpy as np
        from workers import choose_library

        from einsum_transformer.engine import blas
        from einsum_transformer.training.loop import Trainer, TrainingSettings
        from einsum_transformer.training.schedule import Schedule

        self.np, self.blas = np, blas
        choose_library(provider, threads)
        self.trainer = Trainer(
            et.load(source, adapter=adapter), self, TrainingSettings(Schedule(LEARNING_RATE, 1, "constant"))
        )

    def versions(self) -> dict[str, str]:
        import einsum_transformer

        provider = self.blas.current()
        versions = {"einsum-transformer": einsum_transformer.__version__, "numpy": self.np.__version__}
        return versions | {provider.name: provider.version}

    def step(self, rows: list[list[int]]) -> float:
        self.rows = self.np.array(rows)
        return self.trainer.step().loss

    def batch(self, step: int) -> list[Any]:
        """The current rows as a batch of a Trainer."""
        return [(self.rows[:, :-1], self.rows[:, 1:])]

    def description(self) -> dict[str, Any]:
        return {"kind": "sent"}

    def sgemm(self, size: int) -> float:
        return machine.sgemm_gflops(self.blas.matmul, lambda a: a, size)


class Torch:
    """transformers, with peft for adapters, in float32 with the default attention, not compiled."""

    def __init__(self, source: str, adapter: str | None, threads: int) -> None:
        import torch  # type: ignore[import-not-found]
        import transformers  # type: ignore[import-not-found]

        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self.torch, self.package, self.peft = torch, transformers, None
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        if adapter is not None:
            import peft  # type: ignore[import-not-found]

            self.peft, model = peft, peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
        self.model = model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE)

    def versions(self) -> dict[str, str]:
        found = {"torch": self.torch.__version__, "transformers": self.package.__version__}
        return found if self.peft is None else found | {"peft": self.peft.__version__}

    def step(self, rows: list[list[int]]) -> float:
        tokens = self.torch.tensor(rows)
        logits = self.model(tokens[:, :-1], use_cache=False).logits
        loss = self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def sgemm(self, size: int) -> float:
        return machine.sgemm_gflops(self.torch.mm, self.torch.from_numpy, size)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row of the tables. checkout: the checkout of this project that it runs, or None."""

    label: str
    engine: Callable[[str, str | None, int], Engine]
    checkout: Path | None


CANDIDATES = {
    "numpy": Candidate("ours, NumPy's BLAS", partial(Ours, provider="numpy"), ROOT),
    "mkl": Candidate("ours, mkl", partial(Ours, provider="mkl"), ROOT),
    "auto": Candidate("ours, auto", partial(Ours, provider="auto"), ROOT),
    "torch": Candidate("torch", Torch, None),
}


def prepare(folder: str, models: dict[str, dict[str, Any]], batch_size: int, seq_len: int) -> dict[str, Any]:
    """Save each model and an adapter for it, and record a step of each kind to count its FLOPs."""
    import numpy as np

    import einsum_transformer as et
    from einsum_transformer.engine import Recorder
    from einsum_transformer.models.adapters import with_lora
    from einsum_transformer.models.lora_config import LoRAConfig
    from einsum_transformer.models.peft import save_adapter

    found = {}
    tokens = np.zeros((batch_size, seq_len), np.int64)
    for name, source in models.items():
        plain = et.load(**source)
        lora = with_lora(plain, LoRAConfig(r=8, target_modules=LORA_TARGETS))
        path, adapter = Path(folder, name), Path(folder, f"{name}-adapter")
        plain.save(path)
        save_adapter(lora, adapter)
        flops = {}
        for kind, model in (("full", plain), ("lora", lora)):
            with Recorder(events=True) as recorder:
                model.decoder.loss_and_gradient(tokens, tokens)
            flops[kind] = sum(event.flops for event in recorder.events)
        facts = {"vocabulary": plain.config.vocab_size, "flops": flops}
        found[name] = facts | {"source": str(path), "adapter": str(adapter)}
    return found


def time_step(engine: Engine, rows: list[list[int]]) -> dict[str, float]:
    start = time.perf_counter()
    loss = engine.step(rows)
    return {"ms": (time.perf_counter() - start) * 1e3, "loss": loss}


REQUESTS: dict[str, Callable[..., Any]] = {
    "step": time_step,
    "sgemm": lambda engine, size: engine.sgemm(size),
    "peak": lambda engine: machine.peak_bytes(),
}


def work(task: dict[str, Any], answer: Answer) -> None:
    if "prepare" in task:
        answer(prepare(**task["prepare"]))
        return
    known = CANDIDATES[task["candidate"].removeprefix(PREFIX)]
    engine = known.engine(task["source"], task["adapter"], task["threads"])
    answer({"versions": engine.versions()})
    processes.serve(engine, answer, REQUESTS)


if __name__ == "__main__":
    processes.run(work)
