"""Messages for JSON files that do not describe a supported decoder, with what to use instead."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from einsum_transformer.errors import ConfigError, InputError
from einsum_transformer.formats.codes import METHOD
from einsum_transformer.formats.files import read_json
from einsum_transformer.formats.quantized_methods import METHODS, method_name
from einsum_transformer.models.config import MOST_LAYERS

_MOST_EXPERTS = 1 << 16
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

_KINDS: dict[str, tuple[str, ...]] = {
    "an encoder, which does not generate text": (
        *("albert", "bert", "bert-generation", "bertweet", "big_bird", "camembert", "canine", "convbert"),
        *("data2vec-text", "deberta", "deberta-v2", "distilbert", "dpr", "electra", "ernie", "ernie_m"),
        *("esm", "eurobert", "flaubert", "fnet", "funnel", "ibert", "layoutlm", "layoutlmv2", "layoutlmv3"),
        *("lilt", "longformer", "luke", "mobilebert", "modernbert", "mpnet", "mra", "nezha", "nomic_bert"),
        *("nystromformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
        *("squeezebert", "splinter", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "yoso"),
    ),
    "an encoder-decoder": (
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "encoder-decoder", "fsmt", "led"),
        *("longt5", "m2m_100", "marian", "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart"),
        *("pix2struct", "prophetnet", "switch_transformers", "t5", "t5gemma", "udop", "umt5"),
        *("vision-encoder-decoder", "speech-encoder-decoder", "trocr", "xlm-prophetnet"),
    ),
    "a vision model": (
        *("beit", "clip", "clip_text_model", "clip_vision_model", "chinese_clip", "convnext", "convnextv2"),
        *("data2vec-vision", "deit", "depth_anything", "detr", "dinov2", "dinov3_vit", "dpt", "efficientnet"),
        *("grounding-dino", "mask2former", "maskformer", "mobilenet_v2", "mobilevit", "owlvit", "owlv2"),
        *("resnet", "rt_detr", "sam", "sam2", "segformer", "siglip", "siglip2", "swin", "swinv2", "vit"),
        *("vit_mae", "videomae", "yolos", "zoedepth"),
    ),
    "an audio model": (
        *("audio-spectrogram-transformer", "bark", "clap", "data2vec-audio", "encodec", "hubert", "mimi"),
        *("moonshine", "musicgen", "seamless_m4t", "seamless_m4t_v2", "sew", "speech_to_text", "speecht5"),
        *("unispeech", "vits", "wav2vec2", "wav2vec2-bert", "wavlm", "whisper"),
    ),
    "a recurrent (state-space) model": (
        *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2", "nemotron_h"),
        *("recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"),
    ),
}


def other_model(raw: Mapping[str, Any]) -> str:
    """The kind of model that a config.json with an unsupported model_type describes, "" if it is unknown."""
    found = next((kind for kind, names in _KINDS.items() if raw.get("model_type") in names), "")
    if not found and raw.get("is_encoder_decoder") is True:
        found = "an encoder-decoder"
    if not found and any(isinstance(raw.get(f"{part}_config"), dict) for part in ("vision", "audio")):
        found = "a multimodal model"
    return found


_SETTINGS = ("quantization_config", "quantization", "compression_config")
"""Keys of config.json that describe quantized weights."""


def quantization_settings(keys: Mapping[str, Any]) -> Any:
    """The description of quantized weights in a config.json, or None."""
    return next((keys[name] for name in _SETTINGS if keys.get(name) is not None), None)


def quantized(raw: Mapping[str, Any]) -> str:
    """The quantization that a config.json describes, with what to use instead; "" if it is supported or there
    is none."""
    for keys in _whole_and_text(raw):
        for name in _SETTINGS:
            settings = keys.get(name)
            supported = keys is raw and (is_own(settings) or method_name(settings) in METHODS)
            if settings is not None and not supported:
                return f"{name}: {_method(settings)}"
    return ""


def is_own(settings: Any) -> bool:
    """Whether a `quantization_config` describes codes and scales that `Model.save` wrote."""
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def _whole_and_text(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """A config.json, and its text_config if it describes a multimodal model."""
    text = raw.get("text_config")
    return (raw, text) if isinstance(text, dict) else (raw,)


def _method(settings: Any) -> str:
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if isinstance(settings, dict) and method is None:
        marks = {"load_in_4bit": "bitsandbytes", "load_in_8bit": "bitsandbytes", "w_bit": "awq"}
        marks |= {"config_groups": "compressed-tensors", "weight_block_size": "fp8"}
        method = next((name for key, name in marks.items() if key in settings), None)
    named = f"{method!r:.60} checkpoints" if method is not None else "quantized checkpoints"
    return f"{named} are not supported; use the unquantized one"


def other_json(raw: Mapping[str, Any]) -> str:
    """The kind of a JSON file that was given as a config but is not one, "" if it is unknown."""
    if "weight_map" in raw:
        return "an index of shards, not a config: give the folder that contains it"
    if "peft_type" in raw or "fine_tune_type" in raw or "lora_parameters" in raw:
        return adapter(raw)
    if "_class_name" in raw or "_diffusers_version" in raw:
        return "part of a diffusers pipeline, not a language model"
    if {"dim", "n_layers"} <= raw.keys():
        return "params.json of Meta's or Mistral's own format: use the model in Hugging Face format"
    if "builder_config" in raw or "pretrained_config" in raw or {"architecture", "mapping"} <= raw.keys():
        return "a config of TensorRT-LLM: use the original model"
    if "added_tokens" in raw and "model" in raw:
        return "a tokenizer, not a config: give the folder that contains it"
    return ""


def adapter(raw: Mapping[str, Any]) -> str:
    """The message for an adapter that was given as the model, from its adapter_config.json."""
    mlx = "peft_type" not in raw and ("fine_tune_type" in raw or "lora_parameters" in raw)
    base = raw.get("model" if mlx else "base_model_name_or_path")
    of = f" of {base!r:.120}" if isinstance(base, str) and base else ""
    by = " of mlx-lm" if mlx else ""
    if mlx and raw.get("fine_tune_type", "lora") != "lora":
        return f"an adapter{of}{by}, not a model: merge it with `mlx_lm.fuse` and give the result"
    return f"an adapter{of}{by}, not a model: give the base model, and the adapter as `adapter`"


def adapter_in(folder: Path) -> str:
    """The message of `adapter` for a folder that contains an adapter, else ""."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return ""
    try:
        return adapter(read_json(path))
    except InputError:
        return adapter({})


def check_layers(raw: Mapping[str, Any], source: str) -> None:
    """Reject absurd numbers of layers before anything is allocated for each of them."""
    for keys in _whole_and_text(raw):
        for name in _LAYERS:
            value = keys.get(name)
            if isinstance(value, (int, float)) and value > MOST_LAYERS:
                raise ConfigError(
                    f"{source}: {name} is {value!r:.40}, at most {MOST_LAYERS} layers are supported"
                )


def check_experts(layers: int, experts: int, source: str) -> None:
    """Reject absurd numbers of experts in all layers together."""
    if layers * experts > _MOST_EXPERTS:
        raise ConfigError(
            f"{source}: num_experts is {experts} in each of {layers} layers: at most {_MOST_EXPERTS} in all "
            "layers together are supported"
        )
