"""Write a Hugging Face checkpoint as GGUF, as llama.cpp's convert_hf_to_gguf.py does."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_VERSION, MODEL_ARCH, MODEL_ARCH_NAMES, Keys, LlamaFileType
from gguf.tensor_mapping import get_tensor_name_map

import gguf_metadata as metadata
from gguf_metadata import Config, Metadata

Array = np.ndarray
Tensors = Iterator[tuple[str, Array]]
BUFFERS = (".attn.bias", ".masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


def write_model_gguf(
    path: Path,
    config: Config,
    weights: Mapping[str, Array],
    *,
    expanded: bool = False,
    tensors_each: int = 0,
    small_first: bool = False,
    **extra_metadata: Any,
) -> Path:
    """Write a checkpoint, its config and its tensors by their names on disk, as a GGUF file.

    tensors_each: the number of tensors per file of a split model; small_first: the first file has no tensors.
    expanded: the older form of deepseek_v2, with attn_kv_b not split. extra_metadata: keys that replace those
    of the converter, or remove them if None; {arch} in a key is the architecture; an array is a tensor."""
    conversion = CONVERSIONS[config["model_type"] + " expanded" * expanded]
    arch = MODEL_ARCH_NAMES[conversion.arch]
    general = {
        Keys.General.FILE_TYPE: int(LlamaFileType.ALL_F32),
        Keys.General.QUANTIZATION_VERSION: GGML_QUANT_VERSION,
    }
    tensors = dict(_gguf_tensors(conversion, config, weights))
    tensors |= {key: value for key, value in extra_metadata.items() if isinstance(value, Array)}
    keys = {key.format(arch=arch): value for key, value in (general | conversion.metadata(config)).items()}
    keys |= {key.format(arch=arch): value for key, value in extra_metadata.items() if key not in tensors}
    writer = GGUFWriter(path, arch, split_max_tensors=tensors_each, small_first_shard=small_first)
    for key, value in keys.items():
        if value is not None:
            _add(writer, key, value)
    for name, array in tensors.items():
        always_32_bit = array.ndim == 1 or name.endswith("_norm.weight")
        writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32 if always_32_bit else None))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)


def _gguf_tensors(conversion: "Conversion", config: Config, weights: Mapping[str, Array]) -> Tensors:
    yield from conversion.computed(config)
    names = get_tensor_name_map(
        conversion.arch, metadata.first(config, "num_hidden_layers", "n_layer", "n_layers")
    )
    for on_disk, tensor in _experts_stacked(weights):
        if on_disk.endswith(BUFFERS):
            continue
        for name, array in conversion.change(config, on_disk, tensor):
            mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if mapped is None:
                raise KeyError(f"{name} has no name in GGUF files of {conversion.arch.name}")
            yield mapped, array


def _experts_stacked(weights: Mapping[str, Array]) -> Tensors:
    """The tensors, with the experts of a layer stacked to (experts, out, in)."""
    experts: dict[str, dict[int, Array]] = {}
    for name, array in weights.items():
        if found := re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+\.weight)", name):
            experts.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = array
        else:
            yield name, array
    for name, arrays in experts.items():
        yield name, np.stack([arrays[expert] for expert in range(len(arrays))])


def _same(config: Config, name: str, array: Array) -> Tensors:
    yield name, array


def _interleave_halves(config: Config, name: str, array: Array) -> Tensors:
    """Permute rows of q and k from pairs (i, i + h/2) to (2i, 2i + 1), by the number of heads of each."""
    heads = config["num_attention_heads"]
    counts = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}
    if count := counts.get(name.split(".")[-2]):
        halves = array.reshape(count, 2, array.shape[0] // count // 2, *array.shape[1:])
        array = halves.swapaxes(1, 2).reshape(array.shape)
    yield name, array


def _one_in_norms(config: Config, name: str, array: Array) -> Tensors:
    """Add 1 to norms, which llama.cpp multiplies by weight, not 1 + weight; drop the copy of a tied head."""
    if name != "lm_head.weight":
        yield name, array + 1 if name.endswith("norm.weight") else array


def _conv1d_transposed(config: Config, name: str, array: Array) -> Tensors:
    yield name, array.T if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) else array


def _qkv_sorted(config: Config, name: str, array: Array) -> Tensors:
    """Reorder rows from q, k and v of each head to all of q, all of k and all of v."""
    if ".query_key_value." in name:
        heads = config["num_attention_heads"]
        by_head = array.reshape(heads, 3, array.shape[0] // heads // 3, *array.shape[1:])
        array = by_head.swapaxes(0, 1).reshape(array.shape)
    yield name, array


def _kv_b_split(config: Config, name: str, array: Array) -> Tensors:
    """Split kv_b_proj (h (n v), r) into k_b (h, r, n) and v_b (h, v, r)."""
    if not name.endswith("kv_b_proj.weight"):
        yield name, array
        return
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    by_head = array.reshape(heads, -1, array.shape[1])
    yield name.replace("kv_b_proj", "k_b_proj"), by_head[:, :nope].swapaxes(1, 2)
    yield name.replace("kv_b_proj", "v_b_proj"), by_head[:, nope:]


def _nothing(config: Config) -> Tensors:
    yield from ()


def _llama3_divisors(config: Config) -> Tensors:
    """rope_freqs.weight: the divisors of the frequencies in llama3 scaling."""
    rope = metadata.rope_of(config)
    if rope.get("rope_type") != "llama3":
        return
    size, trained = metadata.head_size(config), metadata.original_length(config)
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    unscaled = np.clip((trained / waves - low) / (high - low), 0, 1)
    yield "rope_freqs.weight", 1 / ((1 - unscaled) / rope["factor"] + unscaled)


def _longrope_divisors(config: Config) -> Tensors:
    rope = metadata.rope_of(config)
    for length in ("long", "short"):
        if factors := rope.get(f"{length}_factor"):
            yield f"rope_factors_{length}.weight", np.asarray(factors)


@dataclass(frozen=True, slots=True)
class Conversion:
    """The conversion of one architecture."""

    arch: MODEL_ARCH
    metadata: Callable[[Config], Metadata]
    change: Callable[[Config, str, Array], Tensors] = _same
    """The converted tensors of a tensor, with Hugging Face names."""
    computed: Callable[[Config], Tensors] = _nothing
    """Additional tensors of the file, with GGUF names."""


_LLAMA = Conversion(MODEL_ARCH.LLAMA, metadata.llama, _interleave_halves, _llama3_divisors)
CONVERSIONS: dict[str, Conversion] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "smollm3": Conversion(MODEL_ARCH.SMOLLM3, metadata.llama, _interleave_halves, _llama3_divisors),
    "granite": Conversion(MODEL_ARCH.GRANITE, metadata.granite, _interleave_halves, _llama3_divisors),
    "qwen2": Conversion(MODEL_ARCH.QWEN2, metadata.common),
    "qwen3": Conversion(MODEL_ARCH.QWEN3, metadata.common),
    "qwen2_moe": Conversion(MODEL_ARCH.QWEN2MOE, metadata.qwen_moe),
    "qwen3_moe": Conversion(MODEL_ARCH.QWEN3MOE, metadata.qwen_moe),
    "gemma": Conversion(MODEL_ARCH.GEMMA, metadata.gemma, _one_in_norms),
    "gemma2": Conversion(MODEL_ARCH.GEMMA2, metadata.gemma2, _one_in_norms),
    "gemma3_text": Conversion(MODEL_ARCH.GEMMA3, metadata.gemma3, _one_in_norms),
    "phi": Conversion(MODEL_ARCH.PHI2, metadata.phi2),
    "phi3": Conversion(MODEL_ARCH.PHI3, metadata.phi3, computed=_longrope_divisors),
    "gpt2": Conversion(MODEL_ARCH.GPT2, metadata.gpt2, _conv1d_transposed),
    "gpt_neox": Conversion(MODEL_ARCH.GPTNEOX, metadata.gptneox, _qkv_sorted),
    "mpt": Conversion(MODEL_ARCH.MPT, metadata.mpt),
    "olmo2": Conversion(MODEL_ARCH.OLMO2, metadata.common),
    "olmo3": Conversion(MODEL_ARCH.OLMO2, metadata.olmo3),
    "deepseek": Conversion(MODEL_ARCH.DEEPSEEK, metadata.deepseek, _interleave_halves),
    "deepseek_v2": Conversion(MODEL_ARCH.DEEPSEEK2, metadata.deepseek2, _kv_b_split),
    "deepseek_v2 expanded": Conversion(MODEL_ARCH.DEEPSEEK2, metadata.deepseek2_expanded),
}
