"""A wrong keyword or a value of a wrong type is an InputError that names the argument, everywhere in `et`."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from command_line import save_with_tokenizer
from einsum_transformer.analysis.training import TrainingReport
from einsum_transformer.training.data import Example, arrange
from golden_files import FOLDER, load_golden, write_folder
from tiny_models import tiny_model

NOT_CALLED = {
    "ConfigError": "an exception, which takes any arguments",
    "FormatError": "an exception, which takes any arguments",
    "InputError": "an exception, which takes any arguments",
    "GenerationOptions": "the type of the keywords of generate: a dict when it is called",
    "TrainingObserver": "a class to derive from, whose constructor belongs to the derived class",
    "einsum": "has errors of its own, tested below",
}
CALLABLES = [name for name in et.__all__ if name not in NOT_CALLED]
METHODS = (
    *("Model.logits", "Model.loss_and_gradients", "Model.save"),
    *("Tokenizer.apply_chat_template", "Tokenizer.render_chat", "Tokenizer.encode", "Tokenizer.decode"),
    *("Tokenizer.train", "Tokenizer.from_folder", "Tokenizer.save"),
)
VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


class Unfit:
    """A value that no parameter accepts."""

    def __repr__(self) -> str:
        return "Unfit()"


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[..., Any]]:
    """Name -> its required arguments; of the methods also the bound method as "self"."""
    top = tmp_path_factory.mktemp("valid")
    folder = save_with_tokenizer(top / "model", tiny_model(vocab_size=128, eos_token_id=None))
    model = et.load(folder)
    golden = load_golden("gpt2_plain")
    gpt2 = write_folder(top / "gpt2", golden.config, golden.weights)
    et.save_adapter(et.with_lora(model, et.LoRAConfig(r=2)), top / "adapter")
    config = et.RunConfig("llama", d_model=32, n_layers=2, n_heads=4, d_ff=48, vocab_size=61)
    schedule = et.Schedule(0.1, 2)
    rows = arrange([Example(np.arange(20), np.ones(20, bool), "a text")], 4)
    ids = np.array([[1, 2, 3]])
    reference = FOLDER / "reference_gpt2_plain.npz"
    results = {
        "Attribution": et.logit_attribution(model, ids),
        "Capture": et.capture(model, ids, "layers.0"),
        "Comparison": et.diff(model, model),
        "Effects": et.ablate_heads(model, ids),
        "Generation": et.generate(model, "a", max_new_tokens=1),
        "GradCheck": et.gradcheck(folder, parameters="norm", seq_len=2),
        "Perplexity": et.perplexity(model, "a b c d " * 9, ctx_size=4),
        "Plan": et.plan("fast_lora", 1, 8),
        "QuantizationReport": et.quantization_report(et.quantize(model, "W8A8"), model),
        "Sensitivity": et.sensitivity(model, "a b c d " * 9, ["W8A16"], ctx_size=4),
        "Precision": et.precision(model, None, ["W8A16"], ctx_size=4),
        "Sweep": et.sweep(config, {"seq_len": [4, 8, 16]}, "none"),
        "Divergence": et.divergence(model, model, "a b c d " * 9, ctx_size=4),
        "Evaluation": et.Evaluation("a model", None, ("float32", "float32"), "0.4.13", {}, {}, {}, {}),
        "HeadSummary": et.head_summary(model, ids),
        "Inspection": et.inspect(folder),
        "LogitLens": et.logit_lens(model, ids),
        "Merge": et.merge(model, top / "adapter"),
        "Model": model,
        "ModelConfig": model.config,
        "NextTokens": et.next_tokens(model, ids),
        "Parity": et.parity(gpt2, reference),
        "Profile": et.profile(model, "a", max_new_tokens=1),
        "Program": et.explain(model),
        "Report": et.report(model, "a", max_new_tokens=1),
        "RunConfig": config,
        "Tokenizer": model.tokenizer,
        "Training": et.train(tiny_model(), steps=1, seq_len=4),
    }
    assert isinstance(results["Training"].report, TrainingReport)
    results["Turn"] = et.Turn("a", "b", 0, 1, 1, "stop", 0.1)
    results["Machine"] = et.Machine("a processor", 1, {"numpy": "numpy 1"}, (), 1.0, {}, "2026-01-01")
    results["StepReport"] = et.StepReport(0, 1.0, 1.0, 0.1, 1, 0.1)
    found: dict[str, dict[str, Any]] = {
        name: {each.name: getattr(result, each.name) for each in dataclasses.fields(result)}
        for name, result in results.items()
    }
    settings = et.TrainingSettings(schedule)
    for names, arguments in {
        ("SGD", "AdamW", "LoRAConfig", "Recorder", "available_configs", "load", "pull", "machine"): {},
        ("gradcheck", "explain", "plan", "train", "profile", "report", "inspect", "merge"): {
            "source": folder
        },
        ("Chat", "generate", "stream", "with_lora", "Trainer", "Profiler"): {"model": model},
        ("RandomTokens",): {"vocab_size": 61, "batch_size": 2, "length": 4},
        ("RayWorkers",): {"workers": 2},
        ("Schedule",): {"lr": 0.1, "steps": 2},
        ("TextBatches",): {"rows": rows, "batch_size": 1},
        ("TrainingSettings",): {"schedule": schedule},
        ("next_tokens", "logit_lens", "logit_attribution", "head_summary", "ablate_heads"): {
            "source": folder,
            "prompt": ids,
        },
        ("patch_positions", "attribute_positions"): {"source": folder, "prompt": ids, "other": ids},
        ("capture",): {"source": folder, "prompt": ids, "names": "layers.0"},
        ("patch",): {"source": folder, "prompt": ids, "values": {"layers.0": 0}},
        ("diff",): {"a": config, "b": config},
        ("enable_gqa", "enable_moe", "enable_mqa", "enable_prefill_decode_split"): {"config": config},
        ("enable_quantization", "enable_speculative_decoding"): {"config": config},
        ("quantize",): {"source": folder, "scheme": "W8A16"},
        ("convert",): {"source": folder, "output": top / "converted.gguf"},
        ("parity",): {"source": gpt2, "reference": reference},
        ("quantization_report",): {"model": et.quantize(model, "W8A8")},
        ("perplexity",): {"source": model, "text": "a b c d " * 9, "ctx_size": 4},
        ("sensitivity",): {"source": model, "text": "a b c d " * 9, "ctx_size": 4},
        ("precision",): {"source": model, "ctx_size": 4},
        ("sweep",): {"source": config, "vary": {"seq_len": [4]}, "measure": "none"},
        ("evaluate",): {"source": model, "tasks": "a_task"},
        ("divergence",): {"source": model, "reference": model, "text": "a b c d " * 9, "ctx_size": 4},
        ("read_run_config",): {"path": "llama"},
        ("save_adapter",): {
            "model": et.with_lora(model, et.LoRAConfig(r=2)),
            "folder": top / "saved-adapter",
        },
        ("Model.logits",): {"self": model.logits, "tokens": ids},
        ("Model.loss_and_gradients",): {"self": model.loss_and_gradients, "tokens": ids, "targets": ids},
        ("Model.save",): {"self": model.save, "folder": top / "saved"},
        ("Tokenizer.train",): {"self": et.Tokenizer.train, "texts": ["a"], "vocab_size": 300},
        ("Tokenizer.from_folder",): {"self": et.Tokenizer.from_folder, "folder": folder},
    }.items():
        for name in names:
            found[name] = found.get(name, {}) | arguments
    found["generate"]["prompt"] = found["stream"]["prompt"] = "a"
    found["with_lora"]["config"] = et.LoRAConfig()
    found["Trainer"] |= {"batches": et.RandomTokens(61, 1, 2), "settings": settings}
    found["enable_gqa"]["kv_heads"] = 2
    found["enable_moe"] |= {"num_experts": 2, "top_k": 1}
    found["enable_quantization"]["scheme"] = "W8A8"
    found["enable_speculative_decoding"]["draft_layers"] = 1
    tokenizer: Any = model.tokenizer
    messages = [{"role": "user", "content": "a"}]
    for name, more in {
        "apply_chat_template": {"messages": messages},
        "render_chat": {"messages": messages},
        "encode": {"text": "a"},
        "decode": {"ids": [1]},
        "save": {"folder": top / "tokenizer"},
    }.items():
        found[f"Tokenizer.{name}"] = {"self": getattr(tokenizer, name), **more}

    def call(name: str, **changes: Any) -> Any:
        arguments = found[name] | changes
        function = arguments.pop("self", None) or getattr(et, name)
        return function(**arguments)

    return call


def target(name: str) -> Any:
    first, _, method = name.partition(".")
    return getattr(getattr(et, first), method) if method else getattr(et, first)


def hints(name: str) -> dict[str, Any]:
    """Parameter -> annotation, of the parameters that can be named."""
    called = target(name)
    parameters = inspect.signature(called).parameters.values()
    annotated = inspect.unwrap(called.__init__) if isinstance(called, type) else inspect.unwrap(called)
    found = typing.get_type_hints(called if dataclasses.is_dataclass(called) else annotated)
    return {
        each.name: found.get(each.name, Any)
        for each in parameters
        if each.kind not in VARIADIC and each.name != "self"
    }


def alternatives(hint: Any) -> set[Any]:
    """The types of a union, and of unions in it."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return {each for inner in typing.get_args(hint) for each in alternatives(inner)}
    return {hint}


