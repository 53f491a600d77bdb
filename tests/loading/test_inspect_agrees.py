"""What `load` refuses, `inspect` lists, and nothing else: for the good and the hostile sources of the tests.

The tests that load folders of their own ask `inspect` about each of them as well, by the fixture
every_load_is_inspected; here are the sources that are made from lists.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agreement import compared, disagreement
from einsum_transformer.analysis import inspect as module
from einsum_transformer.formats.folder import write_safetensors_folder
from gguf_files import write_model_gguf
from golden_files import MODELS, Golden, load_golden, write_folder
from hostile import FOLDERS, HOSTILE_GGUF, INDEXES, KINDS, LFS, NASTY
from tiny_models import CONFIG, hf_config, write_config, write_tiny

BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "generation_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)


def write_good(folder: Path, golden: Golden) -> None:
    write_folder(folder, golden.config, golden.weights)


def write_shards(folder: Path, golden: Golden) -> None:
    folder.mkdir()
    write_config(folder / "config.json", golden.config)
    write_safetensors_folder(folder, golden.weights, 20_000)


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Golden], Any]:
    """Writes the folder with other tensors, which `change` makes in place."""

    def write(folder: Path, golden: Golden) -> None:
        weights = dict(golden.weights)
        change(weights)
        write_folder(folder, golden.config, weights)

    return write


def stated(**keys: Any) -> Callable[[Path, Golden], Any]:
    """Writes the folder with other keys in its config."""
    return lambda folder, golden: write_folder(folder, golden.config | keys, golden.weights)


def each(weights: dict[str, Any], change: Callable[[Any], Any]) -> None:
    weights.update({name: change(array) for name, array in weights.items()})


def renamed(start: str) -> Callable[[dict[str, Any]], None]:
    def rename(weights: dict[str, Any]) -> None:
        names = list(weights)
        weights |= {f"{start}{name}": weights.pop(name) for name in names}

    return rename


def several(weights: dict[str, Any]) -> None:
    """One missing, all but vectors of one number misshapen, one too many."""
    weights.popitem()
    each(weights, lambda array: array[..., :1])
    weights["y"] = np.zeros(2, np.float32)


def without_a_shard(folder: Path, golden: Golden) -> None:
    write_shards(folder, golden)
    max(folder.glob("*.safetensors")).unlink()


def cut_short(folder: Path, golden: Golden) -> None:
    write_good(folder, golden)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


GOOD = {
    "good": write_good,
    "shards": write_shards,
    "float64": changed(lambda w: each(w, lambda a: a.astype(np.float64))),
}
HOSTILE: dict[str, Callable[[Path, Golden], Any]] = {
    "first missing": changed(lambda w: w.pop(next(iter(w)))),
    "last missing": changed(lambda w: w.pop(list(w)[-1])),
    "many missing": changed(lambda w: [w.pop(name) for name in list(w)[::2]]),
    "one too many": changed(lambda w: w.update(x=np.zeros(2, np.float32))),
    "all but one": changed(lambda w: [w.pop(name) for name in list(w)[1:]]),
    "all empty": changed(lambda w: each(w, lambda a: a[:0])),
    "all of another shape": changed(lambda w: each(w, lambda a: np.zeros((3, *a.shape), a.dtype))),
    "all integers": changed(lambda w: each(w, lambda a: a.astype(np.int8))),
    "another name": changed(renamed("module.")),
    "several at once": changed(several),
    "no shard": without_a_shard,
    "cut short": cut_short,
    "another size": stated(vocab_size=7),
    "too many layers": stated(num_hidden_layers=4000, n_layer=4000, n_layers=4000),
    "another type": stated(model_type="bert"),
    "quantized": stated(quantization_config={"quant_method": "gptq"}),
}  # fmt: skip


def check(folder: Path, refused: bool | None, **where: Any) -> None:
    found, refusal = compared(folder, **where)
    assert found == ""
    assert refused is None or bool(refusal) == refused


@pytest.mark.parametrize("name", MODELS)
def test_golden_models(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    for kind, write in (GOOD | HOSTILE).items():
        write(tmp_path / kind, golden)
        check(tmp_path / kind, kind in HOSTILE)


@pytest.mark.parametrize("key", [*CONFIG, "sliding_window", "rope_scaling", "num_local_experts", "new_key"])
def test_any_value_of_a_key(key: str, tmp_path: Path) -> None:
    folder, _ = write_tiny(tmp_path / "model")
    for value in NASTY:
        write_config(folder / "config.json", hf_config() | {key: value})
        check(folder, None)


@pytest.mark.parametrize("name", BESIDE)
def test_files_beside_the_weights(name: str, tmp_path: Path) -> None:
    folder, _ = write_tiny(tmp_path / "model")
    for content in (b"", b"{", b"[]", b"{}", b'{"a": 1}', b'{"a": 1, "a": 2}', b"\xff\xfe", LFS, bytes(99)):
        (folder / name).write_bytes(content)
        check(folder, None)
    (folder / name).unlink()
    (folder / name).symlink_to("gone")
    check(folder, True)


@pytest.mark.parametrize("names", FOLDERS)
def test_folders_of_other_programs(names: str, tmp_path: Path) -> None:
    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    check(tmp_path, True)
    write_config(tmp_path / "config.json", hf_config())
    check(tmp_path, True)


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "model", "model.bin", "config.json"])
def test_files_of_other_kinds(name: str, tmp_path: Path) -> None:
    folder, _ = write_tiny(tmp_path / "model")
    for content, _ in KINDS:
        (folder / name).write_bytes(content)
        check(folder / name, True)
        check(folder, None)


def test_hostile_gguf_files(tmp_path: Path) -> None:
    for content, _ in HOSTILE_GGUF.values():
        (tmp_path / "m.gguf").write_bytes(content)
        check(tmp_path / "m.gguf", True)
        check(tmp_path, True)


def test_malformed_indexes(tmp_path: Path) -> None:
    write_config(tmp_path / "config.json", hf_config())
    for text, _ in INDEXES:
        (tmp_path / "model.safetensors.index.json").write_text(text)
        check(tmp_path, True)


def gguf_files(folder: Path) -> Iterator[tuple[Path, bool]]:
    """(a GGUF model, whether it is refused)"""
    golden = load_golden("llama_gqa")
    for name, keys, refused in (
        ("good", {}, False),
        ("adapter", {"general.type": "adapter"}, True),
        ("layers", {"llama.block_count": 2}, True),
        ("many-layers", {"llama.block_count": 1 << 31}, True),
        ("heads", {"llama.attention.head_count": 3}, True),
        ("key", {"llama.attention.sliding_window": "x"}, True),
        ("tensor", {"extra.weight": np.ones(3, np.float32)}, True),
        ("tokens", {"tokenizer.ggml.model": "none such"}, False),
    ):
        yield write_model_gguf(folder / f"{name}.gguf", golden.config, golden.weights, **keys), refused
    for name in ("whole", "part"):
        (folder / name).mkdir()
        write_model_gguf(folder / name / "m.gguf", golden.config, golden.weights, tensors_each=9)
        yield folder / name, False
    max((folder / "part").iterdir()).unlink()
    yield folder / "part", True


def test_gguf_models(tmp_path: Path) -> None:
    for path, refused in gguf_files(tmp_path):
        check(path, refused)


@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        ({}, False),
        ({"weight_file": "model"}, False),
        ({"weight_file": "model", "n_heads": 4}, True),
        ({"weight_file": "model", "vocab_size": 60, "quantization": "W9A8"}, True),
        ({"weight_file": "damaged"}, True),
        ({"weight_file": "another"}, True),
        ({"weight_file": "nowhere"}, True),
        ({"weight_file": "model/config.json"}, True),
        ({"weight_file": "model/model.safetensors"}, True),
        ({"use_lora": True, "lora_target_modules": []}, False),
        ({"arch": "none"}, True),
    ],
    ids=str,
)
def test_configs_of_runs(keys: dict[str, Any], refused: bool, tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    folder, weights = write_tiny(tmp_path / "damaged")
    write_folder(folder, hf_config(), dict(list(weights.items())[1:]))
    another, _ = write_tiny(tmp_path / "another")
    write_config(another / "config.json", hf_config() | {"model_type": "bert"})
    config = {"arch": "llama", "d_model": 32, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "head_dim": 6}
    config |= {"d_ff": 40, "vocab_size": 61, "max_seq_len": 512}
    (tmp_path / "run.json").write_text(json.dumps(config | keys))
    check(tmp_path / "run.json", refused)


def test_links(tmp_path: Path) -> None:
    folder, _ = write_tiny(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    check(folder, True)
    check(folder, False, allow_links=True)


def test_a_disagreement_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an inspect that sees nothing, of one that sees too much, and of other words."""
    folder, weights = write_tiny(tmp_path / "good")
    worse = write_folder(tmp_path / "worse", hf_config(), dict(list(weights.items())[1:]))
    check(worse, True)
    look = module.look
    monkeypatch.setattr(module, "look", lambda source, options, _: look(source, options, []))
    assert "inspect: []" in compared(worse)[0]
    monkeypatch.setattr(
        module, "look", lambda source, options, found: found.append("x") or look(source, options)
    )
    assert "load: 'fine'; inspect: ['x']" in compared(folder)[0]
    assert disagreement("m: a is missing", ["b is missing"])
    assert disagreement("", ["a"])
    assert disagreement("m: a", [])
