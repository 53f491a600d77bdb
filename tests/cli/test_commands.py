"""The commands on tiny models: what they write where, and with which exit code they leave."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from command_line import save_with_tokenizer
from einsum_transformer.api.profile import DEFAULT_PROMPT
from einsum_transformer.cli.app import main
from einsum_transformer.engine import blas
from tiny_models import successor_model, tiny_model

ROOT = Path(__file__).parents[2]
RUN = {
    "arch": "llama",
    "// note": "tiny",
    "d_model": 32,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 48,
    "vocab_size": 101,
    "batch_size": 2,
    "seq_len": 12,
    "max_new_tokens": 20,
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


class Etx:
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: Any, stdin: str = "") -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, captured.out, captured.err


@pytest.fixture
def etx(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Etx]:
    settings, threads = blas.settings(), blas.get_threads()
    yield Etx(capsys, monkeypatch)
    blas.use(*settings)
    blas.set_threads(threads)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(RUN), encoding="utf-8")
    return path


def save(folder: Path, model: et.Model, template: str | None = None) -> Path:
    """A folder with one token for each byte of ASCII."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled = [byte_level.pre_tokenize_str(chr(byte))[0][0] for byte in range(128)]
    backend = Tokenizer(models.BPE({text: byte for byte, text in enumerate(spelled)}, []))
    backend.pre_tokenizer, backend.decoder = byte_level, decoders.ByteLevel()
    model.save(folder)
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that goes on with the next character of ASCII, and has a chat template."""
    return save(tmp_path_factory.mktemp("speller"), successor_model(128), TEMPLATE)


@pytest.fixture(scope="module")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, whose answers depend on everything before them."""
    return save(tmp_path_factory.mktemp("babbler"), tiny_model(vocab_size=128, eos_token_id=None), TEMPLATE)


def test_text_goes_to_stdout_and_the_table_to_stderr(etx: Etx, speller: Path) -> None:
    code, out, err = etx("run", speller, "-p", "abc", "-n", 5)
    assert (code, out) == (0, "defgh\n")
    for line in (
        "prefill",
        "  attention",
        "    scores + softmax",
        "residuals and Python",
        "RoPE: base 10000",
    ):
        assert line in err


def test_text_is_written_as_it_comes(etx: Etx, speller: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    monkeypatch.setattr("einsum_transformer.cli.output.write", pieces.append)
    etx("run", speller, "-p", "abc", "-n", 3, "--quiet")
    assert pieces == ["d", "e", "f", "\n"]


def test_quiet_writes_the_text_alone(etx: Etx, speller: Path) -> None:
    assert etx("run", "-m", speller, "-p", "abc", "--max-new-tokens", 5, "--quiet") == (0, "defgh\n", "")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--stop", "g", "--stop", "z"], "def"),
        (["--ctx-size", "6"], "defg"),
        (["-n", "0"], ""),
        (["--temp", "0.7", "--top-k", "3", "--seed", "1"], "defgh"),
        (["--dtype", "float64", "--prefill-step-size", "1", "--blas", "numpy", "-t", "1"], "defgh"),
        (["--weight-budget", "40K"], "defgh"),
        (["--chat"], ";<=>?"),
        (["--chat", "--system-prompt", "x"], ";<=>?"),
    ],
)
def test_flags_reach_the_generation(etx: Etx, speller: Path, flags: list[str], text: str) -> None:
    assert etx("run", speller, "-p", "abc", "-n", 5, "--quiet", *flags) == (0, f"{text}\n", "")


def test_threads_are_set(etx: Etx, config: Path) -> None:
    for count in (2, 1):
        told = json.loads(etx("run", config, "--num-threads", count, "-n", 1, "--json")[1])
        assert told["threads"] == count


