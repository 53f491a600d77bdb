"""Write text_folders.json and text_classes.json of tests/golden: how AutoTokenizer loads tokenizer folders.

Requires transformers==5.24.0 and gguf; does not use the network.

    python tools/golden_tokenizers.py
"""

import ast
import inspect
import json
import os
import tempfile
import textwrap
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import tokenizers
import transformers
from transformers import tokenization_utils_base, tokenization_utils_tokenizers
from transformers.models.auto import tokenization_auto
from transformers.models.cohere import tokenization_cohere
from transformers.models.gemma import tokenization_gemma
from transformers.models.gpt2 import tokenization_gpt2
from transformers.models.gpt_neox import tokenization_gpt_neox
from transformers.models.llama import tokenization_llama
from transformers.models.qwen2 import tokenization_qwen2
from transformers.models.roberta import tokenization_roberta

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
STRINGS = [
    "hello <|im_start|>user\nIt's 2024.<|im_end|>",
    "<|im_end|> hello  <image> <tool> <x>",
    "word<tool>word <tool>. hi <|endoftext|>",
    "Cafe\u0301 12345, don't!  \n\n é",
]
START = {"content": "<|im_start|>", "special": True}
END = {"content": "<|im_end|>", "special": True}
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content} | FLAGS | {"special": True} | flags


