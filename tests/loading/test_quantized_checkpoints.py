"""Quantized checkpoints of other programs: the logits of their dequantized weights, as floats and packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.engine import Leaf, four_bit
from einsum_transformer.formats.safetensors import write_safetensors
from einsum_transformer.tree import named_leaves
from golden_files import FOLDER, load_golden

Array = np.ndarray


@cache
def golden() -> dict[str, Array]:
    """The arrays that tools/golden_quantized.py wrote."""
    with np.load(FOLDER / "quantized_checkpoints.npz") as file:
        return dict(file)


@cache
def descriptions() -> dict[str, Any]:
    return json.loads(str(golden()["descriptions"]))


CASES = list(descriptions())


def tensors_of(case: str) -> dict[str, Array]:
    found = {name.removeprefix("plain/"): a for name, a in golden().items() if name.startswith("plain/")}
    for name, (dtype, shape) in descriptions()[case]["tensors"].items():
        kind = getattr(ml_dtypes, dtype, None) or dtype
        found[name] = golden()[f"{case}/{name}"].view(kind).reshape(shape)
    return found


def folder_of(
    case: str,
    folder: Path,
    tensors: dict[str, Array] | None = None,
    change: Callable[[dict[str, Any]], object] = lambda config: None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors or tensors_of(case))
    config = json.loads(json.dumps(descriptions()[case]["config"]))
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dequantized_weights(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tokens, expected = folder_of(case, tmp_path), golden()["tokens"], golden()[f"{case}/logits"]
    scale = np.abs(expected).max()
    atol = 1e-5 * scale
    for packed in (False, True):
        model = et.load(folder, packed=packed)
        assert not et.inspect(folder).problems
        np.testing.assert_allclose(model.logits(tokens), expected, rtol=0, atol=atol)
        encodings = {leaf.encoding for _, leaf in named_leaves(model.decoder) if isinstance(leaf, Leaf)}
        assert bool(encodings) == packed
    plain = et.load(folder, dtype="float64", packed=False)
    exact = et.load(folder, dtype="float64", packed=True)
    np.testing.assert_allclose(exact.logits(tokens), plain.logits(tokens), rtol=0, atol=1e-12 * scale)
    for available in (True, False):
        monkeypatch.setattr(four_bit, "available", lambda available=available: available)
        model = et.load(folder, packed=True)
        cache = model.cache(16)
        steps = [model.decoder.forward(tokens[:, i : i + 1], cache)[0] for i in range(tokens.shape[1])]
        found = np.concatenate(steps, axis=1)
        np.testing.assert_allclose(found, plain.logits(tokens), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("case", CASES)
def test_packed_matrices_take_the_bytes_of_the_file(case: str, tmp_path: Path) -> None:
    model = et.load(folder_of(case, tmp_path), packed=True)
    held = sum(leaf.nbytes for _, leaf in named_leaves(model.decoder) if isinstance(leaf, Leaf))
    stored = sum(golden()[f"{case}/{name}"].nbytes for name in descriptions()[case]["tensors"])
    assert held <= 1.25 * stored  # zero points take a byte, block scales are repeated for the rows


@pytest.mark.parametrize(
    "case", ["fp8, blocks", "gptq, 4 bits, act-order", "awq", "ct, 4 bits, zeros", "mlx, 3 bits"]
)
def test_rows_are_those_of_the_whole(case: str, tmp_path: Path) -> None:
    """Pieces that do not begin at the boundary of a word."""
    from einsum_transformer.formats.folder import SafetensorsFolder
    from einsum_transformer.formats.quantized_folder import QuantizedFolder
    from einsum_transformer.models.unsupported import quantization_settings

    folder = folder_of(case, tmp_path)
    settings = quantization_settings(descriptions()[case]["config"])
    tensors = QuantizedFolder(SafetensorsFolder(folder), settings)
    for name in tensors.names():
        whole = tensors.read(name)
        if whole.ndim == 2:
            for start, stop in ((0, 1), (3, 30), (29, 32), (0, len(whole))):
                np.testing.assert_array_equal(tensors.read_rows(name, start, stop), whole[start:stop])


def without(suffix: str) -> Callable[[dict[str, Array]], None]:
    def change(tensors: dict[str, Array]) -> None:
        del tensors[next(name for name in tensors if name.endswith(suffix))]

    return change


def cut(suffix: str, axis: int = 0) -> Callable[[dict[str, Array]], None]:
    def change(tensors: dict[str, Array]) -> None:
        name = next(name for name in tensors if name.endswith(suffix))
        tensors[name] = np.ascontiguousarray(tensors[name].take(range(tensors[name].shape[axis] - 1), axis))

    return change


def filled(suffix: str, value: float) -> Callable[[dict[str, Array]], None]:
    def change(tensors: dict[str, Array]) -> None:
        name = next(name for name in tensors if name.endswith(suffix))
        tensors[name] = np.full_like(tensors[name], value)

    return change


WRONG_TENSORS = {
    "scales with too few rows": ("fp8, blocks", cut("weight_scale_inv"), "requires F32 or F16 or BF16"),
    "zero points with too few columns": ("gptq, 4 bits", cut("qzeros", 1), "qzeros.*requires I32"),
    "no zero points": ("gptq, 4 bits", without("qzeros"), "'[^']*qzeros' is missing"),
    "a group that does not exist": (
        "gptq, 4 bits, act-order",
        filled("g_idx", 9),
        "g_idx has a group outside",
    ),
    "a negative group": ("gptq, 4 bits, act-order", filled("g_idx", -1), "g_idx has a group outside"),
    "scales of AWQ": ("awq", cut("scales", 1), "AWQ requires"),
    "a shape that contradicts": ("ct, 4 bits", filled("weight_shape", 1 << 40), "does not agree with 4 bits"),
    "a negative shape": ("ct, 4 bits", filled("weight_shape", -64), "does not agree with 4 bits"),
    "no shape": ("ct, 4 bits", without("weight_shape"), "has no `weight_shape`"),
    "packed words": ("ct, 4 bits, zeros", cut("weight_packed", 1), "does not agree with 4 bits"),
    "zero points along rows": (
        "ct, 4 bits, zeros",
        cut("weight_zero_point"),
        "weight_zero_point.*requires I32",
    ),
    "block scales": ("ct, nvfp4", cut("weight_scale", 1), "weight_scale.*requires F8_E4M3"),
    "scales of MLX": ("mlx, 4 bits", cut("scales", 1), "no bits and group_size of `quantization` explain"),
    "nan": ("mlx, 4 bits", filled("scales", np.nan), "contain nan or inf"),
    "inf": ("ct, int8", filled("weight_scale", np.inf), "contain nan or inf"),
}


@pytest.mark.parametrize(("case", "change", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
@pytest.mark.parametrize("packed", [False, True])
def test_tensors_that_contradict_are_rejected(
    case: str, change: Callable[[dict[str, Array]], None], message: str, packed: bool, tmp_path: Path
) -> None:
    tensors = tensors_of(case)
    change(tensors)
    with pytest.raises(et.InputError, match=message) as error:
        et.load(folder_of(case, tmp_path, tensors), packed=packed)
    assert "\n" not in str(error.value)


def settings(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        own = config.get("quantization_config") or config["quantization"]
        for key, value in changes.items():
            own[key] = value

    return change


WRONG_SETTINGS = {
    "bits of GPTQ": ("gptq, 4 bits", settings(bits=3), "GPTQ with 2, 4 or 8 bits is supported"),
    "another number of bits": ("gptq, 4 bits", settings(bits=8), "requires|config requires"),
    "group size": ("gptq, 4 bits", settings(group_size="all"), "group_size is 'all'"),
    "dynamic": ("gptq, 4 bits", settings(dynamic={"+:.*": {}}), "`dynamic` settings"),
    "format of GPTQ": ("gptq, 4 bits", settings(checkpoint_format="marlin"), "'marlin'"),
    "version of AWQ": ("awq", settings(version="gemv"), "version 'gemv'"),
    "blocks": ("fp8, blocks", settings(weight_block_size=[0, 4]), "weight_block_size"),
    "status": ("ct, 4 bits", settings(quantization_status="frozen"), "not compressed"),
    "sparsity": ("ct, 4 bits", settings(sparsity_config={"format": "sparse-24"}), "`sparsity_config`"),
    "groups": ("ct, 4 bits", settings(config_groups=None), "no `config_groups`"),
    "mode": ("mlx, 4 bits", settings(mode="nf4"), "mode 'nf4' is not supported"),
    "bits of MLX": ("mlx, 4 bits", settings(bits=7), "bits 7"),
    "another method": (
        "awq",
        settings(quant_method="bitsandbytes"),
        "'bitsandbytes' checkpoints are not supported",
    ),
}


@pytest.mark.parametrize(("case", "change", "message"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS.keys())
def test_settings_that_are_not_supported(
    case: str, change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    folder = folder_of(case, tmp_path, change=change)
    with pytest.raises(et.InputError, match=message) as error:
        et.load(folder)
    assert "\n" not in str(error.value)
    assert et.inspect(folder).problems


def test_matrices_of_gpt2_have_other_rows(tmp_path: Path) -> None:
    """Its rows are inputs: a square matrix would be transposed without a message."""
    golden = load_golden("gpt2_plain")
    weights = dict(golden.weights)
    name = next(name for name in weights if name.endswith("attn.c_proj.weight"))
    codes = weights.pop(name).astype(ml_dtypes.float8_e4m3fn)
    scales = np.ones((1, 1), np.float32)
    weights |= {name: codes, f"{name}_scale_inv": scales}
    config = golden.config | {"quantization_config": {"quant_method": "fp8"}}
    write_safetensors(tmp_path / "model.safetensors", weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(et.InputError, match="quantized matrices of gpt2 are not supported"):
        et.load(tmp_path)


def test_adapters_train_on_packed_weights(tmp_path: Path) -> None:
    model = et.with_lora(et.load(folder_of("ct, 4 bits", tmp_path), packed=True), et.LoRAConfig(r=2))
    trainer = et.Trainer(
        model, et.RandomTokens(40, 2, 8, fixed=True), et.TrainingSettings(et.Schedule(1e-1, 3, "constant"))
    )
    losses = [report.loss for report in trainer.run(3)]
    assert losses[-1] < losses[0]
