"""`sweep`: counts, seconds and memory of a model while keys of its config vary, and growth laws."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from einsum_transformer.analysis.dry_plan import adapted_training
from einsum_transformer.analysis.measurements import ResultFile
from einsum_transformer.analysis.plots import check_plot
from einsum_transformer.analysis.step_times import (
    DECODED,
    StepTimes,
    step_times,
    stores_bfloat16,
    with_random_weights,
)
from einsum_transformer.analysis.sweep import Measure, Point, Sweep, growth, named, point_of, shown
from einsum_transformer.api.plan import plan
from einsum_transformer.arguments import checked, nearest
from einsum_transformer.engine import blas
from einsum_transformer.errors import ConfigError, FormatError, InputError
from einsum_transformer.formats.files import check_writable
from einsum_transformer.loading.libraries import processor, use_default
from einsum_transformer.loading.weights import memory
from einsum_transformer.models.run_config import RunConfig, with_keys
from einsum_transformer.models.scheme import Quantization
from einsum_transformer.models.switches import read_run_config
from einsum_transformer.notes import note
from einsum_transformer.tables import quantity

THREADS = "threads"
_MOST = 10_000
_KEYS = (*(each.name for each in dataclasses.fields(RunConfig) if each.name != "source"), THREADS)
_GENERATION = {
    *("max_new_tokens", "temperature", "top_k_sample", "speculative", "draft_layers", "prefill_only"),
    *("hf_repo_id", "weight_file", "strict_load", "lora_merge_after_training"),
}
"""Keys without an effect on the steps that are counted and measured."""
_ADAPTERS = {"lora_rank", "lora_alpha", "lora_target_modules", "use_lora"}


@dataclass(frozen=True, slots=True)
class _Case:
    """A combination of values: the config and the number of threads, and its point without measurement."""

    config: RunConfig
    threads: int
    point: Point

    @property
    def identity(self) -> dict[str, Any]:
        return _keys_of(self.config) | {THREADS: self.threads}


@checked
def sweep(
    source: str | Path | RunConfig,
    vary: Mapping[str, Sequence[Any]],
    measure: Literal["prefill", "decode", "training", "none"] = "prefill",
    *,
    repetitions: int = 5,
    threads: int | None = None,
    seed: int = 0,
    results: str | Path | None = None,
    csv: str | Path | None = None,
    plot: str | Path | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Sweep:
    """Count and measure a model for all combinations of values of some keys, and fit growth laws.

    source: a run config: the name of a packaged config, a JSON file, or a RunConfig. The weights are random.
    vary: key -> values; a key of a run config, or "threads" (of BLAS). The last key varies fastest.

    measure: what is timed besides the counts of `plan`: the "prefill" of `batch_size` rows of `seq_len`
    random tokens, into a cache that is allocated; a "decode" step of one token per row after these; a
    "training" step of SGD on one batch (of the adapters with `use_lora`), with its loss; or "none". A point
    has the median seconds of the `repetitions` after one that is not timed, and the most bytes that NumPy
    allocates in another repetition (by tracemalloc, without the weights and the cache), to compare with the
    plan. Points run one after the other, in this process. threads: BLAS threads, by default the current
    number. seed: of weights and tokens.

    Laws: for each key with three or more numbers above 0, and for each quantity y (seconds, FLOPs, bytes),
    `y = c x^p` is fitted by least squares in logarithms. All combinations of the other keys have the same
    exponent p, each with a factor c of its own; see `Sweep.laws` for p, its 95 % interval and R^2.

    results: a file of JSON lines, written after each point; a second call with the same config, measure and
    machine continues, also with more values or keys. csv, plot: files to write (plot: PNG, needs
    matplotlib). progress: called with the number of finished points and their total.

    All points are planned before the first one runs. Raises InputError for keys and values that a run config
    does not have, for a point that needs more memory than this machine has (not with "none"), and for files
    that cannot be written.
    """
    base = with_random_weights(source if isinstance(source, RunConfig) else read_run_config(source))
    varied = _checked_values(vary)
    if not 1 <= repetitions <= 1000:
        raise InputError(f"`repetitions` is {repetitions}: expected 1 to 1000")
    if seed < 0:
        raise InputError(f"`seed` is {seed}: expected 0 or more")
    for name, path in (("results", results), ("csv", csv), ("plot", plot)):
        if path is not None:
            check_writable(Path(path), name)
    if plot is not None:
        check_plot(plot)
    use_default()
    threads = blas.get_threads() if threads is None else threads
    cases = _cases(base, varied, measure, threads)
    _note_unused(base, varied, measure)
    file = ResultFile(
        None if results is None else Path(results), lambda: _header(base, measure, repetitions, seed)
    )
    points = tuple(_points(cases, measure, repetitions, seed, file, progress))
    found = Sweep(
        base.source,
        measure,
        varied,
        repetitions,
        seed,
        threads,
        processor(),
        blas.description(),
        points,
        growth(points, varied, measure),
    )
    if csv is not None:
        found.write_csv(csv)
    if plot is not None:
        found.plot(plot)
    return found


def _checked_values(vary: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
    """The values in JSON types. Raises InputError for unknown keys, no values and repeated values."""
    if not vary:
        raise InputError('`vary` is empty: expected keys and values, such as {"seq_len": [128, 256, 512]}')
    found: dict[str, tuple[Any, ...]] = {}
    for key, values in vary.items():
        if key not in _KEYS:
            raise InputError(f"`vary` has the unknown key {key!r}{nearest(key, _KEYS)}")
        own = tuple(map(_in_json_types, values))
        if not own:
            raise InputError(f"`vary` {key} has no values: expected one or more")
        texts = [_text(key, value) for value in own]
        if twice := [value for i, value in enumerate(own) if texts[i] in texts[:i]]:
            raise InputError(f"`vary` {key} has the value {shown(twice[0])} twice")
        found[key] = own
    if (count := math.prod(map(len, found.values()))) > _MOST:
        raise InputError(f"`vary` has {count:,} combinations: expected at most {_MOST:,}")
    return found


def _in_json_types(value: Any) -> Any:
    items: Any = value
    if isinstance(value, np.generic):
        return items.item()
    return list(items) if isinstance(value, tuple) else value


def _text(key: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        raise InputError(f"`vary` {key} has the value {value!r:.60}, which is not a JSON value") from None


def _cases(
    base: RunConfig,
    varied: Mapping[str, Sequence[Any]],
    measure: Measure,
    threads: int,
) -> list[_Case]:
    """The planned combinations, in order. Raises InputError for those that cannot be run."""
    for count in varied.get(THREADS, (threads,)):
        _check_threads(count)
    made: list[tuple[dict[str, Any], RunConfig]] = []
    for combination in product(*varied.values()):
        values = dict(zip(varied, combination))
        keys = {key: value for key, value in values.items() if key != THREADS}
        with _of_point(values):
            config = with_random_weights(with_keys(base, keys))
            _check_config(config, measure)
        made.append((values, config))
    planned: dict[str, Point] = {}
    found: list[_Case] = []
    for values, config in made:
        name = repr(config)
        if name not in planned:
            with _of_point(values):
                planned[name] = _planned(config)
        point = replace(planned[name], values=values)
        if measure != "none":
            _check_memory(point, measure)
        found.append(_Case(config, values.get(THREADS, threads), point))
    return found


@contextmanager
def _of_point(values: Mapping[str, Any]) -> Generator[None]:
    """Begin the message of an InputError with the combination of values."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{named(values)}: {error}") from None


