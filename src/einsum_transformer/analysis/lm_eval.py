# pyright: reportMissingImports=false
"""The model class of lm-evaluation-harness, registered there as `einsum_transformer`.

This module imports the harness, so it is imported on demand only (`analysis.tasks.harness`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.models  # registers the models of the harness
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from einsum_transformer.analysis.requests import Answer, Answers, Report, Request
from einsum_transformer.arguments import nearest
from einsum_transformer.errors import InputError
from einsum_transformer.loading.hub import DEFAULT_MODEL
from einsum_transformer.loading.load import load
from einsum_transformer.models.model import Model

DEFAULT_BATCH = 8
"""Requests per forward pass for the harness's batch size `auto`."""


@register_model("einsum_transformer")
class _EinsumTransformerLM(LM):
    """A model of this package in lm-evaluation-harness.

    pretrained: a model, or a source that `load` takes. batch_size: requests per forward pass; "auto":
    DEFAULT_BATCH. max_length, add_bos_token, prefix_token_id: see `Answers.of`. progress: called with the
    number of finished requests and their total; None: a progress bar. loading: arguments of `load`, such as
    dtype, quantization, packed and cache_type_k. max_batch_size and device, which the harness
    always gives, are ignored.
    """

    def __init__(
        self,
        pretrained: Model | str = DEFAULT_MODEL,
        batch_size: int | str = 1,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        progress: Callable[[int, int], object] | None = None,
        **loading: Any,
    ) -> None:
        super().__init__()
        size = DEFAULT_BATCH if str(batch_size).startswith("auto") else batch_size
        if isinstance(size, str) and not size.isdecimal():
            raise InputError(f"batch_size is {batch_size!r}: expected a number or auto")
        model = pretrained if isinstance(pretrained, Model) else load(str(pretrained), **loading)
        self.answers: Answers = Answers.of(model, int(size), max_length, add_bos_token, prefix_token_id)
        self.progress: Callable[[int, int], object] | None = progress
        self._template: str | None = None

    @property
    def batch_size(self) -> int:
        """Requests per forward pass."""
        return self.answers.batch_size

    @property
    def max_length(self) -> int:
        """Maximum tokens of context and continuation."""
        return self.answers.max_length

    @property
    def eot_token_id(self) -> int | None:
        """The id of EOS."""
        return self.answers.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        """The source of the tokenizer, in the names of the harness's caches of requests."""
        return self.answers.tokenizer.source.replace("/", "__")

    def tok_encode(self, string: str) -> list[int]:
        """Return the token ids of a text."""
        return self.answers.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the chat template that `apply_chat_template` uses: the default one for True, or that of a
        name; None for False."""
        if chat_template is False:
            return None
        templates = self.answers.tokenizer.chat_templates
        name = "default" if chat_template is True else chat_template
        if name not in templates:
            known = ", ".join(sorted(templates)) or "none"
            raise InputError(f"the model has no chat template {name!r}; its templates: {known}")
        self._template = None if name == "default" else name
        return templates[name]

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text."""
        return self.answers.chat(chat_history, add_generation_prompt, self._template)

    def loglikelihood(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[Answer]:
        """Return log p(continuation | context), and whether greedy decoding gives the continuation."""
        return self._answered(self.answers.loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """Return log p(text)."""
        return self._answered(self.answers.loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """Return the continuations of contexts, up to a stop string."""
        return self._answered(self.answers.generate_until, requests, disable_tqdm)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes to its results about the model."""
        model = self.answers.model
        scheme = model.quantization
        return {
            "model_source": model.source,
            "model_quantization": None if scheme is None else str(scheme.scheme),
            "model_num_parameters": sum(math.prod(weight.stored) for weight in model.weights.values()),
        }

    def _answered(
        self,
        answers: Callable[[Sequence[Request], Report], list[Any]],
        requests: Sequence[Request],
        disable_tqdm: bool,
    ) -> list[Any]:
        """Answer requests, with progress, and store each answer in the cache of the harness."""
        with tqdm(total=len(requests), disable=disable_tqdm or self.progress is not None) as bar:

            def report(kind: str, args: tuple[Any, ...], answer: Any) -> None:
                self.cache_hook.add_partial(kind, args, answer)
                bar.update(1)
                if self.progress is not None:
                    done[0] += 1
                    self.progress(done[0], len(requests))

            done = [0]
            return answers(requests, report)


def run(
    open_model: Callable[[], Model],
    tasks: Sequence[str],
    include_path: str | Path | None,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[Model, str, Mapping[str, Any]]:
    """Return the model, the version of the harness, and its results; arguments as in `tasks.evaluate`."""
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"`include_path` {include_path}: not a folder")
    if not tasks:
        raise InputError("`tasks` is empty: give the name of a task")
    path = None if include_path is None else str(include_path)
    # The index of the harness's own tasks takes seconds: it is read only for tasks that the folder lacks.
    manager = TaskManager(include_path=path, include_defaults=path is None)
    if any(task not in manager.all_tasks for task in tasks):
        manager = TaskManager(include_path=path)
    names = list(dict.fromkeys(name for task in tasks for name in _names(task, manager)))
    model = open_model()
    lm = _EinsumTransformerLM(model, **settings)
    try:
        found = lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=manager, **options)
    except OSError as error:  # a data set that cannot be read or downloaded
        raise InputError(f"{', '.join(names)}: {' '.join(str(error).split())}") from error
    return model, lm_eval.__version__, found


def _names(task: str, manager: Any) -> list[str]:
    """The names of tasks that a name, a pattern such as "mmlu_*", or the path of a YAML file means."""
    if task in manager.all_tasks or (task.endswith(".yaml") and Path(task).is_file()):
        return [task]
    found: list[str] = manager.match_tasks([task])
    if not found:
        raise InputError(
            f"`tasks`: {task!r} is neither a task of the harness nor of `include_path`"
            f"{nearest(task, manager.all_tasks)}"
        )
    return found