def unfit_values(hint: Any) -> Iterator[Any]:
    """Values of other types, among them those that Python would take for the right one."""
    yield Unfit()
    kinds = alternatives(hint)
    if not kinds & {str, Path} and not any(typing.get_origin(kind) is typing.Literal for kind in kinds):
        yield "3"
    if int in kinds and float not in kinds:
        yield 1.5
    if kinds & {int, float} and bool not in kinds:
        yield True
    if bool in kinds and int not in kinds:
        yield 1
    if str in kinds:
        yield 3
        yield b"x"
    if type(None) not in kinds:
        yield None
    for kind in kinds:
        origin = typing.get_origin(kind)
        if isinstance(origin, type) and issubclass(origin, typing.Collection):
            yield {3: Unfit()} if issubclass(origin, typing.Mapping) else [Unfit()]


def lists_choices(hint: Any) -> bool:
    """Whether the values are listed: ModelConfig checks these itself (choices.py)."""
    return typing.get_origin(hint) is typing.Literal or any(map(lists_choices, typing.get_args(hint)))


def refusal(call: Callable[..., Any], name: str, **changes: Any) -> str:
    """The message of the error, which every caller can catch as ValueError or as TypeError."""
    with pytest.raises(et.InputError) as caught:
        call(name, **changes)
    assert isinstance(caught.value, TypeError), caught.value
    message = str(caught.value)
    assert "\n" not in message
    return message


