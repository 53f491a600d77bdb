"""Every command has a Python call with the same result: the table in docs/reference/commands-and-calls.md.

Each row is run as it is written there, its placeholders replaced by a small model and its files.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from typer.main import get_command

import einsum_transformer as et
from command_line import Ran, etx, save_with_tokenizer
from einsum_transformer.analysis import machine, rates
from einsum_transformer.cli.app import _application
from einsum_transformer.loading import hub
from einsum_transformer.models.parameters import trainable
from einsum_transformer.models.peft import save_adapter
from einsum_transformer.tree import named_leaves
from golden_files import FOLDER, load_golden, write_folder
from tiny_models import tiny_model

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "commands-and-calls.md"
COMMANDS: Mapping[str, Any] = get_command(_application()).commands  # type: ignore[attr-defined]

TIMES = {
    "run": {
        *("seconds", "parts_seconds", "outside_seconds", "load_seconds", "p50", "p99", "share"),
        *("time_to_first_token", "time_to_first_token_with_load"),
        *("feed_forward_per_attention", "weight_load_share", "decode_p99_per_p50"),
        *("prompt_tokens_per_second", "new_tokens_per_second", "peak_rss_bytes"),
    },
    "chat": {"seconds"},
    "profile": {"stages", "equations"},
    "machine": {"gflops", "bandwidth", "choice", "date", "rates"},
    "sweep": {
        *("seconds", "seconds_of_each", "peak_bytes"),
        *("exponent", "standard_error", "low", "high", "r_squared"),
    },
    "report": {"measured", "timings", "memory", "training"},
    "train": {
        *("seconds", "outside_seconds", "mean", "p50", "p99", "share"),
        *("tokens_per_second", "peak_rss_bytes", "advice"),
    },
}
TIMES["profile"] |= TIMES["run"]
"""Keys of times and memory, which differ from run to run: they are not compared. The advice of a training
depends on its times."""


KEYS = {
    "run": "model quantization kv_cache text tokens finish_reason prompt_tokens timings table blas threads"
    " kv_cache_bytes peak_rss_bytes rope",
    "profile": "model quantization kv_cache text tokens finish_reason prompt_tokens timings table blas"
    " threads kv_cache_bytes peak_rss_bytes rope stages equations",
    "chat": "model messages turns",
    "explain": "model batch tokens parameters adapters letters steps totals note",
    "plan": "model batch tokens quantization kv_cache parameters active_parameters weight_bytes"
    " kv_bytes_per_token kv_bytes phases training machine inference_bytes devices",
    "diff": "names batch tokens fields parameters components steps flops bytes_moved cache_per_token cache",
    "inspect": "source model_type config used defaulted ignored tensors missing problems parameters"
    " bytes_by_dtype",
    "parity": "model reference tokens tolerance steps not_in_reference not_compared same_choice passed"
    " first_diverging",
    "train": "model steps skipped seconds step stages outside_seconds tables loss_first loss_last loss_trend"
    " tokens_per_second parameters trainable gradient_bytes optimizer_bytes peak_rss_bytes blas threads"
    " advice losses validation folder",
    "merge": "model folder tensors",
    "quantize": "model quantization operations tensors",
    "convert": "file outtype bytes",
    "eval ppl": "model quantization kv_cache convention ctx_size stride chunks tokens perplexity"
    " standard_error negative_log_likelihood bits_per_byte word_perplexity",
    "eval kld": "model quantization kv_cache reference convention ctx_size stride chunks tokens kl_mean"
    " kl_standard_error kl_median kl_p90 kl_p99 kl_max probability_rms same_top perplexity"
    " reference_perplexity",
    "sensitivity": "model by schemes ctx_size chunks tokens bytes_before parts uniform budget mixed curve",
    "precision": "model tokens variants steps drift logits",
    "sweep": "model measure varied repetitions seed threads processor blas points laws",
    "report": "names runs machine letters comparison",
    "gradcheck": "model tolerance loss whole rows filled passed",
    "machine": "processor threads libraries measured bandwidth choice date rates path",
}
"""Keys of the JSON objects, which are part of the public API."""


class Row(NamedTuple):
    """A row of the table."""

    command: str
    words: tuple[str, ...]
    """The arguments after the command."""
    call: str
    result: str
    """The class in the third column, or "" for a path."""

    @property
    def function(self) -> str:
        return re.findall(r"et\.(\w+)", self.call)[0]


def rows() -> list[Row]:
    table = PAGE.read_text(encoding="utf-8").split("## Options")[0]
    found = []
    for line in re.findall(r"^\| `etx .*$", table, flags=re.MULTILINE):
        command, call, result = (cell.strip() for cell in line.strip("| ").split(" | "))
        _, name, *words = shlex.split(command.strip("`"))
        classes = re.findall(r"~einsum_transformer\.(\w+)", result)
        found.append(Row(name, tuple(words), call.strip("`"), classes[0] if classes else ""))
    return found


ROWS = rows()


class Files(NamedTuple):
    """What the placeholders of the table stand for."""

    model: Path
    other: Path
    adapter: Path
    text: Path
    golden: Path
    reference: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    top = tmp_path_factory.mktemp("table")
    base = tiny_model(vocab_size=128, eos_token_id=None)
    folder = save_with_tokenizer(top / "model", base)
    other = save_with_tokenizer(
        top / "other", tiny_model(vocab_size=128, eos_token_id=None, num_hidden_layers=3)
    )
    adapted = et.with_lora(et.load(folder), et.LoRAConfig(r=2))
    rng = np.random.default_rng(1)
    for array in trainable(adapted.decoder).values():
        array[...] = rng.standard_normal(array.shape) * 0.1
    save_adapter(adapted, top / "adapter")
    text = top / "notes.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8, encoding="utf-8")
    golden = load_golden("gpt2_plain")
    write_folder(top / "golden", golden.config, golden.weights)
    reference = FOLDER / "reference_gpt2_plain.npz"
    return Files(folder, other, top / "adapter", text, top / "golden", reference)


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` without --output writes to runs/ in the current folder."""
    monkeypatch.chdir(tmp_path)


