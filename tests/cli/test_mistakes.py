"""A mistake of the user ends in exit code 2 and one line on stderr that names what is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from einsum_transformer.cli.app import main
from einsum_transformer.cli.options import parse_size
from einsum_transformer.errors import InputError
from tiny_models import hf_config, make_tokenizer, tiny_model

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
FAST = str(Path(__file__).parents[2] / "configs" / "fast_lora.json")
RUN = {
    "arch": "llama",
    "d_model": 32,
    "n_layers": 1,
    "n_heads": 4,
    "d_ff": 48,
    "vocab_size": 101,
    "seq_len": 6,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are right, and files that are not."""
    folder = tmp_path_factory.mktemp("mistakes")
    texts = {
        "tiny.json": json.dumps(RUN),
        "unknown.json": json.dumps(RUN | {"n_layer": 2}),
        "wrong.json": json.dumps(RUN | {"n_layers": "two"}),
        "list.json": "[]",
        "torn.json": "{",
        "bert.json": json.dumps(hf_config(model_type="bert")),
        "pytorch_model.bin": "x",
        "model.gguf": "GGUF",
        "prompt.txt": "",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("lfs.txt", "lfs.npz", "lfs.safetensors"):
        (folder / name).write_text(LFS)
    (folder / "x.gz").write_bytes(gzip.compress(b"hello", mtime=0))
    (folder / "tiny.pdf").write_bytes(b"%PDF-1.7\n\xe2\xe3")
    (folder / "small.gguf").write_bytes(b"GGUF\x03" + bytes(19))
    np.savez(folder / "x.npz", logits=np.zeros((1, 3, 101)))
    tiny_model().save(folder / "chat")
    make_tokenizer(folder / "chat", ["a", "b"])
    (folder / "chat" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    (folder / "empty").mkdir()
    tiny_model().save(folder / "settings")
    settings = json.dumps({"max_new_tokens": "many"})
    (folder / "settings" / "generation_config.json").write_text(settings, encoding="utf-8")
    arrays = {
        "floats": np.ones(3),
        "large": np.array([5, 101]),
        "cube": np.zeros((1, 1, 1), int),
        "none": np.zeros(0, int),
        "good": np.arange(6),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    good = (folder / "good.npy").read_bytes()
    (folder / "torn.npy").write_bytes(good[:-4])
    (folder / "huge.npy").write_bytes(good.replace(b"(6,), }           ", b"(1234567890123,), }"[:18] + b" "))
    (folder / "text.npy").write_bytes(b"hello")
    return folder


MISTAKES = {
    "run nowhere.json": "nowhere.json: cannot be read: No such file or directory",
    "run ./nowhere": "./nowhere: no such file or folder",
    "run nowhere": "'nowhere': no such file or folder, and a hub repository is written owner/name",
    "run owner/nowhere --offline": "owner/nowhere: not in the cache",
    "run unknown.json": "unknown.json: unknown key 'n_layer'; did you mean 'n_layers'?",
    "run wrong.json": "wrong.json: key 'n_layers' is 'two', expected an integer",
    "run list.json": "list.json: ",
    "run torn.json": "torn.json: ",
    "run bert.json": "'bert' is not supported; supported: llama",
    "run pytorch_model.bin": "pytorch_model.bin: pickle checkpoints are not supported",
    "run model.gguf": "model.gguf: ",
    "run empty": "empty: contains no config.json",
    "run tiny.json --config tiny.json": "give one of tiny.json, tiny.json",
    "run settings --tokens good.npy": "generation_config.json: key 'max_new_tokens' is 'many'",
    "run tiny.json other": "unexpected extra argument",
    "run tiny.json --set n_layer=2": "unknown key 'n_layer'; did you mean 'n_layers'?",
    "run tiny.json --set n_layers": "--set 'n_layers': expected key=value",
    "run tiny.json --set n_kv_heads=3": "not a multiple of num_key_value_heads 3",
    "run tiny.json --set speculative=true": "speculative needs draft_layers",
    "run tiny.json --set quantization=W8A9": "quantization 'W8A9': expected none or W{2,3,4,8}A{4,8,16}",
    "run tiny.json --quantization int4": "the nearest valid one is",
    "run tiny.json --quantization W8A16 --quantization-mode fake": "expected real or simulated",
    "run bert.json --set n_layers=2": "is not a run config; only the keys of a run config can be set",
    "run tiny.json -p hello": "has no tokenizer; give token ids instead of text (--tokens FILE.npy)",
    "run tiny.json -p @": "--prompt: the prompt is empty",
    "run tiny.json --prompt-file prompt.txt": "--prompt-file: the prompt is empty",
    "run tiny.json --prompt-file latin1.txt": "latin1.txt: not UTF-8 text (byte 3)",
    "run tiny.json --prompt-file lfs.txt": "lfs.txt: a Git LFS pointer, not the file itself: run `git lfs",
    "run tiny.json --prompt-file x.gz": "x.gz: a file compressed with gzip: unpack it first",
    "run tiny.json --prompt-file good.npy": "good.npy: a NumPy array, not text",
    "run tiny.json --prompt-file tiny.pdf": "tiny.pdf: a PDF file, not text",
    "run tiny.json --prompt-file small.gguf": "small.gguf: a GGUF file: pass it as the model",
    "run chat -p a --chat --tools lfs.txt": "--tools lfs.txt: a Git LFS pointer",
    "run chat -p a --chat --tools x.gz": "--tools x.gz: a file compressed with gzip",
    "run chat -p a --chat --chat-template lfs.txt": "--chat-template lfs.txt: a Git LFS pointer",
    "run chat -p a --chat --chat-template x.gz": "--chat-template x.gz: a file compressed with gzip",
    "run tiny.json --tokens lfs.txt": "lfs.txt: not a .npy file of numbers: a Git LFS pointer",
    "run tiny.json --tokens x.gz": "x.gz: not a .npy file of numbers: a file compressed with gzip",
    "run tiny.json --tokens x.npz": "x.npz: not a .npy file of numbers: a .npz archive",
    "run tiny.json --tokens tiny.json": "tiny.json: not a .npy file of numbers: a JSON file",
    "parity tiny.json --reference lfs.txt": "lfs.txt: a Git LFS pointer",
    "parity tiny.json --reference lfs.npz": "lfs.npz: a Git LFS pointer",
    "parity tiny.json --reference lfs.safetensors": "it is a Git LFS pointer",
    "parity tiny.json --reference x.gz": "x.gz: a file compressed with gzip: unpack it first",
    "parity tiny.json --reference x.npz --tokens lfs.txt": "lfs.txt: not a .npy file",
    "run tiny.json --prompt-file nowhere.txt": "nowhere.txt: cannot be read",
    "run tiny.json -p a --tokens good.npy": "--prompt and --tokens both give the prompt",
    "run tiny.json --tokens good.npy --chat": "--chat needs a prompt of text",
    "run tiny.json --tokens good.npy -b 2": "--batch-size applies only to random tokens",
    "run tiny.json --system-prompt x": "--system-prompt needs --chat",
    "run tiny.json --tokens nowhere.npy": "nowhere.npy: cannot be read: No such file",
    "run tiny.json --tokens floats.npy": "floats.npy are float64: expected integer token ids",
    "run tiny.json --tokens large.npy": "large.npy: id 101 is outside the vocabulary of 101",
    "run tiny.json --tokens cube.npy": "cube.npy: has shape (1, 1, 1)",
    "run tiny.json --tokens none.npy": "none.npy have shape (1, 0): expected a non-empty",
    "run tiny.json --tokens objects.npy": "objects.npy: not a .npy file of numbers",
    "run tiny.json --tokens torn.npy": "torn.npy: not a .npy file of numbers",
    "run tiny.json --tokens huge.npy": "huge.npy: not a .npy file of numbers",
    "run tiny.json --tokens text.npy": "text.npy: not a .npy file of numbers",
    "run tiny.json --tokens empty": "empty: cannot be read: Is a directory",
    "run tiny.json --temp hot": "--temp",
    "run tiny.json --temperature -1": "--temperature",
    "run tiny.json --top-p 1.5": "--top-p",
    "run tiny.json --repetition-penalty 0": "--repetition-penalty is 0.0: expected a number above 0",
    "run tiny.json -n -1": "--max-tokens",
    "run tiny.json --threads 0": "--threads",
    "run tiny.json --seed -1": "--seed",
    "run tiny.json --stop @": "an empty stop string",
    "run tiny.json --blas fast": "--blas is 'fast': expected auto, numpy or mkl",
    "run tiny.json --dtype float16": "--dtype is 'float16': expected float32, float64, bfloat16",
    "run tiny.json --weight-budget 1G": "--weight-budget needs weights in files",
    "run tiny.json --tokens good.npy --ctx-size 5": "the prompt has 6 tokens, expected at most 5",
    "run tiny.json --tokens good.npy --ctx-size 5 --prefill-only": "expected at most 5 (the context)",
    "run tiny.json --set vocab_size=16777216 --set d_model=16777216": "of random weights, the machine has",
    "run --bogus": "No such option: --bogus",
    "run -n": "'-n' requires an argument",
    "rnu": "No such command 'rnu'",
    "chat tiny.json": "tiny.json (random weights, seed 0): has no chat template",
    "explain tiny.json --seq-len 0": "--seq-len",
    "explain nowhere.json": "nowhere.json: cannot be read",
    "pull": "Missing argument 'REPO'",
    "pull ../x": "'../x'",
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.items(), ids=MISTAKES)
def test_one_line_that_names_it(
    line: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    # Random tokens are announced, which is no part of the mistake.
    quiet = ["--quiet"] if line.startswith("run ") else []
    with pytest.raises(SystemExit) as left:
        main(["" if word == "@" else word for word in line.split()] + (quiet if line != "run -n" else []))
    captured = capsys.readouterr()
    assert left.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "weights.bin"), "weights.bin: Permission denied"),
        (MemoryError("Unable to allocate 1 TiB"), "not enough memory: Unable to allocate 1 TiB"),
        (InputError("two\nlines"), "two lines"),
    ],
)
def test_errors_that_no_command_expects(
    error: Exception,
    line: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("einsum_transformer.loading.load.load", refuse)
    with pytest.raises(SystemExit) as left:
        main(["run", str(folder / "tiny.json")])
    assert left.value.code == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500M", 500_000_000),
        ("2G", 2_000_000_000),
        ("1.5GiB", 3 << 29),
        ("64KB", 64_000),
        ("123", 123),
        ("1 t", 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--weight-budget") == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1X", "1iB", "0", "0.1", "9" * 400, "nan", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="--weight-budget"):
        parse_size(text, "--weight-budget")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--config", FAST, "-b", "100000000"], "GiB of keys and values"),
        (
            ["run", "--config", FAST, "--prefill-only", "--prompt-lookup", "3"],
            "--prefill-only excludes speculative decoding",
        ),
        (
            ["run", "--config", FAST, "--set", 'rope_scaling={"rope_type":"linear","factor":2,"foo":3}'],
            "unknown key 'rope_scaling.foo'",
        ),
        (
            ["run", "--config", FAST, "--set", 'rope_scaling={"rope_type":"bogus"}'],
            "rope_type 'bogus' is not",
        ),
        (["explain", FAST, "--seq-len", "3000000"], "--seq-len is 3000000: expected 1 to 262,144"),
        (["explain", FAST, "--tokens", "8"], "--tokens: this flag is now --seq-len N"),
        (["diff", FAST, FAST, "--batch", "8"], "--batch: this flag is now --batch-size N"),
    ],
)
def test_what_would_do_nothing_or_never_end(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    told = capsys.readouterr()
    assert left.value.code == 2
    assert message in told.err
    assert told.out == ""