TYPED = [
    (name, parameter)
    for name in (*CALLABLES, *METHODS)
    for parameter, hint in hints(name).items()
    if hint is not Any
]
ANY = {
    (name, parameter)
    for name in (*CALLABLES, *METHODS)
    for parameter, hint in hints(name).items()
    if hint is Any
}


@pytest.mark.parametrize("name", [*CALLABLES, *METHODS])
def test_unknown_keywords(valid: Callable[..., Any], name: str) -> None:
    message = refusal(valid, name, no_such_name=1) if accepts_no_others(name) else unknown_option(valid, name)
    assert "`no_such_name`" in message or "'no_such_name'" in message
    for parameter in hints(name):
        if len(parameter) > 3 and accepts_no_others(name):
            message = refusal(valid, name, **{f"{parameter}x": 1})
            assert f"has no argument `{parameter}x`; did you mean `{parameter}`?" in message


def accepts_no_others(name: str) -> bool:
    parameters = inspect.signature(target(name)).parameters.values()
    return all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters)


def unknown_option(call: Callable[..., Any], name: str) -> str:
    """Of functions with the options of `generate`, or the variables of a chat template, which are free."""
    if name.startswith("Tokenizer."):
        call(name, no_such_name=1)
        return "'no_such_name'"
    with pytest.raises(et.InputError) as caught:
        call(name, no_such_name=1)
    return str(caught.value)


@pytest.mark.parametrize(("name", "parameter"), TYPED, ids=lambda each: each)
def test_values_of_wrong_types(valid: Callable[..., Any], name: str, parameter: str) -> None:
    tried = 0
    for value in unfit_values(hints(name)[parameter]):
        if name == "ModelConfig" and lists_choices(hints(name)[parameter]):
            listed = rf"^{parameter} .* is not supported; supported: |`{parameter}` is .*, expected tuple of"
            with pytest.raises(et.InputError, match=listed):
                valid(name, **{parameter: value})
            tried += 1
            continue
        message = refusal(valid, name, **{parameter: value})
        assert f"`{parameter}`" in message, message
        assert repr(value)[:50] in message
        tried += 1
    assert tried


def test_a_missing_argument(valid: Callable[..., Any]) -> None:
    for call, name in ((et.generate, "model"), (et.RandomTokens, "vocab_size"), (et.diff, "a")):
        with pytest.raises(et.InputError, match=f"missing a required argument: '{name}'"):
            call()  # type: ignore[call-arg]
    with pytest.raises(et.InputError, match="too many positional arguments"):
        et.pull("a/b", None, False, 1)  # type: ignore[call-arg]