def in_json_types(result: Any) -> Any:
    """`to_dict()` as JSON writes it: keys of objects are strings, tuples are arrays."""
    return json.loads(json.dumps(result.to_dict()))


def without(value: Any, names: set[str]) -> Any:
    """The value without these keys, on all levels."""
    if isinstance(value, dict):
        return {name: without(each, names) for name, each in value.items() if name not in names}
    return [without(each, names) for each in value] if isinstance(value, list) else value


def same(command: str, ran: Ran, result: Any, code: int = 0) -> dict[str, Any]:
    """Check that the JSON object equals `to_dict()` of the result, but for times and memory; returns it."""
    assert ran.code == code
    assert all(line.startswith("note: ") for line in ran.err.splitlines()), ran.err
    left_out = TIMES.get(command, set())
    found, expected = ran.json, in_json_types(result)
    assert list(found) == list(expected) == KEYS[command].split()
    assert without(found, left_out) == without(expected, left_out)
    return found


def test_the_table_has_every_command_and_existing_calls() -> None:
    assert {row.command for row in ROWS} == set(COMMANDS)
    for row in ROWS:
        names = re.findall(r"\bet\.(\w+)", row.call)
        assert names, row
        assert set(names) <= set(et.__all__)
        assert row.result in {*et.__all__, ""}
        options = {name for each in COMMANDS[row.command].params for name in each.opts}
        assert {word for word in row.words if word.startswith("-")} <= options
        call = ast.parse(row.call, mode="eval").body
        assert isinstance(call, ast.Call)
        signature = inspect.signature(getattr(et, row.function))
        signature.bind(*call.args, **{str(each.arg): each.value for each in call.keywords})


