"""How each key of tokenizer_config.json and each `tokenizer.*` key of a GGUF file is treated.

A key is used, ignored because it changes neither ids nor text here, ignored because tokenizer.json already
contains its effect, or named in a note.
"""

from collections.abc import Mapping
from typing import Any

from einsum_transformer.notes import note
from einsum_transformer.text.added_tokens import NAMES, is_typed
from einsum_transformer.text.classes import COMPLETE

APPLIED = frozenset(
    {
        *NAMES,
        *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
        *("model_specific_special_tokens", "chat_template", "split_special_tokens"),
        "clean_up_tokenization_spaces",
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
        # For a class that builds its tokenizer from the vocabulary (classes.py); otherwise tokenizer.json
        # defines these settings, and a note names a key that contradicts it.
        *("tokenizer_class", "add_bos_token", "add_eos_token", "add_prefix_space", "legacy", COMPLETE),
    }
)

IGNORED = frozenset(
    {
        # Batches, padding and truncation; texts are encoded one at a time and never truncated.
        *("model_max_length", "max_len", "max_length", "padding_side", "truncation_side", "stride"),
        *("truncation_strategy", "pad_to_multiple_of", "pad_token_type_id", "model_input_names"),
        *("padding", "truncation", "pad_token_id", "return_token_type_ids"),
        # Names, versions and settings of Python classes.
        *("name_or_path", "processor_class", "image_processor_type", "special_tokens_map_file", "verbose"),
        *(
            "tokenizer_file",
            "vocab_file",
            "merges_file",
            "init_inputs",
            "backend",
            "files_loaded",
            "is_local",
        ),
        *(
            "local_files_only",
            "transformers_version",
            "use_fast",
            "device_map",
            "trust_remote_code",
            "revision",
        ),
        *("gguf_file", "tokenizer", "tokenizer_object", "unk_id", "max_loaded_vocab_size", "config"),
        # Offsets, and parsing of responses.
        *("trim_offsets", "response_schema", "response_template", "chat_control_tokens"),
        # Read only by tokenizers written in Python, not by the native ones used here.
        *("spaces_between_special_tokens", "sp_model_kwargs", "errors", "do_basic_tokenize", "never_split"),
        # transformers removed its default templates, which alone used this key.
        "use_default_system_prompt",
        # Arguments that transformers passes to itself.
        *("_json_padding", "_json_truncation", "_spm_precompiled_charsmap", "tokenizer_padding"),
        *("tokenizer_truncation", "post_processor"),
    }
)

# How the vocabulary was converted: tokenizer.json contains the result.
CONVERTED = frozenset(
    {
        *("do_lower_case", "strip_accents", "tokenize_chinese_chars", "normalization"),
        *(
            "remove_space",
            "keep_accents",
            "add_dummy_prefix",
            "from_slow",
            "do_normalize",
            "unicode_normalizer",
        ),
    }
)

# Named in a note if the value is neither null nor false.
NOTED = {
    "auto_map": "Python code in a checkpoint is never run; tokenizer.json is used",
    "fast_tokenizer_files": "only tokenizer.json is read",
    "fix_mistral_regex": "the pre-tokenizer of tokenizer.json is used unchanged",
}

GGUF_APPLIED = frozenset(
    {
        *("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"),
        *("tokenizer.ggml.scores", "tokenizer.ggml.merges", "tokenizer.ggml.precompiled_charsmap"),
        *("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"),
        *(
            "tokenizer.ggml.eom_token_id",
            "tokenizer.ggml.unknown_token_id",
            "tokenizer.ggml.padding_token_id",
        ),
        *("tokenizer.ggml.seperator_token_id", "tokenizer.ggml.mask_token_id", "tokenizer.ggml.cls_token_id"),
        *("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix"),
        *("tokenizer.ggml.remove_extra_whitespaces", "tokenizer.chat_template"),
    }
)

GGUF_IGNORED = frozenset(
    {
        # Infilling, which is not supported; the tokens themselves are in the vocabulary.
        *(f"tokenizer.ggml.fim_{part}_token_id" for part in ("pre", "suf", "mid", "pad", "rep", "sep")),
        *(f"tokenizer.ggml.{part}_token_id" for part in ("prefix", "suffix", "middle")),
        # Segment ids of encoders, the names of the templates, and copies of other keys.
        *("tokenizer.ggml.token_type_count", "tokenizer.chat_templates", "tokenizer.huggingface.json"),
        "tokenizer.rwkv.world",
    }
)

GGUF_NOTED = {
    "tokenizer.ggml.add_sep_token": "a separator is only added between text pairs, which are not supported",
    "tokenizer.ggml.normalizer.lowercase": "it applies to WordPiece vocabularies only",
}


def note_config_keys(config: Mapping[str, Any], path: str) -> None:
    """Note the keys of a tokenizer_config.json that are not used but may change the result."""
    named = {key for key, value in config.items() if _is_named_token(key, value)}
    _note_keys(config, APPLIED | IGNORED | CONVERTED | named, NOTED, path)


def note_gguf_keys(metadata: Mapping[str, Any], path: str) -> None:
    """Note the same for the `tokenizer.*` keys of a GGUF file."""
    own = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    templates = {key for key in own if key.startswith("tokenizer.chat_template.")}
    _note_keys(own, GGUF_APPLIED | GGUF_IGNORED | templates, GGUF_NOTED, path)


def _note_keys(
    values: Mapping[str, Any], known: frozenset[str], reasons: Mapping[str, str], path: str
) -> None:
    """Note the keys that are set but not in `known`, in one line; reasons: why some of them are not used."""
    is_set = [key for key, value in values.items() if value is not None and value is not False]
    if unused := [key for key in is_set if key not in known]:
        why = "; ".join(f"{key}: {reasons.get(key, 'not a known key')}" for key in unused)
        note(f"{path}: not used: {why}")


def _is_named_token(key: str, value: Any) -> bool:
    """Whether a key is a model-specific special token, such as `image_token`."""
    return key.endswith("_token") and (isinstance(value, str) or is_typed(value))
