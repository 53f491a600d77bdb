"""A config from outside either loads and computes numbers, or is refused in one line that names the file and
the key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from hostile import NASTY
from tiny_models import LLAMA3, hf_config, write_config, write_tiny

pytestmark = pytest.mark.usefixtures("every_load_is_inspected")
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
YARN = {"attention_factor": None, "mscale": 0.7, "mscale_all_dim": 0.7, "truncate": True}
BASE = hf_config(
    attention_bias=False,
    mlp_bias=False,
    bos_token_id=1,
    pad_token_id=None,
    hidden_act="silu",
    initializer_range=0.2,
    partial_rotary_factor=1.0,
    num_hidden_layers=1,
)


SIZES = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
}


def label(value: Any) -> str:
    return "10**400" if isinstance(value, int) and value > 10**100 else repr(value)


def outcome(path: Path) -> str:
    """What is wrong with how the file is received; "" if nothing is."""
    try:
        model = et.load(path)
    except et.InputError as error:
        message = str(error)
        return "" if "\n" not in message and str(path) in message else f"message {message[:120]!r}"
    except Exception as error:
        return f"load raises {type(error).__name__}: {str(error)[:80]}"
    try:
        logits = model.logits(np.arange(40)[None] % model.config.vocab_size)
    except Exception as error:
        return f"loads, then logits raises {type(error).__name__}: {str(error)[:80]}"
    return "" if np.isfinite(logits).all() else "loads, then logits are not finite"


def tried(path: Path, config: dict[str, Any], key: str, *inside: str) -> dict[str, str]:
    """Nasty value -> what went wrong, where something did."""
    found = {}
    # A size of 2^24 is too large for this machine, not for the format: that is another test's subject.
    for value in NASTY if key not in SIZES else [value for value in NASTY if value != 1 << 24]:
        changed = json.loads(json.dumps(config))
        place = changed
        for name in inside:
            place = place[name]
        place[key] = value
        if problem := outcome(write_config(path, changed)):
            found[label(value)] = problem
    return found


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("key", sorted([*BASE.keys() - {"num_hidden_layers"}, "sliding_window"]))
def test_any_value_of_a_key(key: str, family: str, tmp_path: Path) -> None:
    config = BASE | {"model_type": family, "sliding_window": 4}
    assert tried(tmp_path / "config.json", config, key) == {}


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, rope in ROPES.items() for key in rope])
def test_any_value_of_a_rope_key(kind: str, key: str, place: str, tmp_path: Path) -> None:
    assert tried(tmp_path / "config.json", BASE | {place: dict(ROPES[kind])}, key, place) == {}


@pytest.mark.parametrize("key", [*YARN, "rope_theta", "partial_rotary_factor"])
def test_any_value_of_a_yarn_key(key: str, tmp_path: Path) -> None:
    config = BASE | {"rope_parameters": ROPES["yarn"] | YARN}
    assert tried(tmp_path / "config.json", config, key, "rope_parameters") == {}


@pytest.mark.parametrize("key", ["max_position_embeddings", "head_dim", "rope_theta"])
@pytest.mark.parametrize("kind", ROPES)
def test_any_value_beside_rope_scaling(kind: str, key: str, tmp_path: Path) -> None:
    """Also where the context trained on, or the factor, has to be derived from it."""
    bare = {name: value for name, value in ROPES[kind].items() if name != "original_max_position_embeddings"}
    without = {name: value for name, value in bare.items() if name != "factor"}
    for scaling in (ROPES[kind], bare, without):
        assert tried(tmp_path / "config.json", BASE | {"rope_scaling": scaling}, key) == {}


@pytest.mark.parametrize(
    "key", ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
)
def test_missing_key(key: str, tmp_path: Path) -> None:
    folder, _ = write_tiny(tmp_path)
    config = hf_config()
    del config[key]
    write_config(folder / "config.json", config)
    with pytest.raises(et.InputError, match=rf"config\.json.*{key}"):
        et.load(folder)


SAID = {
    "unknown model_type": ({"model_type": "lama"}, "did you mean 'llama'"),
    "another model_type": ({"model_type": "gpt_bigcode"}, "gpt_bigcode"),
    "activation": ({"hidden_act": "relu6"}, "hidden_act.*relu6.*silu"),
    "no divisor": ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling.*0.0.*from 1e-9"),
    "negative factor": ({"model_type": "granite", "residual_multiplier": -1}, "residual_multiplier.*-1.0"),
    "heads": ({"num_key_value_heads": 3}, "num_attention_heads 8.*num_key_value_heads 3"),
    "negative": ({"hidden_size": -32}, "hidden_size.*-32"),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads.*0"),
    "huge": ({"vocab_size": 10**30}, "vocab_size"),
    "many heads": ({"num_attention_heads": 1 << 24}, "num_attention_heads.*16777216.*65536"),
    "many keys": ({"num_key_value_heads": 1 << 24, "head_dim": 2}, "num_key_value_heads.*16777216"),
    "text": ({"vocab_size": "61"}, "vocab_size.*'61'"),
    "bool": ({"num_hidden_layers": True}, "num_hidden_layers.*True"),
    "float": ({"num_hidden_layers": 2.0}, "num_hidden_layers.*2.0"),
    "null": ({"vocab_size": None}, "vocab_size"),
    "rope_type": ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "rope_scaling.*'su'"),
    "rope factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.*factor"),
    "rope text": ({"rope_scaling": "linear"}, "rope_scaling.*'linear'"),
    "eos texts": ({"eos_token_id": ["</s>"]}, "eos_token_id.*</s>"),
    "quantized": ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, "quantization_config.*hqq"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_said(name: str, tmp_path: Path) -> None:
    """One line with the file, the key and the value."""
    changes, words = SAID[name]
    folder, _ = write_tiny(tmp_path)
    write_config(folder / "config.json", hf_config(**changes))
    with pytest.raises(et.ConfigError, match=words) as caught:
        et.load(folder)
    assert str(folder / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_quantization(tmp_path: Path) -> None:
    """null says what absence says."""
    folder, _ = write_tiny(tmp_path)
    write_config(folder / "config.json", hf_config(quantization_config=None))
    et.load(folder)


LAYER_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    "rope",
    [
        LAYER_ROPES,
        {"full_attention": {"rope_type": "llama3"} | LLAMA3},
        {"rope_typ": "linear", "factor": 2.0},
        {"rope_type": "linear", "type": "yarn", "factor": 2.0},
        {"rope_type": "linear", "factor": 2.0, "short_factor": [1.0, 2.0, 3.0]},
        {"factor": 2.0},
    ],
    ids=["by layer type", "one layer type", "misspelt", "two types", "foreign key", "no type"],
)
def test_rope_settings_that_would_be_ignored(rope: dict[str, Any], tmp_path: Path) -> None:
    """They are obeyed, refused, or at least reported among the ignored keys; the default rotation is no
    answer."""
    path = write_config(tmp_path / "config.json", BASE | {"rope_parameters": rope})
    try:
        config = et.load(path).config
    except et.InputError:
        return
    assert any("rope" in key for key in config.ignored)


FILES = {
    "nothing": "",
    "spaces": "  \n ",
    "a list": "[1, 2]",
    "a number": "7",
    "null": "null",
    "cut short": json.dumps(BASE)[:-10],
    "two objects": json.dumps(BASE) * 2,
    "comment": "// llama\n" + json.dumps(BASE),
    "deep": '{"model_type": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "long number": '{"vocab_size": ' + "9" * 100_000 + "}",
    "long float": json.dumps(BASE)[:-1] + ', "rms_norm_eps": 1' + "0" * 5000 + ".0}",
    "key twice": json.dumps(BASE)[:-1] + ', "vocab_size": 7}',
    "half a surrogate": '{"model_type": "\\ud800"}',
    "newline in a value": '{"model_type": "a\\nb"}',
    "newline in a key": '{"a\\nb": 1}',
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_config(name: str, tmp_path: Path) -> None:
    folder, _ = write_tiny(tmp_path)
    write_config(folder / "config.json", FILES[name])
    for source in (folder, folder / "config.json"):
        with pytest.raises(et.InputError, match=r"config\.json") as caught:
            et.load(source)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{}", b"\x00" * 100, b"\xef\xbb\xbf[]", b'{"model_type": "\xff"}']
)
def test_bytes_that_are_no_text(content: bytes, tmp_path: Path) -> None:
    folder, _ = write_tiny(tmp_path)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(et.InputError, match=r"config\.json") as caught:
        et.load(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    folder, _ = write_tiny(tmp_path)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(et.InputError, match=r"config\.json"):
        et.load(folder)


HUGE = {
    "layers in a folder": ("folder", {"num_hidden_layers": 1 << 24}),
    "vocabulary in a folder": ("folder", {"vocab_size": 1 << 24, "hidden_size": 1 << 20}),
    "layers of random weights": ("json", {"num_hidden_layers": 1 << 24}),
    "10^12 random weights": ("json", {"vocab_size": 1 << 20, "hidden_size": 1 << 20}),
    "run config": ("run", {"n_layers": 1 << 24}),
}
_CHILD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (3, 3))
import einsum_transformer as et
try:
    et.load(sys.argv[1])
except et.InputError as error:
    print(f"refused: {error}")
"""


@pytest.mark.parametrize("name", HUGE)
def test_sizes_are_checked_before_memory_is_taken(name: str, tmp_path: Path) -> None:
    """A config of a few bytes must not cost gigabytes or minutes: 1 GiB and 3 s are given, and it is
    refused."""
    kind, changes = HUGE[name]
    source, _ = write_tiny(tmp_path)
    config = {"d_model": 32, "n_heads": 4, "d_ff": 40, "vocab_size": 61} if kind == "run" else hf_config()
    write_config(source / "config.json", config | changes)
    path = source if kind == "folder" else source / "config.json"
    child = subprocess.run([sys.executable, "-c", _CHILD, path], capture_output=True, text=True, check=False)
    assert child.stdout.startswith("refused"), f"exit {child.returncode}: {child.stderr[-300:]}"
    assert str(source) in child.stdout
