"""Scores of a model on tasks of lm-evaluation-harness, which is imported on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from einsum_transformer.analysis.quantization import lines_of_types, stored_types
from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError
from einsum_transformer.models.model import Model
from einsum_transformer.tables import columns


@checked
@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of a model on tasks of lm-evaluation-harness."""

    model: str
    quantization: str | None
    kv_cache: tuple[str, str]
    """The types of cached keys and values."""
    harness: str
    """The version of lm-evaluation-harness."""
    documents: Mapping[str, int]
    """Task -> number of documents."""
    num_fewshot: Mapping[str, int]
    """Task -> number of examples in each prompt."""
    scores: Mapping[str, Mapping[str, float]]
    """Task or group of tasks -> metric -> score. The metric of filtered answers is "metric,filter"."""
    standard_errors: Mapping[str, Mapping[str, float]]
    """Task or group -> metric -> standard error, of the metrics for which the harness estimates one."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        rows: list[Sequence[str]] = [("task", "documents", "few-shot", "metric", "score", "")]
        for task, scores in self.scores.items():
            documents, shots = (str(each.get(task, "")) for each in (self.documents, self.num_fewshot))
            for metric, score in scores.items():
                error = self.standard_errors.get(task, {}).get(metric)
                rows.append(
                    (task, documents, shots, metric, f"{score:.4f}", f"+/- {error:.4f}" if error else "")
                )
        settings = [f"lm_eval {self.harness}", *lines_of_types(self.quantization, self.kv_cache)]
        return "\n".join([*columns(rows, (1, 2, 4)), ", ".join(settings)])


def harness() -> Any:
    """Return the module of the model class for the harness. Raises InputError if it is not installed."""
    if find_spec("lm_eval") is None:
        raise InputError(
            'evaluation on tasks needs lm-evaluation-harness: pip install "einsum-transformer[eval]"'
        )
    from einsum_transformer.analysis import lm_eval

    return lm_eval


def evaluate(
    open_model: Callable[[], Model],
    tasks: Sequence[str],
    include_path: str | Path | None,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Evaluation:
    """Return the scores of a model; see `api.evaluate.evaluate`. open_model: called when the tasks are known.
    settings: keywords of the model class; options: of the harness's `simple_evaluate`."""
    model, version, results = harness().run(open_model, tasks, include_path, settings, options)
    return _evaluation(model, version, results)


def _evaluation(model: Model, version: str, found: Mapping[str, Any]) -> Evaluation:
    """The scores in the results of `simple_evaluate`, whose metrics are named "metric,filter"."""
    scores: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or isinstance(value, str):  # a description of the task, or no estimate
                continue
            end = "" if filtered == "none" else f",{filtered}"
            kind = errors if metric.endswith("_stderr") else scores
            kind.setdefault(task, {})[metric.removesuffix("_stderr") + end] = float(value)
    documents = {task: int(counts["effective"]) for task, counts in found["n-samples"].items()}
    shots = {task: int(count) for task, count in found["n-shot"].items()}
    return Evaluation(model.source, *stored_types(model), version, documents, shots, scores, errors)
