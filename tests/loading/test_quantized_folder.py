"""A quantized model that is saved and loaded again, and folders whose codes contradict their config."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.engine import Leaf
from einsum_transformer.formats.folder import SafetensorsFolder
from einsum_transformer.formats.safetensors import write_safetensors
from einsum_transformer.tree import map_named, named_leaves
from golden_files import MODELS, Folders, Models, load_golden

Array = np.ndarray


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16g32,asymmetric", "W2A8KV8,tensor"])
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_the_same(name: str, scheme: str, golden_model: Models, tmp_path: Path) -> None:
    golden = load_golden(name)
    model = et.quantize(golden_model(name), scheme, exclude=[r".*\.0\..*"])
    model.save(tmp_path)
    loaded = et.load(tmp_path)
    assert str(loaded.quantization) == str(model.quantization)
    assert loaded.quantization == model.quantization
    assert loaded.cache_types == model.cache_types
    before, after = dict(named_leaves(model.decoder)), dict(named_leaves(loaded.decoder))
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        assert type(leaf) is type(after[path])
        if isinstance(leaf, Leaf):
            for part, array in leaf.parts().items():
                np.testing.assert_array_equal(array, after[path].parts()[part])
        else:
            np.testing.assert_array_equal(leaf, after[path])
    np.testing.assert_array_equal(loaded.logits(golden.tokens), model.logits(golden.tokens))
    assert not et.inspect(tmp_path).problems


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2_plain", "qwen3_moe_normalized"])
def test_schemes_by_name_are_saved(name: str, golden_model: Models, tmp_path: Path) -> None:
    golden, by_name = load_golden(name), {r".*\.0\..*": "W2A8,asymmetric", r".*\.1\..*(proj|fc)": "W8A8"}
    model = et.quantize(golden_model(name), "W4A8g32", by_name=by_name)
    model.save(tmp_path)
    loaded = et.load(tmp_path)
    assert loaded.quantization == model.quantization
    np.testing.assert_array_equal(loaded.logits(golden.tokens), model.logits(golden.tokens))
    original = tmp_path / "original"
    golden_model(name).save(original)
    again = et.load(original, quantization="W4A8g32", quantization_by_name=by_name)
    np.testing.assert_array_equal(again.logits(golden.tokens), model.logits(golden.tokens))


def test_divisors_are_saved(golden_model: Models, tmp_path: Path) -> None:
    golden, model = load_golden("llama_gqa"), golden_model("llama_gqa")
    quantized = et.quantize(model, "W4A8g32")
    leaves = {
        path: leaf.with_parts({**leaf.parts(), "divisor": np.linspace(0.5, 2, leaf.width, dtype=np.float32)})
        if isinstance(leaf, Leaf) and "down_proj" in path
        else leaf
        for path, leaf in named_leaves(quantized.decoder)
    }
    changed = replace(quantized, decoder=map_named(lambda path, _: leaves[path], quantized.decoder))
    changed.save(tmp_path)
    np.testing.assert_array_equal(et.load(tmp_path).logits(golden.tokens), changed.logits(golden.tokens))


def test_what_a_quantized_folder_excludes(
    golden_model: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    et.quantize(golden_model("llama_gqa"), "W4A16g32").save(tmp_path)
    with pytest.raises(et.InputError, match=r"already quantized to W4A16g32 \(real\): omit `quantization`"):
        et.load(tmp_path, quantization="W8A8")
    for message, settings in {
        "stored as W4A16g32: load the original model": {"quantization": "none"},
        "`quantization_exclude` needs `quantization`": {"quantization_exclude": ["q_proj"]},
        "`quantization_mode` needs `quantization`": {"quantization_mode": "simulated"},
        "in memory as integers: omit `weight_budget`": {"weight_budget": 1000},
        "in memory as integers: omit `dtype`": {"dtype": "bfloat16"},
    }.items():
        with pytest.raises(et.InputError, match=message):
            et.load(tmp_path, **settings)
    assert "quantization_config" not in caplog.text
    et.explain(tmp_path)
    assert "costs are those of the weights without quantization" in caplog.text
    with pytest.raises(et.InputError, match="simulated quantization is not saved"):
        et.quantize(golden_model("llama_gqa"), "W8A8", mode="simulated").save(tmp_path / "other")
    adapted = et.with_lora(et.load(tmp_path), et.LoRAConfig(r=2))
    assert adapted.quantization is not None


NAME = "model.layers.0.mlp.down_proj.weight"


def settings(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        file = folder / "config.json"
        keys = json.loads(file.read_text())
        change(keys["quantization_config"])
        file.write_text(json.dumps(keys))

    return run


def tensors(change: Callable[[dict[str, Array]], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        source = SafetensorsFolder(folder)
        arrays = {name: np.array(source.read(name)) for name in source.names()}
        change(arrays)
        write_safetensors(folder / "model.safetensors", arrays)

    return run


def with_part(part: str, change: Callable[[Array], Array]) -> Callable[[Path], None]:
    name = f"{NAME}.{part}"
    return tensors(lambda arrays: arrays.update({name: change(arrays[name])}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (settings(lambda s: s.update(scheme="W9A9")), "quantization_config: quantization 'W9A9': expected"),
        (settings(lambda s: s.update(scheme="W8A8")), "`scheme` W8A8 contradicts the rest"),
        (settings(lambda s: s.update(by_name=[])), "expected an object `by_name`"),
        (settings(lambda s: s.update(by_name={"x": "W8A8"})), "other bits of activations"),
        (settings(lambda s: s.update(scheme=None)), "quantization_config: expected `scheme`"),
        (settings(lambda s: s.update(activation_bits=5)), "expected `activation_bits` 4, 8 or 16"),
        (settings(lambda s: s.update(weights=[])), "expected `activation_bits` 4, 8 or 16, and `weights`"),
        (settings(lambda s: s["weights"].update({NAME: [1, 2]})), r"expected \[rows, columns, bits, group"),
        (settings(lambda s: s["weights"].update({NAME: [64, 1 << 60, 4, 32, 0]})), "config.json requires U8"),
        (settings(lambda s: s["weights"].update({NAME: [64, 96, 5, 32, 0]})), r"expected \[rows, columns"),
        (settings(lambda s: s["weights"].update({NAME: [64, 96, 4, 0, 0]})), r"expected \[rows, columns"),
        (settings(lambda s: s["weights"].pop(NAME)), "missing from the file"),
        (with_part("codes", lambda a: a[:-1]), "config.json requires U8"),
        (with_part("codes", lambda a: a.astype(np.float32)), "is F32"),
        (with_part("scales", lambda a: a[:, :-1]), "config.json requires F32 or F16"),
        (with_part("scales", lambda a: a * np.nan), "contains 0, nan or inf"),
        (with_part("scales", lambda a: a * 0), "contains 0, nan or inf"),
        (tensors(lambda arrays: arrays.pop(f"{NAME}.scales")), "scales' is missing"),
        (tensors(lambda arrays: arrays.pop(f"{NAME}.codes")), "codes' is missing"),
    ],
)
def test_damaged_folders(
    damage: Callable[[Path], None], message: str, golden_model: Models, tmp_path: Path
) -> None:
    et.quantize(golden_model("llama_gqa"), "W4A16g32").save(tmp_path)
    damage(tmp_path)
    with pytest.raises(et.InputError, match=message) as error:
        et.load(tmp_path)
    assert "\n" not in str(error.value)


def test_other_quantized_checkpoints_are_refused(golden_folder: Folders, tmp_path: Path) -> None:
    folder = golden_folder("llama_gqa")
    keys = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(keys | {"quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(et.InputError, match="'hqq' checkpoints are not supported"):
        et.load(tmp_path)