def test_prompts_from_a_file_and_from_stdin(etx: Etx, speller: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("xy", encoding="utf-8")
    assert etx("run", speller, "--prompt-file", path, "-n", 2, "--quiet")[1] == "z{\n"
    assert etx("run", speller, "-p", "-", "-n", 2, "--quiet", stdin="12")[1] == "34\n"


@pytest.mark.parametrize("prompt", ["a\r\nb\r\n", "a\rb", "\n\r", "\ufeffab"])
def test_line_ends_of_a_prompt_stay_and_a_byte_order_mark_goes(
    etx: Etx, speller: Path, tmp_path: Path, prompt: str
) -> None:
    """From a file and from a pipe, whose text layer would turn CRLF into LF."""
    path = tmp_path / "prompt.txt"
    path.write_bytes((prompt + "c").encode())
    due = [ord(character) for character in prompt.removeprefix("\ufeff") + "c"]
    told = json.loads(etx("run", speller, "--prompt-file", path, "-n", 1, "--json")[1])
    assert told["prompt_tokens"] == due
    with path.open(encoding="utf-8") as file:
        etx.monkeypatch.setattr(io, "StringIO", lambda _: file)
        told = json.loads(etx("run", speller, "-p", "-", "-n", 1, "--json")[1])
    assert told["prompt_tokens"] == due


def test_a_pipe_that_is_no_utf_8(etx: Etx, speller: Path, tmp_path: Path) -> None:
    (tmp_path / "latin1").write_bytes("caf\u00e9".encode("latin-1"))
    with (tmp_path / "latin1").open(encoding="utf-8") as file:
        etx.monkeypatch.setattr(io, "StringIO", lambda _: file)
        code, _, err = etx("run", speller, "-p", "-", "-n", 1, "--quiet")
    assert (code, err) == (2, "error: --prompt -: not UTF-8 text (byte 3)\n")


def test_an_empty_prompt_is_the_bos_that_the_tokenizer_adds(etx: Etx, speller: Path, tmp_path: Path) -> None:
    """As in transformers, and with the same tokens as from Python; refused where nothing is added."""
    from tokenizers import Tokenizer, processors

    empty = tmp_path / "empty.txt"
    empty.write_text("", encoding="utf-8")
    for flags in (("-p", ""), ("--prompt-file", empty)):
        code, _, err = etx("run", speller, *flags, "--quiet")
        assert (code, err) == (
            2,
            f"error: {'--prompt' if flags[0] == '-p' else flags[0]}: "
            "the prompt is empty: give at least one character\n",
        )
    folder = save(tmp_path / "bos", successor_model(128))
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing("a $A", "a $A $B", [("a", 97)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "a"}', encoding="utf-8")
    for flags in (("-p", ""), ("--prompt-file", empty)):
        told = json.loads(etx("run", folder, *flags, "-n", 3, "--json")[1])
        assert (told["prompt_tokens"], told["text"]) == ([97], "bcd")
    model = et.load(folder)
    assert et.generate(model, "", max_new_tokens=3).text == "bcd"
    assert [result.prompt_tokens for result in et.generate(model, ["", "x"], max_new_tokens=1)] == [
        [97],
        [97, 120],
    ]
    told = json.loads(etx("run", folder, "-p", "ax", "-n", 1, "--json")[1])
    assert told["prompt_tokens"] == et.generate(model, "ax", max_new_tokens=1).prompt_tokens == [97, 120]


def test_run_obeys_generation_config_and_flags_win(etx: Etx, speller: Path, tmp_path: Path) -> None:
    folder = save(tmp_path, successor_model(128))
    stated = {"suppress_tokens": [ord("e")], "stop_strings": "k", "max_length": 12, "num_beams": 4}
    (folder / "generation_config.json").write_text(json.dumps(stated), encoding="utf-8")
    code, out, err = etx("run", folder, "-p", "abc")
    assert code == 0
    assert out.startswith("d")
    assert "e" not in out
    assert len(out) <= 10
    assert err.count("num_beams = 4") == 1
    assert "num_beams" not in etx("run", folder, "-p", "abc", "--quiet")[2]
    assert etx("run", folder, "-p", "ghi", "--quiet")[1] == "j\n"
    assert etx("run", folder, "-p", "ghi", "--quiet", "--stop", "m")[1] == "jkl\n"
    assert etx("run", folder, "-p", "ghi", "--quiet", "--stop", "zz", "-n", "12")[1] == "jklmnopqrstu\n"


def test_the_context_of_a_rope_model_is_no_bound(etx: Etx, tmp_path: Path) -> None:
    """Neither of the text, nor of --ctx-size, nor of a prefill; each is noted once."""
    short = successor_model(128, max_position_embeddings=8)
    folder = save(tmp_path / "short", short)
    for flags, out in (
        (("-n", 12), "defghijklmno\n"),
        (("-n", 12, "-c", 64), "defghijklmno\n"),
        (("-n", 12, "-c", 8), "defghi\n"),
    ):
        code, text, err = etx("run", folder, "-p", "abc", *flags)
        assert (code, text) == (0, out)
        assert err.count("trained length of 8 tokens") == (out != "defghi\n")
    code, _, err = etx("run", folder, "-p", "abcdefghijkl", "--prefill-only")
    assert code == 0
    assert err.count("trained length of 8 tokens") == 1


def test_token_ids_from_a_file(etx: Etx, speller: Path, tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.array([[65, 66], [97, 98]], np.uint16))
    code, out, _ = etx("run", speller, "--tokens", path, "-n", 3)
    assert (code, out) == (0, "row 0: CDE\nrow 1: cde\n")
    np.save(path, np.array([65, 66]))
    assert etx("run", speller, "--tokens", path, "-n", 3, "--quiet")[1] == "CDE\n"


def test_without_a_prompt_a_chat_model_is_asked_a_question(etx: Etx, speller: Path) -> None:
    code, out, err = etx("run", speller, "-n", 3)
    assert (code, out) == (0, ";<=\n")
    assert f"no prompt is given; the default as a chat: {DEFAULT_PROMPT}" in err
    assert etx("run", speller, "-n", 3, "--raw", "--quiet") == (0, "@AB\n", "")


def test_json_is_one_object(etx: Etx, speller: Path) -> None:
    code, out, err = etx("run", speller, "-p", "abc", "-n", 5, "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert (told["text"], told["finish_reason"]) == ("defgh", "length")
    assert (told["tokens"], told["prompt_tokens"]) == ([100, 101, 102, 103, 104], [97, 98, 99])
    parts = sum(row["seconds"] for row in told["table"] if row["part"])
    assert parts == pytest.approx(told["timings"]["parts_seconds"])
    assert parts + told["timings"]["outside_seconds"] == pytest.approx(told["timings"]["seconds"])
    assert told["timings"]["prompt_tokens"] == 3
    assert told["blas"]
    assert told["rope"]["base"] == 10000


def test_the_quantization_is_in_every_output(etx: Etx, config: Path) -> None:
    for flags, expected in (
        (["--quantization", "W4A16"], "W4A16g64 (real)"),
        (["--quantization", "W8A8", "--quantization-mode", "simulated"], "W8A8,channel (simulated)"),
        (["--set", "quantization=W8A16", "--quantization-exclude", "down_proj"], "W8A16,channel (real)"),
        (["--set", "quantization=W8A16", "--quantization", "none"], None),
    ):
        code, out, err = etx("run", config, "-n", 2, *flags)
        assert code == 0
        assert (f"weights quantized to {expected}" in err) == (expected is not None)
        assert ("quantized to" in err) == (expected is not None)
        code, out, _ = etx("run", config, "-n", 2, "--json", *flags)
        assert json.loads(out)["quantization"] == expected


def test_types_of_the_cache(etx: Etx, config: Path) -> None:
    flags = ["run", config, "-n", 2, "-ctk", "q8_0", "--cache-type-v", "int4"]
    code, _, err = etx(*flags)
    assert code == 0
    assert "KV cache: keys int8, values int4" in err
    full = json.loads(etx("run", config, "-n", 2, "--json")[1])
    found = json.loads(etx(*flags, "--json")[1])
    assert found["kv_cache"] == ["int8", "int4"]
    assert full["kv_cache"] == ["unchanged", "unchanged"]
    assert found["kv_cache_bytes"] < 0.6 * full["kv_cache_bytes"]


def test_weights_in_bfloat16(etx: Etx, config: Path) -> None:
    """By a flag, or by the key of the config."""
    flag = json.loads(etx("run", config, "-n", 3, "--json", "--dtype", "bfloat16")[1])
    key = json.loads(etx("run", config, "-n", 3, "--json", "--set", "weight_dtype=bfloat16")[1])
    assert flag["tokens"] == key["tokens"]
    code, _, err = etx("run", config, "--dtype", "int8")
    assert code == 2
    assert "--dtype is 'int8': expected float32, float64, bfloat16" in err


def test_adapters_on_quantized_weights(etx: Etx, config: Path) -> None:
    flags = ["train", config, "--lora", "--quantization", "W4A16", "--steps", 2, "--json"]
    code, out, err = etx(*flags)
    assert code == 0, err
    assert json.loads(out)["parameters"] > json.loads(out)["trainable"]
    code, _, err = etx("train", config, "--quantization", "W4A16", "--steps", 2)
    assert code == 2
    assert "have no gradient: train adapters" in err


def test_a_config_runs_on_random_tokens(etx: Etx, config: Path) -> None:
    code, out, err = etx("run", "--config", config)
    assert code == 0
    assert "2 x 12 random token ids of seed 0" in err
    told = json.loads(etx("run", config, "--json")[1])
    assert [len(tokens) for tokens in told["tokens"]] == [20, 20]
    rows = [
        f"row {i}: {' '.join(map(str, tokens[:16]))} ... (20 tokens)"
        for i, tokens in enumerate(told["tokens"])
    ]
    assert out == "\n".join([*rows, ""])
    ids = np.random.default_rng(0).integers(0, 101, (2, 12)).tolist()
    assert told["prompt_tokens"] == ids


def test_flags_and_set_override_a_config(etx: Etx, config: Path) -> None:
    def told(*flags: Any) -> Any:
        return json.loads(etx("run", config, "--json", *flags)[1])

    assert [len(tokens) for tokens in told("-n", 2, "-b", 3)["tokens"]] == [2, 2, 2]
    assert len(told("--set", "max_new_tokens=3", "--set", "batch_size=1")["tokens"]) == 3
    assert told("--set", "max_new_tokens=3", "-n", 4, "-b", 1)["timings"]["new_tokens"] == 4
    warm = told("--set", "temperature=1.5", "--seed", 5)["tokens"]
    assert warm == told("--temp", 1.5, "--seed", 5)["tokens"]
    assert warm != told("--temp", 0, "--seed", 5)["tokens"]
    layers = next(row for row in told("--max-layers", 1, "-n", 1)["table"] if row["name"] == "layers")
    assert layers["calls"] == 1


def test_lora_is_said_to_be_ignored(etx: Etx, config: Path) -> None:
    code, _, err = etx("run", config, "-n", 1, "--set", "use_lora=true")
    assert code == 0
    assert "use_lora applies to training only; this run does not use an adapter" in err


def test_prefill_only(etx: Etx, speller: Path, config: Path) -> None:
    code, out, err = etx("run", speller, "-p", "abc", "--prefill-only")
    assert (code, out) == (0, "most probable next token: 100 'd'\n")
    assert "first token" not in err
    told = json.loads(etx("run", config, "--set", "prefill_only=true", "--json")[1])
    assert told["finish_reason"] == ["prefill", "prefill"]
    assert len(told["likeliest_next"]) == 2
    assert {row["calls"] for row in told["table"] if row["name"] in ("decode", "sampling")} == {0}


def test_chat_answers_each_line(etx: Etx, speller: Path) -> None:
    code, out, err = etx("chat", speller, "-n", 3, stdin="hello\n\n  \n/exit\nnever\n")
    assert (code, out) == (0, ";<=\n")
    assert "[0 tokens reused, 10 new, 3 generated" in err


def test_chat_shows_what_was_answered_before_an_error(etx: Etx, speller: Path) -> None:
    """As JSON, with the texts of conversations that were reset too."""
    template = (
        "{{ messages[-1].content }}{% if messages|length > 2 %}{{ raise_exception('enough') }}{% endif %}"
    )
    code, out, err = etx(
        *("chat", speller, "-n", 2, "--json", "--chat-template", template), stdin="a\n/reset\nb\nc\n"
    )
    told = json.loads(out)
    assert (code, err.splitlines()[-1]) == (2, "error: chat template: enough")
    assert [(turn["prompt"], turn["text"]) for turn in told["turns"]] == [("a", "bc"), ("b", "cd")]


def test_chat_input_is_utf_8(etx: Etx, speller: Path) -> None:
    """A byte order mark is no text."""
    code, out, _ = etx("chat", speller, "-n", 2, stdin="\ufeff/exit\nnever\n")
    assert (code, out) == (0, "")


def test_chat_keeps_its_cache_and_answers_as_without_it(etx: Etx, babbler: Path) -> None:
    code, out, err = etx(
        "chat", babbler, "-n", 6, "--temp", 0, "--json", stdin="one\ntwo\n/reset\n/bad\nthree\n"
    )
    told = json.loads(out)
    assert (code, err) == (0, "/bad: unknown command; expected /system TEXT, /reset or /exit\n")
    first, second, third = told["turns"]
    # The last token of an answer is in the text but was not yet fed.
    assert (first["cached_tokens"], second["cached_tokens"]) == (
        0,
        first["prompt_tokens"] + first["tokens"] - 1,
    )
    assert third["cached_tokens"] == 0
    assert [message["content"] for message in told["messages"][:1]] == ["three"]

    model = et.load(babbler)
    assert model.tokenizer is not None
    messages: list[dict[str, str]] = []
    answers = json.loads(etx("chat", babbler, "-n", 6, "--temp", 0, "--json", stdin="one\ntwo\n")[1])[
        "messages"
    ]
    for question, answer in zip(answers[::2], answers[1::2], strict=True):
        messages.append(question)
        alone = et.generate(
            model, model.tokenizer.apply_chat_template(messages), max_new_tokens=6, temperature=0.0
        )
        assert answer["content"] == alone.text
        messages.append(answer)


def test_chat_starts_anew_where_the_template_rewrites_the_past(
    etx: Etx, tmp_path: Path, babbler: Path
) -> None:
    model = et.load(babbler)
    save(tmp_path, model, "{{ messages[-1].content }} a:")
    told = json.loads(etx("chat", tmp_path, "-n", 6, "--json", stdin="one\nsomething longer\n")[1])
    assert [turn["cached_tokens"] for turn in told["turns"]] == [0, 0]
    alone = et.generate(model, list(b"something longer a:"), max_new_tokens=6, temperature=0.0)
    assert list(told["messages"][-1]["content"].encode()) == alone.tokens


def test_chat_keeps_the_common_beginning_where_the_template_shortens_old_answers(
    etx: Etx, tmp_path: Path, babbler: Path
) -> None:
    """As templates do that drop the reasoning of earlier answers."""
    template = (
        "{% for m in messages %}{{ m.role[0] }}:"
        "{{ m.content if m.role == 'user' or loop.last else m.content[:2] }};{% endfor %}a:"
    )
    model = et.load(babbler)
    save(tmp_path, model, template)
    talk = "one\ntwo\nthree\n"
    told = json.loads(etx("chat", tmp_path, "-n", 6, "--temp", 0, "--json", stdin=talk)[1])
    asked = len("u:one;a:")
    # Two letters of the first answer stay (the second turn), then all up to two letters of the second one.
    assert [turn["cached_tokens"] for turn in told["turns"]] == [
        0,
        asked + 2,
        asked + 2 + len(";u:two;a:") + 2,
    ]
    tokenizer = et.load(tmp_path).tokenizer
    assert tokenizer is not None
    for turn in (1, 2):
        messages = told["messages"][: 2 * turn + 1]
        alone = et.generate(model, tokenizer.apply_chat_template(messages), max_new_tokens=6, temperature=0.0)
        assert told["messages"][2 * turn + 1]["content"] == alone.text


@pytest.mark.parametrize("flags", [[], ["--draft-layers", "1"], ["--prompt-lookup", "2"]])
def test_chat_goes_back_or_starts_anew_with_sliding_windows(
    flags: list[str], etx: Etx, tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m.content if loop.last else m.content[:3] }};{% endfor %}"
    window = tiny_model(vocab_size=128, eos_token_id=None, model_type="mistral", sliding_window=6)
    save(tmp_path, window, template)
    common = ["chat", tmp_path, "-n", 8, "--temp", 0, "--json", "--dtype", "float64"]
    told = json.loads(etx(*common, *flags, stdin="question\nanother one\nlast\n")[1])
    model = et.load(tmp_path, dtype="float64")
    assert model.tokenizer is not None
    for turn in range(3):
        ids = model.tokenizer.apply_chat_template(told["messages"][: 2 * turn + 1])
        alone = et.generate(model, ids, max_new_tokens=8, temperature=0.0)
        assert told["messages"][2 * turn + 1]["content"] == alone.text


CHATTY = "{{ messages[-1].content }}{{ tools | length if tools else '-' }}{{ enable_thinking }}"


@pytest.mark.parametrize("command", ["chat", "run"])
def test_template_flags(command: str, etx: Etx, tmp_path: Path, speller: Path) -> None:
    (tmp_path / "t.jinja").write_text(CHATTY, encoding="utf-8")
    (tmp_path / "tools.json").write_text('[{"name": "a"}, {"name": "b"}]', encoding="utf-8")

    def length(*flags: Any) -> int:
        given = ["run", speller, "--chat", "-p", "x"] if command == "run" else ["chat", speller]
        code, out, err = etx(*given, "-n", 1, "--json", *flags, stdin="x\n")
        assert code == 0, err
        told = json.loads(out)
        return told["turns"][0]["prompt_tokens"] if command == "chat" else len(told["prompt_tokens"])

    template = ["--chat-template", tmp_path / "t.jinja"]
    expected = {
        (): "x-",
        ("--no-thinking",): "x-False",
        ("--enable-thinking", "--tools", tmp_path / "tools.json"): "x2True",
        ("--chat-template-kwargs", '{"enable_thinking": "some"}'): "x-some",
    }
    for flags, text in expected.items():
        assert length(*template, *flags) == len(text)
    assert length("--chat-template", "<{{ messages[0].content }}>") == len("<x>")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chat-template", "nowhere"], "--chat-template 'nowhere': expected a file, a Jinja template"),
        (["--chat-template-kwargs", "{"], "--chat-template-kwargs: not valid JSON"),
        (["--chat-template-kwargs", "[]"], "--chat-template-kwargs: expected a JSON object"),
        (["--chat-template-kwargs", '{"messages": []}'], "messages cannot be set as a template variable"),
        (
            ["--chat-template-kwargs", '{"continue_final_message": true}'],
            "continue_final_message cannot be set as a template variable",
        ),
        (["--chat-template-kwargs", '{"enable_thinking": true}', "--no-thinking"], "contradict each other"),
        (["--tools", "nowhere.json"], "--tools nowhere.json: cannot be read"),
    ],
)
@pytest.mark.parametrize("command", [["chat"], ["run", "--chat", "-p", "x"]])
def test_wrong_template_flags(
    command: list[str], flags: list[str], message: str, etx: Etx, speller: Path
) -> None:
    code, out, err = etx(*command, "-m", speller, *flags, stdin="x\n")
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    "flags",
    [["--chat-template", "{{ 1 }}"], ["--chat-template-kwargs", "{}"], ["--no-thinking"], ["--tools", "x"]],
)
def test_template_flags_of_run_need_chat(flags: list[str], etx: Etx, speller: Path) -> None:
    code, _, err = etx("run", speller, "-p", "x", *flags)
    assert code == 2
    assert "needs --chat" in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_an_interrupted_answer_is_forgotten(
    etx: Etx, speller: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a terminal the conversation goes on, with a cache of its own making."""
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr("einsum_transformer.cli.output.write", write)
    monkeypatch.setattr(sys, "stdin", Terminal("one\ntwo\nthree\n"))
    with pytest.raises(SystemExit) as left:
        main(["chat", str(speller), "-n", "3"])
    err = capsys.readouterr().err
    assert left.value.code == 0
    assert "".join(pieces) == ";<=\n;<\n;<=\n"
    assert err.count("stopped; this message is not part of the conversation") == 1
    assert [line[:15] for line in err.splitlines() if line.startswith("[")] == ["[0 tokens reuse"] * 2


def test_chat_system_messages(etx: Etx, speller: Path) -> None:
    told = json.loads(etx("chat", speller, "--system-prompt", "a", "-n", 1, "--json", stdin="x\n")[1])
    assert [message["role"] for message in told["messages"]] == ["system", "user", "assistant"]
    told = json.loads(etx("chat", speller, "-n", 1, "--json", stdin="x\n/system be brief\ny\n")[1])
    assert [message["content"] for message in told["messages"][:2]] == ["be brief", "y"]


def test_explain(etx: Etx, config: Path) -> None:
    code, out, err = etx("explain", config, "--seq-len", 8, "--batch-size", 2, "--backward")
    assert (code, err) == (0, "")
    assert out == f"{et.explain(et.load(config), batch=2, tokens=8, backward=True)}\n"
    told = json.loads(etx("explain", "--config", config, "--set", "n_layers=7", "--json")[1])
    assert told["model"]["num_hidden_layers"] == 7
    assert told["tokens"] == 128


def test_explain_and_diff_count_adapters(etx: Etx, config: Path, tmp_path: Path) -> None:
    """Those of a folder and those that a config trains; frozen weights have no gradients."""
    from einsum_transformer.models.adapters import with_lora
    from einsum_transformer.models.lora_config import LoRAConfig
    from einsum_transformer.models.peft import save_adapter

    model = with_lora(et.load(config), LoRAConfig(8, 16.0, ("q_proj", "v_proj")))
    save_adapter(model, tmp_path / "adapter")
    expected = str(et.explain(model, tokens=8, backward=True))
    size = ("--seq-len", 8, "--backward")
    assert etx("explain", config, *size, "--adapter-path", tmp_path / "adapter") == (0, f"{expected}\n", "")
    assert etx("explain", "--config", config, *size, "--set", "use_lora=true")[1] == f"{expected}\n"
    adapted = tmp_path / "adapted.json"
    adapted.write_text(json.dumps(json.loads(config.read_text()) | {"use_lora": True}))
    told = json.loads(etx("diff", config, adapted, "--json")[1])
    assert told["flops"][1] > told["flops"][0]


def test_pull_prints_the_folder(etx: Etx, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from einsum_transformer.loading import hub

    asked: list[Any] = []
    monkeypatch.setattr(hub, "download", lambda *arguments: asked.append(arguments) or tmp_path)
    assert etx("pull", "owner/name", "--revision", "v1") == (0, f"{tmp_path}\n", "")
    assert json.loads(etx("pull", "owner/name", "--offline", "--json")[1]) == {
        "repo": "owner/name",
        "path": str(tmp_path),
    }
    assert asked == [("owner/name", "v1", False), ("owner/name", None, True)]


def test_characters_that_the_terminal_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("einsum_transformer.loading.hub.download", lambda *_: tmp_path / "\N{SNOWMAN}")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with pytest.raises(SystemExit) as left:
        main(["pull", "owner/name"])
    assert left.value.code == 0
    assert raw.getvalue() == f"{tmp_path / '?'}\n".encode()


@pytest.mark.parametrize("command", ["run", "chat", "explain", "pull"])
def test_help_teaches(etx: Etx, command: str) -> None:
    code, out, _ = etx(command, "--help")
    assert code == 0
    assert out.count(f"  etx {command}") >= 1
    assert "--json" in out


def test_no_arguments_are_a_call_for_help(etx: Etx) -> None:
    code, out, _ = etx()
    assert code == 0
    assert all(f"\n  {command} " in out for command in ("run", "chat", "explain", "pull"))


def process(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    call = [sys.executable, "-c", "from einsum_transformer.cli.app import main; main()", *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(call, text=True, env=environment(), **pipes | options)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src")}


def test_the_script_has_the_flags_of_run(config: Path) -> None:
    call = [sys.executable, ROOT / "run_model.py", "--config", config, "-n", "2", "-b", "1", "--quiet"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment(), check=True, timeout=60)
    assert len(done.stdout.split()) == 2
    assert done.stderr == ""


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom einsum_transformer.cli.app import main\n"
        "try: main(['--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
        timeout=60,
    )
    heavy = {"rich", "tokenizers", "gguf", "jinja2", "huggingface_hub", "opt_einsum"}
    assert heavy & set(done.stderr.split()) == set()


def test_an_interrupt_leaves_what_was_written(speller: Path) -> None:
    with process("chat", speller, "-n", 3, "--quiet") as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write("hello\n")
        chat.stdin.flush()
        assert chat.stdout.readline() == ";<=\n"
        chat.send_signal(signal.SIGINT)
        out, err = chat.communicate(timeout=60)
        assert (chat.returncode, out, err) == (130, "", "")


def test_a_reader_that_leaves_is_no_error(speller: Path) -> None:
    with process("run", speller, "-p", "abc", "--quiet") as run:
        assert run.stdout is not None
        run.stdout.close()
        assert run.wait(timeout=60) != 0
        assert run.stderr is not None
        assert run.stderr.read() == ""


@pytest.mark.parametrize(
    "flags", [["--prompt-lookup", "2"], ["--draft-layers", "1"], ["--draft-model", "{itself}"]], ids=str
)
def test_speculative_text_is_the_same(etx: Etx, babbler: Path, flags: list[str]) -> None:
    """On stdout; the table, or the JSON object, says what the drafts brought."""
    flags = [flag.format(itself=babbler) for flag in flags]
    common = ["run", babbler, "-p", "abcabcab", "-n", 30, "--temp", 0, "--dtype", "float64"]
    plain = etx(*common)[1]
    code, out, err = etx(*common, *flags, "--num-draft-tokens", 3)
    assert (code, out) == (0, plain)
    assert "speculation: " in err
    said = json.loads(etx(*common, *flags, "--json")[1])
    assert said["text"] + "\n" == plain
    assert said["speculation"]["rounds"] > 0


def test_speculative_chat_is_the_same(etx: Etx, babbler: Path) -> None:
    """Over turns, whose tokens stay in both caches."""
    talk = "ab\nba\nabab\n"
    common = ["chat", "-m", babbler, "-n", 12, "--temp", 0, "--quiet", "--dtype", "float64"]
    plain = etx(*common, stdin=talk)[1]
    for flags in (["--draft-layers", 1], ["--prompt-lookup", 2], ["--draft-model", babbler]):
        assert etx(*common, *flags, stdin=talk)[1] == plain


def test_speculation_in_a_config(etx: Etx, tmp_path: Path) -> None:
    keys = RUN | {"speculative": True, "draft_layers": 2, "batch_size": 1}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(keys), encoding="utf-8")
    said = json.loads(etx("run", path, "--json")[1])
    plain = json.loads(etx("run", path, "--json", "--set", "speculative=false")[1])
    assert said["tokens"] == plain["tokens"]
    assert sum(said["speculation"]["drafted"]) > 0
    assert "speculation" not in plain


def test_the_reference_of_a_divergence(etx: Etx, tmp_path: Path) -> None:
    """What is measured is not applied to the reference: neither an adapter nor bfloat16."""
    folder = save_with_tokenizer(tmp_path / "model", tiny_model(vocab_size=128, eos_token_id=None))
    model = et.with_lora(et.load(folder), et.LoRAConfig(r=2))
    arrays = model.adapter_parameters()
    model.set_adapter_parameters({name: np.full(array.shape, 0.3) for name, array in arrays.items()})
    et.save_adapter(model, tmp_path / "adapter")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9, encoding="utf-8")
    command = ["eval", "kld", folder, "-f", text, "-c", 16, "--json"]
    plain = json.loads(etx("eval", "ppl", folder, "-f", text, "-c", 16, "--json")[1])["perplexity"]
    for flags in (
        ["--adapter-path", tmp_path / "adapter", "--reference-model", folder],
        ["--dtype", "bfloat16"],
    ):
        found = json.loads(etx(*command, *flags)[1])
        assert found["reference_perplexity"] == pytest.approx(plain, rel=1e-6)
        assert found["kl_mean"] > 0
    assert etx("quantize", folder, "--quantization", "W8A8", "-o", folder)[0] == 2
    assert etx("quantize", folder, "--quantization", "W8A8", "--calibration-chunks", 3)[0] == 2
