"""The tokenizer class that transformers' AutoTokenizer selects for a folder, and its default special tokens.

A class of this module builds its tokenizer from vocabulary and merges alone; every other class, here called
BACKEND, uses tokenizer.json unchanged. Rules and tables follow transformers 5.24
(`models/auto/tokenization_auto.py`).
"""

from collections.abc import Mapping
from typing import Any

from einsum_transformer.errors import InputError

BACKEND = "TokenizersBackend"
# Key of tokenizer_config.json that marks tokenizer.json as complete, so that no class rebuilds the tokenizer.
# transformers ignores the key.
COMPLETE = "einsum_transformer_complete"
_END = "<|endoftext|>"
_GPT2 = {"bos_token": _END, "eos_token": _END, "unk_token": _END}
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_CODE_LLAMA = {
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}
# Default named special tokens of each class.
DEFAULTS: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": _GPT2,
    "CodeGenTokenizer": _GPT2,
    "GPTNeoXTokenizer": _GPT2 | {"pad_token": "<|padding|>"},
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
    "Qwen3_5Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
    "RobertaTokenizer": _LLAMA
    | {"sep_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"},
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "sep_token": "<SEP>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "mask_token": "<MASK_TOKEN>",
    },
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "LlamaTokenizer": _LLAMA,
    "CodeLlamaTokenizer": _LLAMA | _CODE_LLAMA,
}
# Default special tokens without a name.
DEFAULT_EXTRA = {"CodeLlamaTokenizer": tuple(_CODE_LLAMA.values())}
# Classes without a pad token unless the files name one; the others use the token of "padding".
NO_PAD = frozenset({"GPT2Tokenizer", "CodeGenTokenizer"})

_MODELS = {
    "GPT2Tokenizer": "blip-2 codegen dbrx emu3 gpt2 gpt_neo gptj hyperclovax_vision_v2 instructblip "
    "instructblipvideo jais2 opt phi starcoder2",
    "GPTNeoXTokenizer": "falcon_mamba gpt_neox mamba mamba2 mpt olmo olmoe rwkv xlstm",
    "Qwen2Tokenizer": "audioflamingo3 colqwen2 cosmos3_omni dots3_note fun_asr_nano hunyuan_vl internvl "
    "lighton_ocr moss_transcribe_diarize ovis2 qianfan_ocr qwen2 qwen2_5_omni qwen2_5_vl qwen2_audio "
    "qwen2_moe qwen2_vl qwen3 qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe vibevoice",
    "Qwen3_5Tokenizer": "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp",
    "GemmaTokenizer": "diffusion_gemma gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma "
    "shieldgemma2 t5gemma zaya",
    "LlamaTokenizer": "idefics idefics2",
    "CodeLlamaTokenizer": "code_llama",
    "CohereTokenizer": "aya_vision cohere cohere2",
    "RobertaTokenizer": "bart bridgetower clap data2vec-text ibert lilt longformer mega mra roberta "
    "roberta-prelayernorm",
    BACKEND: "EvollaModel arctic aria beam bigbird_pegasus camembertv2-base canary chatlm cohere_asr "
    "ernie4_5 ernie4_5_moe flex_olmo fuyu glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe glm_image glmasr "
    "got_ocr2 gpt_bigcode gradium_phonon_tts granite granitemoe granitemoehybrid granitemoeshared h2ovl_chat "
    "hyperclovax hyperclovax_vlm internlm2 internlm3 iquestcoder jamba kimi_k25 kimi_linear kosmos-2 llava "
    "llava_next mimo_v2_flash minicpm3 minicpm_ocr minicpmv minicpmv4_6 minicpmv4_7 minimax_m2 ministral "
    "ministral3 mistral mistral3 mistral_large4 mixtral modernbert modernbert-decoder molmo molmo2 "
    "nemo_speechlm nemotron nvfp4 nystromformer olmo2 olmo3 olmo_hybrid omniasr opencua openvla paddleocr_vl "
    "pegasus_x persimmon phi3 phi3_v phimoe pix2struct pixtral pocket_tts smolvlm stablelm step3_vl umt5 "
    "vipllava voxtral voxtral_realtime xlm-roberta-xl",
}
CLASS_OF_MODEL = {model: name for name, models in _MODELS.items() for model in models.split()}
# Models whose published tokenizer_class is wrong: their registered class is always used. The other models of
# transformers' list use BACKEND or a class that is not built here, with the same result.
MISSTATED = frozenset(
    {"qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "hyperclovax_vision_v2"}
)

# Classes that can be built from vocab.json and merges.txt, without a tokenizer.json.
_BYTE_LEVEL = ("GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer", "RobertaTokenizer")


def class_name(config: Mapping[str, Any], model: Mapping[str, Any], byte_level: bool) -> str:
    """Return the class that AutoTokenizer selects: a key of DEFAULTS, or BACKEND.

    config, model: tokenizer_config.json and config.json. byte_level: tokenizer.json contains "ByteLevel",
    which LlamaTokenizer cannot build.
    """
    if config.get(COMPLETE) is True:
        return BACKEND
    stated = stated_class(config, model)
    model_type = model.get("model_type")
    registered = CLASS_OF_MODEL.get(model_type) if isinstance(model_type, str) else None
    name = registered if stated is None else stated
    if stated is not None and not _has_code(config):
        if stated == "LlamaTokenizer" and byte_level and model_type not in MISSTATED:
            return BACKEND
        if registered is not None and (registered == BACKEND or model_type in MISSTATED):
            name = registered
    return name if name in DEFAULTS else BACKEND


def stated_class(config: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    """Return `tokenizer_class` of tokenizer_config.json or else of config.json, without the suffix Fast."""
    stated = config.get("tokenizer_class") or model.get("tokenizer_class")
    return None if not stated else str(stated).removesuffix("Fast")


def class_of(config: Mapping[str, Any], model: Mapping[str, Any], folder: str) -> str:
    """Return the class of a folder with vocab.json and merges.txt alone; InputError for an unknown class."""
    stated = stated_class(config, model)
    # If AutoTokenizer would require a tokenizer.json, use the stated class if it does not need the file.
    for name in (class_name(config, model, False), stated):
        if name in _BYTE_LEVEL:
            return name
    known = ", ".join(_BYTE_LEVEL)
    what = f"tokenizer_class {stated!r}" if stated is not None else f"model_type {model.get('model_type')!r}"
    raise InputError(
        f"{folder}: {what} is not supported with vocab.json and merges.txt alone (supported: {known}); "
        f"convert the tokenizer with transformers, AutoTokenizer.from_pretrained({folder!r})"
        f".save_pretrained({folder!r})"
    )


def _has_code(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint names Python code for its tokenizer, which is never run."""
    named = config.get("auto_map")
    return bool(named.get("AutoTokenizer") if isinstance(named, Mapping) else named)