@pytest.mark.parametrize(
    ("page", "options"),
    re.findall(r"^\| `(-[^|]*)` [^|]*\| `(\w[^|]*)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE),
)
def test_options_beside_each_other_exist(page: str, options: str) -> None:
    """Flags in one of the commands, keywords in `load` or among the options of `generate`."""
    flags = re.findall(r"(?<![\w-])--?[a-z][a-z-]*", page)
    known = {name for command in COMMANDS.values() for each in command.params for name in each.opts}
    assert flags
    assert set(flags) <= known
    keywords = {*inspect.signature(et.load).parameters, *et.GenerationOptions.__annotations__}
    names = re.findall(r"(?<![\w.])([a-z_]+)=", options)
    assert names or options.startswith("dataclasses.replace(")
    assert set(names) <= keywords


def row_of(function: str) -> Row:
    return next(row for row in ROWS if row.function == function)


def both(row: Row, given: dict[str, Any], flags: list[Any], more: dict[str, Any]) -> tuple[Ran, Any]:
    """Run the row: the command with `flags` and --json, then the call with the keywords `more`.

    given: placeholder -> value. A folder that the command writes is moved to "from-the-command".
    """
    words = [given.get(word, word) for word in row.words]
    ran = etx(row.command, *words, *flags, *([] if "--quiet" in words else ["--json"]), stdin=TALK)
    if Path("written").exists():
        shutil.move("written", "from-the-command")
    names = {name.strip('"'): value for name, value in given.items() if name.isidentifier()}
    call = row.call
    for name in ("OWNER/NAME",):
        call = call.replace(f'"{name}"', repr(given.get(name, name)))
    return ran, eval(call.removesuffix(")") + ", **more)", {"et": et, "more": more, "Path": Path, **names})


TALK = "one\ntwo\n"


def of_bytes(folder: Path | str) -> dict[str, bytes]:
    top = Path(folder)
    return {str(file.relative_to(top)): file.read_bytes() for file in top.rglob("*") if file.is_file()}


def test_run(files: Files) -> None:
    given = {"MODEL": files.model, "model": files.model, "TEXT": "abc"}
    flags = ["-n", 6, "--temp", 0.9, "--top-k", 5, "--seed", 3, "--stop", "zz"]
    more = {"max_new_tokens": 6, "temperature": 0.9, "top_k": 5, "seed": 3, "stop": "zz"}
    ran, result = both(row_of("profile"), given, flags, more)
    assert isinstance(result, et.Profile)
    assert len(same("run", ran, result)["tokens"]) == 6
    ran, generation = both(row_of("generate"), given, flags, more)
    assert isinstance(generation, et.Generation)
    assert ran == (0, f"{generation}\n", "")
    assert generation.text == result.text
    streamed = "".join(et.stream(et.load(files.model), "abc", **more))
    assert streamed == generation.text


def test_profile(files: Files) -> None:
    given = {"MODEL": files.model, "model": files.model, "TEXT": "abc"}
    row = next(row for row in ROWS if row.command == "profile")
    ran, result = both(row, given, ["-n", 6, "--seed", 3], {"max_new_tokens": 6, "seed": 3})
    found = same("profile", ran, result)
    assert len(result.equations) == len(found["equations"])
    names = "stage", "role", "equation", "calls", "elements"
    for own, each in zip(sorted(found["equations"], key=str), sorted(map(asdict, result.equations), key=str)):
        assert set(own) == set(each)
    assert sorted([own[name] for name in names] for own in found["equations"] if own["equation"]) == sorted(
        [getattr(each, name) for name in names] for each in result.equations if each.equation
    )


def test_run_of_a_packaged_config(files: Files) -> None:
    """Without a prompt: on random tokens of the same seed."""
    flags = ["--max-layers", 1, "-b", 2, "-n", 2, "--seed", 4]
    ran = etx("run", "fast_lora", *flags, "--json")
    model = et.load("fast_lora", max_layers=1, seed=4)
    found = same("run", ran, et.profile(model, batch_size=2, max_new_tokens=2, seed=4))
    assert [len(tokens) for tokens in found["tokens"]] == [2, 2]


def test_chat(files: Files) -> None:
    given = {"MODEL": files.model, "model": files.model}
    flags = ["-n", 5, "--system-prompt", "x", "--temp", 0]
    more = {"max_new_tokens": 5, "system": "x", "temperature": 0}
    ran, chat = both(row_of("Chat"), given, flags, more)
    assert isinstance(chat, et.Chat)
    turns = [chat.send(line) for line in TALK.split()]
    assert [str(turn) for turn in turns] == [turn.text for turn in chat.turns]
    assert len(same("chat", ran, chat)["turns"]) == 2
    assert etx("chat", files.model, *flags, "--quiet", stdin=TALK).out == "".join(
        f"{turn}\n" for turn in turns
    )


def test_explain(files: Files) -> None:
    given = {"MODEL": files.model, "model": files.model}
    flags = ["-b", 2, "--seq-len", 9, "--backward", "--adapter-path", files.adapter]
    more = {"batch": 2, "tokens": 9, "backward": True, "adapter": files.adapter}
    ran, program = both(row_of("explain"), given, flags, more)
    assert isinstance(program, et.Program)
    assert same("explain", ran, program)["adapters"] > 0
    assert etx("explain", files.model, *flags).out == f"{program}\n"
    assert same("explain", etx("explain", "fast_lora", "--json"), et.explain("fast_lora"))["tokens"] == 128


def test_diff(files: Files) -> None:
    given = {"A": files.model, "B": files.other, "a": files.model, "b": files.other}
    flags, more = ["-b", 2, "--seq-len", 9], {"batch": 2, "tokens": 9}
    ran, comparison = both(row_of("diff"), given, flags, more)
    assert isinstance(comparison, et.Comparison)
    same("diff", ran, comparison)
    assert etx("diff", files.model, files.other, *flags).out == f"{comparison}\n"
    same("diff", etx("diff", "llama", "gemma", "--json"), et.diff("llama", "gemma"))


def test_inspect(files: Files) -> None:
    given = {"MODEL": files.model, "model": files.model}
    ran, inspection = both(row_of("inspect"), given, [], {})
    assert isinstance(inspection, et.Inspection)
    same("inspect", ran, inspection)
    assert etx("inspect", files.model).out == f"{inspection}\n"


def test_inspect_of_a_packaged_config() -> None:
    """And of one that was changed in Python: its values are listed, not those of the file."""
    found = same("inspect", etx("inspect", "fast_lora", "--json"), et.inspect("fast_lora"))
    assert (found["used"]["d_ff"], found["problems"]) == (2048, [])
    assert "prefill_only" not in found["used"]
    config = et.read_run_config("fast_lora")
    changed = et.inspect(dataclasses.replace(config, d_ff=64, prefill_only=True)).used
    assert changed == found["used"] | {"d_ff": 64, "prefill_only": True}
    assert et.inspect(et.RunConfig("llama", n_layers=2)).used == {"arch": "llama", "n_layers": 2}


def test_inspect_of_a_checkpoint_with_problems(files: Files) -> None:
    shutil.copytree(files.model, "broken")
    config = json.loads(Path("broken/config.json").read_text())
    Path("broken/config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    found = same("inspect", etx("inspect", "broken", "--json"), et.inspect("broken"), code=1)
    assert found["problems"]


def test_plan(files: Files) -> None:
    given = {"MODEL": files.model, "model": files.model}
    flags = ["--quantization", "W8A8", "--lora-rank", 4, "--grad-checkpoint"]
    settings = {"quantization": "W8A8", "lora": ALL_LINEAR, "recompute": True}
    ran, result = both(row_of("plan"), given, flags, settings)
    assert isinstance(result, et.Plan)
    same("plan", ran, result)
    text = etx("plan", "fast_lora", "--set", "n_layers=2").out
    assert "before" in text
    assert text.startswith("fast_lora: ")
    changed = json.loads(etx("plan", "fast_lora", "--set", "n_layers=2", "--json").out)
    assert changed["before"]["parameters"] > changed["parameters"]
    assert etx("plan", files.model, "--set", "n_layers=2").code == 2
    assert etx("plan", files.model, "--dtype", "float64").code == 2


ALL_LINEAR = et.LoRAConfig(r=4, target_modules="all-linear")


def test_quantize(files: Files) -> None:
    model = et.load(files.model)
    given = {"MODEL": files.model, "model": model}
    ran, result = both(row_of("quantization_report"), given, ["-o", "small"], {})
    assert isinstance(result, et.QuantizationReport)
    assert ran.err.splitlines()[-1] == "the quantized model is in small"
    found = same("quantize", Ran(ran.code, ran.out, ""), result)
    assert [row["operation"] for row in found["operations"]][-1] == "total"
    held = sum(leaf.nbytes for _, leaf in named_leaves(et.quantize(model, "W4A16g32").decoder))
    assert found["operations"][-1]["weights_held"] == held
    loaded = et.load("small")
    ids = np.arange(9)[None]
    np.testing.assert_array_equal(loaded.logits(ids), et.quantize(model, "W4A16g32").logits(ids))
    flags = ["--quantization", "W3A8", "--method", "gptq", "--calibration", files.text]
    ran = etx("quantize", files.model, *flags, "--calibration-chunks", 2, "-o", "gptq", "--json")
    assert ran.code == 2
    assert "tokens: at least" in ran.err


def test_convert(files: Files) -> None:
    row = row_of("convert")
    path = et.convert(files.model, "called.gguf", "Q8_0")
    ran = etx(row.command, files.model, "--outtype", "q8_0", "-o", "model.gguf", "--json")
    assert json.loads(ran.out) == {
        "file": "model.gguf",
        "outtype": "Q8_0",
        "bytes": path.stat().st_size,
    }
    assert set(json.loads(ran.out)) == set(KEYS["convert"].split())
    assert Path("model.gguf").read_bytes() == path.read_bytes()
    ran = etx("convert", files.model, "-o", "model.gguf")
    assert ran.code == 0
    assert re.search(r"model\.gguf: [\d.]+ kB, with matrices of type F16", ran.err)
    for wrong, message in (
        ((), "--output is required"),
        (("--outtype", "Q3_K", "-o", "a.gguf"), "--outtype is 'Q3_K': expected F32"),
        (("-o", "none/a.gguf"), "the folder none does not exist"),
    ):
        ran = etx("convert", files.model, *wrong)
        assert ran.code == 2
        assert message in ran.err


def test_eval(files: Files) -> None:
    given = {"MODEL": files.model, "model": files.model, "FILE": files.text}
    given |= {"B": files.other, "b": files.other}
    for row in (row_of("perplexity"), row_of("divergence")):
        ran, result = both(row, given, ["-c", 16, "--chunks", 3], {"ctx_size": 16, "chunks": 3})
        assert isinstance(result, et.Perplexity | et.Divergence)
        assert same(f"eval {row.words[0]}", ran, result)["chunks"] == 3
    quantized = etx(
        "eval", "kld", files.model, "-f", files.text, "-c", 16, "--quantization", "W4A16", "--json"
    )
    model = et.load(files.model, quantization="W4A16")
    same("eval kld", quantized, et.divergence(model, files.model, files.text, ctx_size=16))


def test_sensitivity(files: Files) -> None:
    given = {"MODEL": files.model, "model": files.model, "FILE": files.text}
    flags = ["-c", 16, "--chunks", 2, "--by", "layer", "--scheme", "W4A16g32", "--scheme", "W8A16"]
    flags += ["--budget", "30K", "--plot", "pareto.png", "--results", "measured.jsonl"]
    more = {"ctx_size": 16, "chunks": 2, "by": "layer", "schemes": ["W4A16g32", "W8A16"], "budget": 30_000}
    ran, result = both(row_of("sensitivity"), given, flags, more)
    assert isinstance(result, et.Sensitivity)
    assert same("sensitivity", ran, result)["mixed"]["bytes"] <= 30_000
    assert Path("pareto.png").read_bytes()[:4] == b"\x89PNG"
    flags = [each for each in flags if each not in ("--plot", "pareto.png")]
    assert etx("sensitivity", files.model, "-f", files.text, *flags).out == f"{result}\n"


def test_precision(files: Files) -> None:
    given = {"MODEL": files.model, "model": files.model, "FILE": files.text}
    flags, more = ["-c", 24, "--scheme", "W4A16g32"], {"ctx_size": 24, "schemes": ["W4A16g32"]}
    ran, result = both(row_of("precision"), given, flags, more)
    assert isinstance(result, et.Precision)
    found = same("precision", ran, result)
    assert found["variants"] == ["float32", "bfloat16", "W4A16g32"]
    assert etx("precision", files.model, "-f", files.text, *flags).out == f"{result}\n"
    every = etx("precision", files.model, "-f", files.text, *flags, "--every").out
    assert every == f"{result.text(every=True)}\n"
    ran = etx("precision", "fast_lora", "--max-layers", 1, "-c", 8, "--seed", 2, "--scheme", "W8A8", "--json")
    model = et.load("fast_lora", max_layers=1, seed=2)
    same("precision", ran, et.precision(model, schemes=["W8A8"], ctx_size=8, seed=2))


def test_sweep() -> None:
    given = {"CONFIG": "fast_lora", "config": "fast_lora"}
    flags = ["--measure", "none", "--csv", "sweep.csv", "--plot", "sweep.png"]
    ran, result = both(row_of("sweep"), given, flags, {"measure": "none", "csv": "called.csv"})
    assert isinstance(result, et.Sweep)
    assert same("sweep", ran, result) == in_json_types(result)
    assert len(ran.json["points"]) == 3
    assert Path("sweep.csv").read_bytes() == Path("called.csv").read_bytes()
    assert Path("sweep.png").read_bytes()[:4] == b"\x89PNG"
    words = ["--vary", "seq_len=4,8", "--measure", "training", "--repetitions", 2, "--seed", 3]
    words += ["--threads", 1, "--set", "n_layers=1", "--set", "vocab_size=64", "--set", "d_ff=64"]
    ran = etx("sweep", "fast_lora", *words, "--results", "measured.jsonl", "--json")
    config = dataclasses.replace(et.read_run_config("fast_lora"), n_layers=1, vocab_size=64, d_ff=64)
    more = {"measure": "training", "repetitions": 2, "seed": 3, "threads": 1}
    found = same("sweep", ran, et.sweep(config, {"seq_len": [4, 8]}, **more))
    assert all(len(point["measured"]["losses"]) == 2 for point in found["points"])
    again = etx("sweep", "fast_lora", *words, "--results", "measured.jsonl").out
    assert again == f"{et.sweep(config, {'seq_len': [4, 8]}, results='measured.jsonl', **more)}\n"


def test_report(files: Files) -> None:
    given = {"MODEL": files.model, "TEXT": "abc", "FILE": "report.html", "model": files.model}
    flags = ["-n", 3, "--seed", 3, "--tokens-shown", 4, "--training"]
    more = {"max_new_tokens": 3, "seed": 3, "tokens_shown": 4, "training": True}
    ran, result = both(row_of("report"), given, flags, more)
    assert isinstance(result, et.Report)
    (run,) = same("report", ran, result)["runs"]
    assert (run["prompt_tokens"], run["new_tokens"], len(run["tokens"])) == (3, 3, 4)
    assert Path("report.html").read_bytes() == result.html().encode()


def test_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_SECONDS", 1e-4)
    monkeypatch.setattr(machine, "_CACHED", 1 << 20)
    monkeypatch.setattr(machine, "_STREAM", 1 << 20)
    monkeypatch.setattr(rates, "_SECONDS", 1e-4)
    monkeypatch.setattr(rates, "_MODELS", ((128, 1), (256, 1)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert row_of("machine").call == "et.machine()"
    ran, result = etx("machine", "--threads", 2, "--json"), et.machine(threads=2)
    assert isinstance(result, et.Machine)
    found = same("machine", ran, result)
    assert {each["kind"] for each in found["measured"]} == {"vector", "narrow", "matrix", "stack"}
    assert all(each["gflops"] > 0 for each in found["measured"])
    assert "GFLOP/s" in str(result)
    assert "weights in int8 inside of a model" in str(result)
    planned = et.plan("fast_lora", 1, 64)
    assert planned.machine == result.processor
    assert all((each.seconds or 0) > 0 for each in planned.phases)
    assert {"Python", "compute", "memory"} >= {step.bound for step in planned.phase("decode").steps}
    assert "predicted for this machine" in str(planned)
    stored = Path(result.path or "")
    broken = json.loads(stored.read_text())
    broken["rates"]["tile"] = -1
    stored.write_text(json.dumps(broken))
    assert et.plan("fast_lora", 1, 64).machine is None


def test_parity(files: Files) -> None:
    given = {"MODEL": files.golden, "FILE": files.reference, "model": files.golden}
    ran, result = both(row_of("parity"), given, [], {})
    assert isinstance(result, et.Parity)
    assert same("parity", ran, result)["passed"] is True
    assert etx("parity", files.golden, "--reference", files.reference).out == f"{result}\n"


def test_parity_that_diverges(files: Files) -> None:
    golden = load_golden("gpt2_plain")
    name = "transformer.h.1.ln_2.weight"
    folder = write_folder(Path("changed"), golden.config, golden.weights | {name: 2 * golden.weights[name]})
    given = {"MODEL": folder, "FILE": files.reference, "model": folder}
    flags, more = ["--tolerance", 1e-3], {"tolerance": 1e-3}
    ran, result = both(row_of("parity"), given, flags, more)
    found = same("parity", ran, result, code=1)
    assert (found["passed"], found["first_diverging"]) == (False, "transformer.h.1.ln_2")


def test_train(files: Files) -> None:
    """On a text: the same losses, the same report and the same adapter, byte for byte."""
    given = {"MODEL": files.model, "FILE": files.text, "model": files.model}
    flags = ["--lora", "--lora-rank", 4, "--steps", 4, "-b", 2, "--seq-len", 8, "--seed", 5, "--lr", 0.01]
    flags += ["--optimizer", "adamw", "--schedule", "cosine", "--warmup-steps", 1, "--clip-norm", 1]
    flags += ["--eval-every", 2, "--save-every", 2, "--merge", "-o", "written"]
    more = {"lora": et.LoRAConfig(r=4), "steps": 4, "batch_size": 2, "seq_len": 8, "seed": 5, "lr": 0.01}
    more |= {"optimizer": "adamw", "schedule": "cosine", "warmup_steps": 1, "clip_norm": 1.0}
    more |= {"eval_every": 2, "save_every": 2, "merge": True, "output": "written"}
    ran, training = both(row_of("train"), given, flags, more)
    assert isinstance(training, et.Training)
    found = same("train", ran, training)
    assert found["losses"] == list(training.losses.values())
    assert len(set(found["losses"])) == 4
    assert set(found["validation"]) == {"0", "2", "4"}
    command, call = of_bytes("from-the-command"), of_bytes("written")
    assert set(command) == set(call)
    different = {name for name in command if command[name] != call[name]}
    # The times, and when it began.
    assert different <= {"run.json", "metrics.jsonl", "train.log"}
    assert {"step-00000004/adapter_model.safetensors", "merged/model.safetensors"} <= set(command) - different


def test_train_of_a_packaged_config() -> None:
    flags = ["--max-layers", 1, "-b", 2, "--seq-len", 8, "--steps", 3, "--seed", 42, "--fix-batch"]
    ran = etx("train", "fast_lora", *flags, "--json")
    model = et.load("fast_lora", max_layers=1, seed=42)
    training = et.train(model, steps=3, batch_size=2, seq_len=8, seed=42, fix_batch=True)
    TIMES["train"].add("folder")  # only the command writes a log without `output`
    try:
        found = same("train", ran, training)
    finally:
        TIMES["train"].remove("folder")
    assert found["losses"][-1] < found["losses"][0]
    assert Path(ran.json["folder"], "metrics.jsonl").exists()
    assert training.folder is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge(files: Files, dtype: str) -> None:
    given = {"MODEL": files.model, "A": files.adapter, "FOLDER": "written", "model": files.model}
    ran, result = both(row_of("merge"), given, ["--save-dtype", dtype], {"dtype": dtype})
    assert isinstance(result, et.Merge)
    assert len(same("merge", ran, result)["tensors"]) == 4
    written = of_bytes("written")
    assert of_bytes("from-the-command") == written
    assert {"model.safetensors", "config.json", "merged_adapters.json"} <= set(written)
    result.save("saved")
    saved = of_bytes("saved")
    assert all(written[name] == data for name, data in saved.items())

    flags = ["--adapter-path", files.adapter, "--unmerge", "--json"]
    shutil.copytree("written", "whole")
    ran = etx("merge", "whole", *flags, "-o", "base")
    Path("base").rename("base-command")
    back = et.merge("whole", files.adapter, "base", unmerge=True)
    same("merge", ran, back)
    assert of_bytes("base") == of_bytes("base-command")


@pytest.mark.parametrize(("tolerance", "code"), [(1e-6, 0), (1e-30, 1)])
def test_gradcheck(files: Files, tolerance: float, code: int) -> None:
    given = {"MODEL": files.model, "model": files.model}
    flags = ["--tolerance", tolerance, "--parameters", "layers.0", "-b", 3, "--seq-len", 5, "--seed", 2]
    more = {"tolerance": tolerance, "parameters": "layers.0", "batch_size": 3, "seq_len": 5, "seed": 2}
    ran, result = both(row_of("gradcheck"), given, flags, more)
    assert isinstance(result, et.GradCheck)
    found = same("gradcheck", ran, result, code)
    assert found["passed"] is (code == 0)
    assert found["rows"]


def test_gradcheck_of_given_tokens(files: Files) -> None:
    """As lists, with a target that is ignored."""
    found = et.gradcheck(files.model, [[1, 2, 3]], [[2, 3, -100]], parameters="norm")
    assert found.passed
    with pytest.raises(et.InputError, match="id 128 is outside"):
        et.gradcheck(files.model, [[1, 128]], [[2, 3]])
    with pytest.raises(et.InputError, match=r"`targets` have shape \(1, 1\)"):
        et.gradcheck(files.model, [[1, 2]], [[2]])


def test_gradcheck_of_a_packaged_config() -> None:
    flags = ["--max-layers", 1, "--parameters", "self_attn.q_proj", "--seq-len", 3]
    ran = etx("gradcheck", "fast_lora", *flags, "--json")
    options = {"max_layers": 1, "parameters": "self_attn.q_proj", "seq_len": 3}
    same("gradcheck", ran, et.gradcheck("fast_lora", **options))


class Pulls:
    """Replaces the download of hub.py, and records its arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, []

    def __call__(self, repository: str, revision: str | None = None, offline: bool = False) -> Path:
        self.calls.append((repository, revision, offline))
        return self.folder


def test_pull(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    pulls = Pulls(files.model)
    monkeypatch.setattr(hub, "download", pulls)
    given = {"OWNER/NAME": "owner/name"}
    flags, more = ["--revision", "v1", "--offline"], {"revision": "v1", "offline": True}
    ran, path = both(row_of("pull"), given, flags, more)
    assert ran == (0, ran.out, "")
    assert ran.json == {"repo": "owner/name", "path": str(path)}
    assert path == files.model
    assert pulls.calls == [("owner/name", "v1", True)] * 2


def test_pull_of_the_default_model(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub if the package with its file is not installed."""
    pulls = Pulls(files.model)
    monkeypatch.setattr(hub, "download", pulls)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert etx("pull", "smollm2-135m").out == f"{et.pull()}\n" == f"{files.model}\n"
    assert len(set(pulls.calls)) == 1
    assert len(pulls.calls) == 2


def test_pull_of_a_cached_model(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network."""
    import huggingface_hub

    def snapshot_download(repo: str, **options: Any) -> str:
        assert options.get("local_files_only"), "the network is used"
        return str(files.model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    ran = etx("pull", "owner/name", "--offline")
    assert ran == (0, f"{et.pull('owner/name', offline=True)}\n", "")
    assert ran.out == f"{files.model}\n"


def test_every_row_is_tested() -> None:
    """By one of the functions above, which find their row by the function that it calls."""
    tested = set(re.findall(r'row_of\("(\w+)"\)', Path(__file__).read_text(encoding="utf-8")))
    assert {row.function for row in ROWS} <= tested