def typed(content: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken"} | token(content, **flags)


def base() -> dict[str, Any]:
    """A byte-level BPE of 300 tokens and `<|endoftext|>`."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([*STRINGS, "hello user word don't It's 2024"] * 3, trainer)
    return json.loads(backend.to_str())


def cases(size: int) -> dict[str, dict[str, Any]]:
    """Name -> changes of tokenizer.json ("added", "post_processor") and the other files of the folder."""
    decoder = {str(size): token("<|im_start|>"), str(size + 1): token("<|im_end|>")}
    both = {"eos_token": "<|im_end|>", "added_tokens_decoder": decoder}
    tool = {"id": size, **token("<tool>")}
    begins = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    config = "tokenizer_config.json"
    mapping = "special_tokens_map.json"
    more = "added_tokens.json"
    return {
        "decoder": {config: both},
        "decoder_out_of_order": {config: both | {"added_tokens_decoder": dict(reversed(decoder.items()))}},
        "decoder_and_map": {config: both, mapping: {"eos_token": "<|im_start|>", "pad_token": "<image>"}},
        "decoder_and_added": {config: both, more: {"<tool>": size}},
        "decoder_knows_base": {
            config: {"added_tokens_decoder": {"0": token("<|endoftext|>", special=False)} | decoder}
        },
        "additional": {
            config: {"additional_special_tokens": ["<image>", "<tool>"], "eos_token": "<|im_end|>"}
        },
        "additional_typed": {
            config: {"additional_special_tokens": [typed("<tool>", lstrip=True, rstrip=True)]}
        },
        "extra_list": {config: {"extra_special_tokens": ["<image>", "<tool>"], "pad_token": "<|im_end|>"}},
        "extra_dict": {config: {"extra_special_tokens": {"image_token": "<image>", "tool": "<tool>"}}},
        "extra_and_additional": {
            config: {"extra_special_tokens": ["<image>"], "additional_special_tokens": ["<tool>"]}
        },
        "extra_dict_and_additional": {
            config: {
                "extra_special_tokens": {"image_token": "<image>"},
                "additional_special_tokens": ["<tool>"],
            }
        },
        "model_specific": {config: {"model_specific_special_tokens": {"image_token": "<image>"}}},
        "model_specific_and_own": {
            config: {"model_specific_special_tokens": {"image_token": "<image>"}, "tool_token": "<tool>"}
        },
        "model_specific_and_map": {
            config: {"model_specific_special_tokens": {"image_token": "<image>"}},
            mapping: {"extra_special_tokens": {"tool_token": "<tool>"}},
        },
        "added_tokens_additional_in_map": {
            more: {"<tool>": size, "<image>": size + 1},
            mapping: {"additional_special_tokens": ["<tool>"], "pad_token": "<image>"},
        },
        "added_tokens_typed": {
            more: {"<tool>": size, "<image>": size + 1},
            config: {"additional_special_tokens": [typed("<tool>")], "pad_token": typed("<image>")},
        },
        "additional_typed_not_special": {
            config: {"additional_special_tokens": [typed("<tool>", special=False), typed("<image>")]}
        },
        "twice_with_other_flags": {
            config: {"bos_token": "<tool>", "pad_token": typed("<tool>", lstrip=True, single_word=True)}
        },
        "own_names": {
            config: {"image_token": "<image>", "boi_token": typed("<tool>"), "eos_token": "<|endoftext|>"}
        },
        "added_tokens": {
            more: {"<|im_end|>": size + 1, "<|im_start|>": size},
            config: {"eos_token": "<|im_end|>"},
        },
        "added_tokens_and_map": {
            more: {"<|im_end|>": size + 1, "<tool>": size},
            mapping: {"eos_token": token("<|im_end|>"), "unk_token": "<|endoftext|>"},
        },
        "added_tokens_additional": {
            more: {"<tool>": size, "<image>": size + 1},
            config: {"additional_special_tokens": ["<tool>"]},
        },
        "map": {
            mapping: {"eos_token": "<|im_end|>", "pad_token": token("<tool>", rstrip=True)},
            config: {"eos_token": "<|endoftext|>", "unk_token": None},
        },
        "map_additional": {mapping: {"additional_special_tokens": ["<image>", "<tool>"]}},
        "flags_lstrip": {
            "added": [tool],
            config: {"added_tokens_decoder": {str(size): token("<tool>", lstrip=True)}},
        },
        "flags_rstrip": {
            "added": [tool],
            config: {"added_tokens_decoder": {str(size): token("<tool>", rstrip=True)}},
        },
        "flags_single_word": {
            "added": [tool],
            config: {"added_tokens_decoder": {str(size): token("<tool>", single_word=True)}},
        },
        "flags_special_off": {
            "added": [tool],
            config: {"added_tokens_decoder": {str(size): token("<tool>", special=False)}},
        },
        "flags_special_on": {
            "added": [tool | {"special": False}],
            config: {"added_tokens_decoder": {str(size): token("<tool>")}},
        },
        "flags_normalized": {
            "added": [tool | {"special": False}],
            config: {"added_tokens_decoder": {str(size): token("<tool>", special=False, normalized=True)}},
        },
        "named_is_not_special": {
            "added": [tool | {"special": False}],
            config: {
                "eos_token": "<tool>",
                "added_tokens_decoder": {str(size): token("<tool>", special=False)},
            },
        },
        "named_in_file_only": {"added": [tool | {"special": False}], config: {"eos_token": "<tool>"}},
        "extra_is_not_special": {
            "added": [tool | {"special": False, "normalized": True}],
            config: {
                "additional_special_tokens": ["<tool>"],
                "added_tokens_decoder": {
                    str(size): token("<tool>", special=False, normalized=True, lstrip=True)
                },
            },
        },
        "extra_in_file_only": {
            "added": [tool | {"special": False, "normalized": True, "lstrip": True}],
            config: {"extra_special_tokens": ["<tool>"]},
        },
        "named_by_model_in_file_only": {
            "added": [tool | {"special": False, "rstrip": True}],
            config: {"tool_token": "<tool>", "extra_special_tokens": {"other": "h"}},
        },
        "named_in_vocabulary": {config: {"eos_token": "h"}},
        "named_new_not_special": {
            config: {
                "eos_token": "<tool>",
                "added_tokens_decoder": {str(size): token("<tool>", special=False)},
            }
        },
        "split_special": {config: both | {"split_special_tokens": True}},
        "config_bos_unused": {config: {"bos_token": "<|endoftext|>", "add_bos_token": True}},
        "config_bos_contradicts": {
            "post_processor": begins,
            config: {
                "bos_token": "<|endoftext|>",
                "add_bos_token": False,
                "add_eos_token": True,
                "eos_token": "h",
            },
        },
        "clean_up_bpe": {config: {"clean_up_tokenization_spaces": True}},
        "clean_up_bpe_forced": {
            config: {
                "clean_up_tokenization_spaces": True,
                "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
            }
        },
        "neutral": {
            config: {
                "model_max_length": 5,
                "padding_side": "left",
                "truncation_side": "left",
                "model_input_names": ["input_ids"],
                "spaces_between_special_tokens": True,
                "legacy": False,
                "do_lower_case": True,
                "strip_accents": True,
            }
        },
        "legacy_gpt2": {"layout": "gpt2", config: {}},
        "legacy_gpt2_class": {
            "layout": "gpt2",
            config: {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "errors": "replace"},
        },
        "legacy_gpt2_prefix": {
            "layout": "gpt2",
            config: {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True, "pad_token": "<tool>"},
        },
        "legacy_gpt2_eos": {"layout": "gpt2", config: {"add_bos_token": True, "add_eos_token": True}},
        "legacy_gpt2_added": {"layout": "gpt2", more: {"<tool>": size}, mapping: {"eos_token": "<tool>"}},
        "legacy_neox": {"layout": "gpt_neox", config: {"pad_token": None}},
        "legacy_qwen2": {"layout": "qwen3", config: both | {"tokenizer_class": "Qwen2Tokenizer"}},
        "legacy_qwen2_not_special": {
            "layout": "qwen2_moe",
            config: {
                "added_tokens_decoder": {str(size): token("<tool>", special=False, lstrip=True)},
                "additional_special_tokens": ["<tool>"],
            },
        },
        "legacy_qwen2_other_class": {"layout": "qwen2", config: {"tokenizer_class": "GPT2Tokenizer"}},
        "legacy_roberta": {
            "layout": "roberta",
            config: {"tokenizer_class": "RobertaTokenizer", "mask_token": typed("<mask>", lstrip=True)},
        },
        "legacy_phi": {"layout": "phi", config: {"tokenizer_class": "CodeGenTokenizer"}},
    }


def write(folder: Path, made: dict[str, Any], case: dict[str, Any]) -> None:
    files = {name: content for name, content in case.items() if name.endswith(".json")}
    if "layout" in case:
        files["config.json"] = {"model_type": case["layout"]}
        files["vocab.json"] = made["model"]["vocab"]
        lines = ["#version: 0.2", *(" ".join(pair) for pair in made["model"]["merges"])]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        changed = {"added_tokens": [*made["added_tokens"], *case.get("added", [])]}
        changed |= {"post_processor": case["post_processor"]} if "post_processor" in case else {}
        files["tokenizer.json"] = made | changed
        files["config.json"] = {"model_type": "llama"}
        files.setdefault("tokenizer_config.json", {})
        files["tokenizer_config.json"].setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def result(folder: Path, strings: list[str] = STRINGS) -> dict[str, Any]:
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [reference.encode(text) for text in strings]
    named = reference.special_tokens_map
    return {
        "class": type(reference).__name__,
        "ids": ids,
        "decoded": [reference.decode(row, skip_special_tokens=True) for row in ids],
        "kept": [reference.decode(row, skip_special_tokens=False) for row in ids],
        "named": {name: [text, reference.convert_tokens_to_ids(text)] for name, text in named.items()},
        "size": len(reference),
    }


SPACE = "\u2581"
CLASS_STRINGS = [
    "hello <s>user</s>\nIt's 2024.",
    " <tool>word <tool> é<|endoftext|> x",
    "",
    "Cafe\u0301 12345",
]


def spelled(kind: str) -> dict[str, Any]:
    """A SentencePiece-like BPE, with the normalizer of Llama 2's file (`prepend`) or a later `metaspace`."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [SPACE, *"helowrdusIt'20.4", "he", "ll", "hell", "hello", SPACE + "hello", "us", "er", "user"]
    pieces += [SPACE + "user", "wo", "rd", "word", SPACE + "word"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), (SPACE, "hello"), ("u", "s"), ("e", "r")]
    merges += [("us", "er"), (SPACE, "user"), ("w", "o"), ("r", "d"), ("wo", "rd"), (SPACE, "word")]
    vocab = {text: i for i, text in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *bytes_, *pieces]))}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    made = tokenizers.normalizers
    if kind == "prepend":
        backend.normalizer = made.Sequence([made.Prepend(SPACE), made.Replace(" ", SPACE)])
    else:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(SPACE, "first", split=False)
    steps = tokenizers.decoders
    backend.decoder = steps.Sequence(
        [steps.Replace(SPACE, " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1, 0)]
    )
    begins = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    backend.post_processor = begins
    return json.loads(backend.to_str())


def class_cases() -> list[dict[str, Any]]:
    """(base, model_type of config.json, tokenizer_config.json) of folders with a tokenizer.json."""
    byte_level = [
        ("gpt2", {"model_max_length": 1024}),
        ("gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
        ("gpt2", {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ("phi", {"tokenizer_class": "CodeGenTokenizer", "add_prefix_space": True}),
        ("codegen", {}),
        ("gpt_neox", {"tokenizer_class": "GPTNeoXTokenizer", "add_bos_token": True}),
        ("mpt", {}),
        ("qwen2", {}),
        ("qwen2", {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ("qwen2", {"tokenizer_class": "GPT2Tokenizer"}),
        ("qwen3", {"tokenizer_class": "Qwen2TokenizerFast", "eos_token": "<tool>"}),
        ("qwen3_5", {"tokenizer_class": "Qwen2Tokenizer"}),
        ("llama", {"tokenizer_class": "LlamaTokenizerFast"}),
        ("llama", {"tokenizer_class": "GPT2Tokenizer", "pad_token": None, "bos_token": None}),
        ("llama", {"tokenizer_class": "NoSuchTokenizer"}),
        ("cohere", {"additional_special_tokens": ["<tool>"]}),
        ("olmo2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
        ("no_such_model", {"tokenizer_class": "GPTNeoXTokenizerFast"}),
        ("roberta", {"tokenizer_class": "RobertaTokenizerFast"}),
    ]
    spaced: list[tuple[str, dict[str, Any]]] = [
        ("llama", {"tokenizer_class": name} | more)
        for name in ("LlamaTokenizer", "LlamaTokenizerFast")
        for more in (
            {},
            {"legacy": True},
            {"legacy": False},
            {"legacy": None, "add_prefix_space": None},
            {"add_prefix_space": False, "add_bos_token": False},
            {"additional_special_tokens": [typed("<tool>", normalized=True)]},
        )
    ]
    spaced += [
        ("llama", {}),
        ("llama", {"tokenizer_class": "PreTrainedTokenizerFast", "legacy": True}),
        ("llama", {"tokenizer_class": "CodeLlamaTokenizer"}),
        ("mistral", {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
        ("phi3", {"tokenizer_class": "LlamaTokenizer"}),
        ("mixtral", {}),
        ("gemma", {}),
        ("gemma2", {"tokenizer_class": "GemmaTokenizerFast", "bos_token": "<s>", "mask_token": None}),
        ("gemma3_text", {"tokenizer_class": "PreTrainedTokenizerFast"}),
        (
            "mistral",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "additional_special_tokens": [typed("<tool>", normalized=True)],
            },
        ),
    ]
    bases = {"byte_level": byte_level, "prepend": spaced, "metaspace": spaced}
    return [
        {"base": base, "model_type": model, "config": settings}
        for base, rows in bases.items()
        for model, settings in rows
    ]


def classes(byte_level: dict[str, Any]) -> dict[str, Any]:
    """The class of each folder with its special tokens, ids and text; and the tables of transformers."""
    bases = {
        "byte_level": byte_level,
        "prepend": spelled("prepend"),
        "metaspace": spelled("metaspace"),
    }
    answers = class_cases()
    for case in answers:
        with tempfile.TemporaryDirectory() as name:
            files = {"tokenizer.json": bases[case["base"]], "tokenizer_config.json": case["config"]}
            files["config.json"] = {"model_type": case["model_type"]}
            for file, content in files.items():
                (Path(name) / file).write_text(json.dumps(content), encoding="utf-8")
            case["expected"] = result(Path(name), CLASS_STRINGS)
    models = {
        model: str(name).removesuffix("Fast")
        for model, name in tokenization_auto.TOKENIZER_MAPPING_NAMES.items()
    }
    defaults = {}
    for name in ("GPT2", "CodeGen", "GPTNeoX", "Qwen2", "Roberta", "Cohere", "Gemma", "Llama", "CodeLlama"):
        kind = getattr(transformers, f"{name}Tokenizer")
        taken = inspect.signature(kind.__init__).parameters.values()
        defaults[f"{name}Tokenizer"] = {
            one.name: one.default
            for one in taken
            if one.name.endswith("_token") and isinstance(one.default, str)
        }
    misstated = sorted(tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS)
    return {
        "transformers": transformers.__version__,
        "bases": bases,
        "strings": CLASS_STRINGS,
        "cases": answers,
        "class_of_model": models,
        "misstated": misstated,
        "defaults": defaults,
    }


def clean_up() -> dict[str, Any]:
    """A word vocabulary for clean_up_tokenization_spaces."""
    words = ["<unk>", "a", ".", "?", "!", ",", "'", "n't", "'m", "'s", "'ve", "'re", "do", "▁"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    rows = [list(range(len(words))), [1, 6, 9, 6, 7], [6] * 20, [12, 7, 2, 2, 1, 6, 1], [2], []]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {"tokenizer.json": json.loads(backend.to_str()), "config.json": {"model_type": "llama"}}
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": True,
        }
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content), encoding="utf-8")
        reference = transformers.AutoTokenizer.from_pretrained(folder)
        return {"files": files, "rows": rows, "texts": [reference.decode(row) for row in rows]}


def read_keys(source: str) -> set[str]:
    """Names that code reads from `kwargs` or a config with get, pop, setdefault, `in` or brackets."""
    found = set()
    holders = {"kwargs", "init_kwargs", "local_kwargs", "tokenizer_config"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            holder, first = node.func.value, node.args[0]
            if isinstance(holder, ast.Name) and holder.id in holders and isinstance(first, ast.Constant):
                found.add(first.value)
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant):
            sides = [side.id for side in node.comparators if isinstance(side, ast.Name)]
            found |= {node.left.value} if holders & set(sides) else set()
    return {key for key in found if isinstance(key, str)}


def config_keys() -> list[str]:
    """Every key that transformers reads from a tokenizer_config.json."""
    base_class = tokenization_utils_base.PreTrainedTokenizerBase
    found = set(base_class.SPECIAL_TOKENS_ATTRIBUTES) | {
        "tokenizer_class",
        "auto_map",
        "fast_tokenizer_files",
    }
    for code in (base_class.__init__, base_class._from_pretrained.__func__):
        found |= read_keys(textwrap.dedent(inspect.getsource(code)))
    backend = tokenization_utils_tokenizers.TokenizersBackend
    for code in (
        backend.__init__,
        backend._convert_from_tiktoken.__func__,
        backend.convert_to_native_format.__func__,
    ):
        found |= read_keys(textwrap.dedent(inspect.getsource(code)))
    found.add("fix_mistral_regex")
    for model in (
        tokenization_gpt2.GPT2Tokenizer,
        tokenization_gpt_neox.GPTNeoXTokenizer,
        tokenization_qwen2.Qwen2Tokenizer,
        tokenization_llama.LlamaTokenizer,
        tokenization_gemma.GemmaTokenizer,
        tokenization_cohere.CohereTokenizer,
        tokenization_roberta.RobertaTokenizer,
    ):
        found |= set(inspect.signature(model.__init__).parameters)
    return sorted(found - {"self", "args", "kwargs", "vocab", "merges"})


def template_keywords() -> list[str]:
    """The keywords of apply_chat_template, which are not variables of a template."""
    method = tokenization_utils_base.PreTrainedTokenizerBase.apply_chat_template
    return sorted(set(inspect.signature(method).parameters) - {"self", "conversation", "kwargs"})


def gguf_keys() -> list[str]:
    keys = vars(gguf.constants.Keys.Tokenizer)
    return sorted(value for name, value in keys.items() if not name.startswith("_"))


TALK = "{% for m in messages %}<{{ m.role }}>{{ m.content BODY }}</{{ m.role }}>\n{% endfor %}"
TEMPLATES = {
    "plain": TALK.replace("BODY", ""),
    "strips": TALK.replace("BODY", "| trim"),
    "thinks": "{% for m in messages %}{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{% if m.content %}{{ m.content }}{% endif %};{% endfor %}",
    "drops": "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    "parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}</s>{% endfor %}",
    "names": "{{ bos_token is defined }} {{ eos_token is defined }} {{ eos_token }} "
    "{{ pad_token is defined }} {{ unk_token }} {{ image_token }} {{ tool }} {{ bos_token }} {{ x }} "
    "{{ messages[0].keys() | list }} content",
}
ASKED = {"role": "user", "content": "Hi"}
FINALS = {
    "text": {"role": "assistant", "content": "Sure, I"},
    "spaces": {"role": "assistant", "content": " Sure, I  "},
    "empty": {"role": "assistant", "content": ""},
    "user": {"role": "user", "content": "and so"},
    "parts": {
        "role": "assistant",
        "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
    },
    "reasoning": {"role": "assistant", "content": "", "reasoning_content": "Let me"},
    "thinking": {"role": "assistant", "thinking": "Let me", "tool_calls": None, "content": "x"},
    "none": {"role": "assistant", "tool_calls": [{"name": "f"}]},
    "extra": {"role": "assistant", "content": "x", "name": "n", "weight": 0, "nothing": None},
}


def chats() -> dict[str, Any]:
    """Conversations with continue_final_message, and the variables that templates receive."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, "<unk>"))
    named = {
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_special_tokens": {"image_token": "<i>", "tool": "<t>"},
    }
    cases = []
    for name, template in TEMPLATES.items():
        reference = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=template, **named
        )
        for final, message in FINALS.items():
            for options in (
                *(
                    {"continue_final_message": field}
                    for field in (True, "content", "reasoning_content", "other")
                ),
                {"continue_final_message": True, "add_generation_prompt": True},
                {"x": "y"},
            ):
                case = {"template": name, "final": final, "options": options}
                try:
                    case["text"] = reference.apply_chat_template([ASKED, message], tokenize=False, **options)
                except Exception as error:
                    case["error"] = f"{type(error).__name__}: {error}"[:200]
                cases.append(case)
    return {"templates": TEMPLATES, "named": named, "asked": ASKED, "finals": FINALS, "cases": cases}


def main() -> None:
    made, answers = base(), {}
    size = len(made["model"]["vocab"])
    for name, case in cases(size).items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), made, case)
            case["expected"] = result(Path(folder))
            answers[name] = case
    document = {
        "transformers": transformers.__version__,
        "base": made,
        "strings": STRINGS,
        "cases": answers,
        "clean_up": clean_up(),
        "chats": chats(),
        "config_keys": config_keys(),
        "template_keywords": template_keywords(),
        "gguf_keys": gguf_keys(),
    }
    for name, content in {"folders": document, "classes": classes(made)}.items():
        path = GOLDEN / f"text_{name}.json"
        text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
        path.write_text(text + "\n", encoding="ascii")
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