TOKENS = ("abc", 1.5, [[0.5]], [["a"]], {}, Unfit(), [[1, [2]]])
PROMPTS = (1.5, Unfit(), {}, [1.5], [None], [["a", 1]])
ONE_TOKEN = (1.5, Unfit(), {}, [1, 2, 3], [], "several words", 10**9, -1)
LOOKS = (
    *("capture", "patch", "next_tokens", "logit_lens", "logit_attribution", "head_summary", "ablate_heads"),
    *("patch_positions", "attribute_positions"),
)
FREE = {
    ("generate", "prompt"): (*PROMPTS, None),
    ("stream", "prompt"): (*PROMPTS, None),
    ("profile", "prompt"): PROMPTS,
    ("report", "prompt"): PROMPTS,
    **{(name, "prompt"): (*PROMPTS, None) for name in LOOKS},
    ("patch_positions", "other"): (*PROMPTS, None),
    ("attribute_positions", "other"): (*PROMPTS, None),
    **{(name, "token"): ONE_TOKEN for name in LOOKS if "token" in hints(name)},
    ("capture", "gradient_of"): (*ONE_TOKEN, np.zeros(3)),
    ("gradcheck", "tokens"): TOKENS,
    ("gradcheck", "targets"): TOKENS,
    ("parity", "tokens"): TOKENS,
    ("Model.logits", "tokens"): (*TOKENS, None),
    ("Model.loss_and_gradients", "tokens"): (*TOKENS, None),
    ("Model.loss_and_gradients", "targets"): (*TOKENS, None),
}
"""Values of a wrong type for the parameters whose annotation is Any."""


def test_every_parameter_is_typed_or_tested_here() -> None:
    assert set(FREE) == ANY


@pytest.mark.parametrize(("name", "parameter"), FREE, ids=lambda each: each)
def test_wrong_prompts_and_tokens(valid: Callable[..., Any], name: str, parameter: str) -> None:
    for value in FREE[name, parameter]:
        more = {"tokens": [[1, 2]], "targets": [[2, 3]]} if name == "gradcheck" else {}
        with pytest.raises(et.InputError) as caught:
            valid(name, **more | {parameter: value})
        assert f"`{parameter}`" in str(caught.value), (value, str(caught.value))
        assert "\n" not in str(caught.value)


OPTIONS = typing.get_type_hints(et.GenerationOptions)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["generate", "stream", "profile", "Chat"])
def test_options_of_generation(valid: Callable[..., Any], name: str, option: str) -> None:
    """Of the keys that transformers has and that change no text, any value is accepted."""
    from einsum_transformer.generation.keys import IGNORED

    if option in IGNORED:
        return
    tried = 0
    for value in unfit_values(OPTIONS[option] | None):
        if option in ("prompt_lookup", "num_beams", "num_return_sequences") and value in (True, 1):
            continue
        with pytest.raises(et.InputError) as caught:
            valid(name, **{option: value})
        assert f"`{option}`" in str(caught.value), (value, str(caught.value))
        tried += 1
    assert tried


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("max_new_token", "max_new_tokens"), ("temprature", "temperature"), ("topk", "top_k")],
)
@pytest.mark.parametrize("name", ["generate", "stream", "profile", "Chat"])
def test_a_near_miss_of_an_option(valid: Callable[..., Any], name: str, wrong: str, right: str) -> None:
    with pytest.raises(et.InputError, match=f"{wrong}.*did you mean .{right}.?"):
        valid(name, **{wrong: 1})


def test_wrong_arguments_of_chat_methods(valid: Callable[..., Any]) -> None:
    chat = valid("Chat")
    for method in (chat.send, lambda text: list(chat.stream(text))):
        with pytest.raises(et.InputError, match="`message` is "):
            method(3)


A, B = np.ones((2, 3)), np.ones((3, 2))


@pytest.mark.parametrize(
    ("arguments", "keywords", "words"),
    [
        (("ij,jk->ik", A, B), {"no_such_name": 1}, "'no_such_name'"),
        (("ij,jk->ik", A, B), {"optimise": True}, "'optimise'; did you mean `optimize`?"),
        (("ij,jk->ik", A, B), {"order": 3}, "order=3"),
        (("ij,jk->ik", A, B), {"out": [1]}, "out= must be an array"),
        (("ij,jk->ik", A, B), {"dtype": "float99"}, "dtype='float99'"),
        (("ij,jk->ik", A, B), {"casting": 5}, "casting=5"),
        (("ij,jk->ik", A, B), {"casting": ["safe"]}, "casting="),
        (("ij,jk->ik", A, B), {"optimize": Unfit()}, "optimize"),
        (("ij,jk->ik", A, Unfit()), {}, "operand"),
        (("ij,jk->ik", A, "abc"), {}, "operand"),
        ((3, A, B), {}, "einsum: subscript"),
        ((None, A, B), {}, "einsum: subscript"),
    ],
)
def test_einsum(arguments: tuple[Any, ...], keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(et.InputError) as caught:
        et.einsum(*arguments, **keywords)
    assert words in str(caught.value)