def _check_threads(count: Any) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"`threads` is {shown(count)}: expected an integer, 1 or more")
    with _using(count):
        if (most := blas.get_threads()) != count:
            raise InputError(f"`threads` is {count}: this BLAS uses at most {most}")


def _check_config(config: RunConfig, measure: Measure) -> None:
    model = config.model_config()
    quantized = Quantization.of(config.quantization) is not None
    if config.weight_dtype == "float64":
        raise ConfigError(f"{config.source}: weight_dtype float64 cannot be planned: use float32")
    if measure == "training" and quantized and not config.use_lora:
        raise ConfigError(
            f"{config.source}: quantized weights cannot be trained: set use_lora, or no quantization"
        )
    longest = config.seq_len + (DECODED if measure == "decode" else 0)
    if model.learned_positions and longest > model.max_position_embeddings:
        known = model.max_position_embeddings
        raise ConfigError(f"{config.source}: {longest} tokens exceed the {known} learned positions")


def _planned(config: RunConfig) -> Point:
    model, lora = config.model_config(), config.lora
    found = plan(config, dtype="bfloat16" if stores_bfloat16(config) else "float32", optimizer="sgd")
    adapted, ledger = None, 0
    if lora is not None:
        ledger = 1 if Quantization.of(config.quantization) is None else 2
        adapted = adapted_training(model, config.source, config.batch_size, config.seq_len, lora)
    return point_of({}, model, found, adapted, ledger)


