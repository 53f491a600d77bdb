"""Tokenizers: text to ids and back, from a Hugging Face folder or a GGUF file's metadata."""

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from einsum_transformer.errors import InputError
from einsum_transformer.text.chat_template import render_chat_spans
from einsum_transformer.text.gguf_vocab import check_charsmap, checked, read_gguf_vocab
from einsum_transformer.text.streaming import StreamDecoder, stream_decoder

if TYPE_CHECKING:
    import tokenizers

_MAX_BYTES = {"tokenizer.json": 1 << 29}  # larger than any published one by a factor of ten
_MAX_OTHER_BYTES = 1 << 24
_SMALLEST_VOCABULARY = 257
_EDGES = ("add_bos_token", "add_eos_token")
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
# Control tokens that end a turn or a document, whatever the checkpoint's end-of-sequence token is.
_TURN_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<EOT>",
    "[EOT]",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
)


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with the special ids and chat templates that a checkpoint gives beside it."""

    backend: "tokenizers.Tokenizer"
    source: str
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    edges: Mapping[str, bool]
    end_of_generation_ids: frozenset[int]
    chat_templates: Mapping[str, str]

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json and, if present, the files beside it; InputError names the file that is wrong.

        Those are tokenizer_config.json, special_tokens_map.json and chat_template.jinja.
        """
        backend = _read_backend(folder)
        config = _read_json(folder, "special_tokens_map.json")
        config |= {
            key: value
            for key, value in _read_json(folder, "tokenizer_config.json").items()
            if value is not None
        }
        names = [_token_text(config.get(key), f"{folder}: {key}") for key in _NAMED]
        _make_special(backend, [name for name in names if name is not None])
        bos, eos, pad, unk = (None if name is None else backend.token_to_id(name) for name in names)
        edges = {key: bool(config[key]) for key in _EDGES if key in config}
        _set_edges(backend, edges, bos, eos)
        ends = _end_ids(backend, eos, ())
        return cls(backend, str(folder), bos, eos, pad, unk, edges, ends, _templates(folder, config))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: Path) -> "Tokenizer":
        """Build the tokenizer that a GGUF file's `tokenizer.*` keys describe; `source` is the file's path."""
        vocab = read_gguf_vocab(metadata, str(source))
        edges = {"add_bos_token": vocab.add_bos, "add_eos_token": vocab.add_eos}
        _set_edges(vocab.backend, edges, vocab.bos_id, vocab.eos_id)
        prefix = "tokenizer.chat_template"
        templates = {
            key.removeprefix(prefix).removeprefix(".") or "default": value
            for key, value in metadata.items()
            if key == prefix or key.startswith(f"{prefix}.")
        }
        if not all(isinstance(template, str) for template in templates.values()):
            raise InputError(f"{source}: {prefix}: not a string")
        ids = (vocab.bos_id, vocab.eos_id, vocab.pad_id, vocab.unk_id)
        ends = _end_ids(vocab.backend, vocab.eos_id, vocab.turn_end_ids)
        return cls(vocab.backend, str(source), *ids, edges, ends, templates)

    @classmethod
    def train(cls, texts: Sequence[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of `vocab_size` tokens learnt from texts; its EOS is `<|endoftext|>`, id 0."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < _SMALLEST_VOCABULARY:
            raise InputError(
                f"a tokenizer of {vocab_size} tokens: the bytes and EOS alone are {_SMALLEST_VOCABULARY}"
            )
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, "trained on the data", None, 0, None, None, {}, frozenset({0}), {})

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def adds_bos(self) -> bool:
        """Whether `encode` begins a text with BOS."""
        return self.bos_id is not None and self.encode("")[:1] == [self.bos_id]

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's jinja2 chat template, if it has one."""
        return self.chat_templates.get("default")

    def token(self, token_id: int) -> str:
        """The token as the vocabulary spells it; raises InputError if there is none of that id."""
        token = self.backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:
            raise InputError(f"{self.source}: token id {token_id} is not in the vocabulary")
        return token

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; `add_special_tokens` puts BOS and EOS around it if the checkpoint asks for them."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: character {error.start} is half a surrogate pair, which is not valid Unicode"
            ) from None
        return checked(
            f"{self.source}: cannot encode the text",
            lambda: self.backend.encode(text, add_special_tokens=add_special_tokens).ids,
        )

    def encode_once(self, text: str, end: bool = False) -> list[int]:
        """Ids of a prompt or a document: those of `encode`, without the BOS and EOS that the text itself has.

        A text that was rendered before, `<s>...</s>`, would else begin with two BOS. end: the text is
        complete, so EOS follows it if the tokenizer has one.
        """
        ids, marks = self.encode(text), self.encode("")
        if marks[:1] == [self.bos_id] == ids[1:2]:
            del ids[0]
        if end and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without a token (a padded embedding has some) give no text."""
        return checked(
            f"{self.source}: cannot decode the ids",
            lambda: self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens),
        )

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for ids that arrive one by one, as in generation."""
        return stream_decoder(
            self.backend, _special_ids(self.backend) if skip_special_tokens else frozenset()
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Ids of a conversation; the template writes every special token itself, so none is added."""
        text, _ = self.chat_text(messages, add_generation_prompt, tools, **variables)
        return self.encode(text, add_special_tokens=False)

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the (first, past the last) character of each generation block."""
        template = self.chat_template
        if tools is not None:
            template = self.chat_templates.get("tool_use", template)
        if template is None:
            raise InputError(f"{self.source}: has no chat template; give a plain prompt instead")
        named: dict[str, Any] = {"bos_token": self._text(self.bos_id), "eos_token": self._text(self.eos_id)}
        named |= variables | {"tools": tools, "add_generation_prompt": add_generation_prompt}
        return render_chat_spans(template, messages, **named)

    def save(self, folder: Path) -> None:
        """Write the files from which `from_folder` and transformers' AutoTokenizer make this tokenizer."""
        ids = (self.bos_id, self.eos_id, self.pad_id, self.unk_id)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.edges,
            "clean_up_tokenization_spaces": False,
            **{name: self.token(i) for name, i in zip(_NAMED, ids) if i is not None},
        }
        named = {name: text for name, text in self.chat_templates.items() if name != "default"}
        if named:
            every = named if self.chat_template is None else {"default": self.chat_template, **named}
            config["chat_template"] = [{"name": name, "template": text} for name, text in every.items()]
        files = {
            "tokenizer.json": self.backend.to_str(),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }
        if self.chat_template is not None and not named:
            files["chat_template.jinja"] = self.chat_template
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="")

    def _text(self, token_id: int | None) -> str:
        return "" if token_id is None else self.token(token_id)


def _read_backend(folder: Path) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as Backend

    text = _read(folder, "tokenizer.json")
    if text is None:
        others = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).exists()]
        found = f"; {', '.join(others)} is not enough, convert it with transformers" if others else ""
        raise InputError(f"{folder}: no tokenizer.json, which is needed to read and write text{found}")
    _check_normalizer(text, folder / "tokenizer.json")
    backend = checked(f"{folder / 'tokenizer.json'}: not a usable tokenizer", lambda: Backend.from_str(text))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _check_normalizer(text: str, path: Path) -> None:
    """Check the character maps of a tokenizer.json, which is read in Python only if it can have one."""
    if "precompiled_charsmap" not in text and not re.search(r"\\u00[4-7]", text):  # or has it in escapes
        return
    level = [checked(f"{path}: not a usable tokenizer", lambda: dict(json.loads(text)).get("normalizer"))]
    while level:
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict) and isinstance(charsmap := value.get("precompiled_charsmap"), str):
                where = f"{path}: normalizer.precompiled_charsmap"
                check_charsmap(checked(where, lambda encoded=charsmap: base64.b64decode(encoded)), where)
            if isinstance(value, dict | list):
                below += value.values() if isinstance(value, dict) else value
        level = below


def _special_ids(backend: "tokenizers.Tokenizer") -> frozenset[int]:
    return frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)


def _make_special(backend: "tokenizers.Tokenizer", names: Sequence[str]) -> None:
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([name for name in names if name not in added])


def _set_edges(
    backend: "tokenizers.Tokenizer", edges: Mapping[str, bool], bos: int | None, eos: int | None
) -> None:
    """Make `encode` put BOS and EOS around a text; without either key, tokenizer.json has said how."""
    from tokenizers.processors import TemplateProcessing

    if not edges:
        return
    before = ["bos"] * (bos is not None and edges.get("add_bos_token", False))
    after = ["eos"] * (eos is not None and edges.get("add_eos_token", False))
    ids = {"bos": bos, "eos": eos}
    tokens: Any = [
        {"id": name, "ids": [ids[name]], "tokens": [backend.id_to_token(ids[name] or 0)]}
        for name in (*before, *after)
    ]
    pair = [f"{item}:1" for item in (*before, "$B", *after)]
    backend.post_processor = TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", *after, *pair], special_tokens=tokens
    )


def _end_ids(backend: "tokenizers.Tokenizer", eos: int | None, more: Iterable[int]) -> frozenset[int]:
    special = _special_ids(backend)
    ends = {name: i for name in _TURN_ENDS if (i := backend.token_to_id(name)) in special}
    if "<|return|>" in ends and "<|call|>" in ends:
        ends.pop("<|end|>", None)  # in that format <|end|> separates a turn's channels
    return frozenset({*ends.values(), *more, *(() if eos is None else (eos,))})


def _read(folder: Path, name: str) -> str | None:
    """Text of a file in a checkpoint's folder, None if there is none."""
    path = folder / name
    if not path.is_file():
        return None
    size, limit = path.stat().st_size, _MAX_BYTES.get(name, _MAX_OTHER_BYTES)
    if size > limit:
        raise InputError(f"{path}: {size} bytes; at most {limit} are accepted")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    text = _read(folder, name)
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / name}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{folder / name}: expected a JSON object, got {type(value).__name__}")
    return value


def _token_text(value: Any, where: str) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise InputError(f'{where}: expected a string or {{"content": string}}')
    return text


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name: chat_template.jinja, else tokenizer_config.json's string or named ones."""
    text = _read(folder, "chat_template.jinja")
    value = config.get("chat_template") if text is None else text
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        named = {item.get("name"): item.get("template") for item in value}
        if all(isinstance(name, str) and isinstance(template, str) for name, template in named.items()):
            return named
    raise InputError(
        f"{folder / 'tokenizer_config.json'}: chat_template: expected a string or named templates"
    )