def _check_memory(point: Point, phase: str) -> None:
    if (needed := point.phases[phase].memory_bytes) > (present := memory()):
        raise InputError(
            f"{named(point.values)}: {phase} needs {quantity(needed, 'B')} by its plan, and the machine has "
            f"{quantity(present, 'B')}; `measure` none counts without running"
        )


def _note_unused(base: RunConfig, varied: Mapping[str, Sequence[Any]], measure: Measure) -> None:
    trains = measure in ("training", "none")
    adapts = trains and (base.use_lora or True in varied.get("use_lora", ()))
    for key in varied:
        unused = key in _GENERATION or (key in _ADAPTERS and not adapts)
        if (
            unused
            or (key == "learning_rate" and measure != "training")
            or (key == THREADS and measure == "none")
        ):
            note(f"`vary` {key}: has no effect on these points")


def _points(
    cases: Sequence[_Case],
    measure: Measure,
    repetitions: int,
    seed: int,
    file: ResultFile,
    progress: Callable[[int, int], object],
) -> Iterator[Point]:
    """Measure the points that the file does not contain."""
    stored = list(_stored(file))
    for i, case in enumerate(cases):
        if measure == "none":
            yield case.point
        else:
            identity = case.identity
            times = next((times for values, times in stored if values == identity), None)
            if times is None:
                with _using(case.threads):
                    times = step_times(case.config, measure, repetitions, seed)
                file.add({"point": identity, "measured": asdict(times)})
            yield replace(case.point, measured=times)
        progress(i + 1, len(cases))


def _stored(file: ResultFile) -> Iterator[tuple[dict[str, Any], StepTimes]]:
    """Yield the identity and the measurement of each point in a file."""
    for i, record in enumerate(file.records, start=2):
        try:
            raw: dict[str, Any] = dict(record["measured"])
            for name in ("seconds_of_each", "losses"):
                raw[name] = tuple(raw[name])
            found = dict(record["point"]), StepTimes(**raw)
            known = math.isfinite(found[1].seconds) and found[1].seconds > 0 and found[1].peak_bytes > 0
        except (TypeError, KeyError, ValueError):
            raise FormatError(f"{file.path}: line {i} is not a point of a sweep") from None
        if not known:
            raise FormatError(f"{file.path}: line {i} is not a point of a sweep")
        yield found


@contextmanager
def _using(threads: int) -> Generator[None]:
    """Use this number of BLAS threads."""
    before = blas.get_threads()
    blas.set_threads(threads)
    try:
        yield
    finally:
        blas.set_threads(before)


def _keys_of(config: RunConfig) -> dict[str, Any]:
    """The keys of a config in JSON types."""
    keys = asdict(config) | {"lora_target_modules": list(config.lora_target_modules)}
    del keys["source"]
    return keys


def _header(base: RunConfig, measure: str, repetitions: int, seed: int) -> dict[str, Any]:
    """What the measurements of a file have in common."""
    try:
        package = version("einsum-transformer")
    except PackageNotFoundError:
        package = "not installed"
    return {
        "config": _keys_of(base),
        "measure": measure,
        "repetitions": repetitions,
        "seed": seed,
        "package": package,
        "processor": processor(),
        "blas": blas.description(),
    }
