"""Tokenizers: text to token ids and back, read from a Hugging Face folder or from GGUF metadata."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, overload

from tokenizers import Encoding, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError
from einsum_transformer.notes import note
from einsum_transformer.text.added_tokens import NAMES
from einsum_transformer.text.chat_options import check_options, choose_template, note_unused
from einsum_transformer.text.chat_template import render_chat_spans
from einsum_transformer.text.class_build import builds_another
from einsum_transformer.text.classes import BACKEND, COMPLETE, class_name
from einsum_transformer.text.folder import CLEAN_UP_BPE, has_tokenizer, read_folder
from einsum_transformer.text.gguf_tokens import gguf_tokens
from einsum_transformer.text.gguf_vocab import has_gguf_tokenizer, read_gguf_vocab
from einsum_transformer.text.native import checked as run_native
from einsum_transformer.text.streaming import StreamDecoder, clean_up, stream_decoder

_SMALLEST_VOCABULARY = 257
_END_CHARS = 4096  # characters at each end of a long text that are encoded to find its first and last tokens
# Control tokens that end a turn or a document, in addition to the checkpoint's EOS token.
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


@checked
@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` with the special token ids and the chat templates of a checkpoint."""

    backend: Backend
    source: str
    named: Mapping[str, str]
    """Special tokens by name (`bos_token`, `image_token`, ...); chat templates get them as variables."""
    end_of_generation_ids: frozenset[int]
    chat_templates: Mapping[str, str]
    edges: Mapping[str, bool] = field(default_factory=dict[str, bool])
    """`add_bos_token` and `add_eos_token` of a GGUF file; {} if tokenizer.json configures them."""
    clean_up: bool = False
    """Whether decoding removes the spaces before punctuation (`clean_up_tokenization_spaces`)."""
    refusal: str | None = None
    """Why text cannot be encoded, None if it can; ids can always be decoded."""

    @classmethod
    @checked
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read tokenizer.json, or vocab.json and merges.txt, and the optional files of a tokenizer's folder.

        The optional files are tokenizer_config.json, special_tokens_map.json, added_tokens.json,
        chat_template.jinja and additional_chat_templates/NAME.jinja, read as by transformers' AutoTokenizer.
        Raises InputError that names the invalid file.
        """
        read = read_folder(Path(folder))
        ends = _end_ids(read.backend, read.named)
        return cls(read.backend, str(folder), read.named, ends, read.chat_templates, clean_up=read.clean_up)

    @classmethod
    def in_folder(cls, folder: Path) -> "Tokenizer | None":
        """Like `from_folder`, but None if there is no tokenizer; a note names one that needs conversion."""
        return cls.from_folder(folder) if has_tokenizer(folder) else None

    @classmethod
    def in_gguf(cls, metadata: Mapping[str, Any], source: Path) -> "Tokenizer | None":
        """Like `from_gguf`, but None if there is no tokenizer; a note names one that is not supported."""
        return cls.from_gguf(metadata, source) if has_gguf_tokenizer(metadata, str(source)) else None

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: Path) -> "Tokenizer":
        """Build the tokenizer from a GGUF file's `tokenizer.*` metadata; `source` is the file's path."""
        vocab = read_gguf_vocab(metadata, str(source))
        _set_edges(vocab.backend, vocab.edges, vocab.named)
        prefix = "tokenizer.chat_template"
        templates = {
            key.removeprefix(prefix).removeprefix(".") or "default": value
            for key, value in metadata.items()
            if key == prefix or key.startswith(f"{prefix}.")
        }
        if not all(isinstance(template, str) for template in templates.values()):
            raise InputError(f"{source}: {prefix}: not a string")
        ends = _end_ids(vocab.backend, vocab.named, vocab.turn_end_ids)
        return cls(
            vocab.backend, str(source), vocab.named, ends, templates, vocab.edges, refusal=vocab.refusal
        )

    @classmethod
    @checked
    def train(cls, texts: Sequence[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE of `vocab_size` tokens on texts; its EOS is `<|endoftext|>`, id 0."""
        if vocab_size < _SMALLEST_VOCABULARY:
            raise InputError(
                f"vocab_size is {vocab_size}: expected at least {_SMALLEST_VOCABULARY}, 256 bytes and EOS"
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
        run_native("cannot train a tokenizer", lambda: backend.train_from_iterator(texts, trainer))
        return cls(backend, "trained on the data", {"eos_token": "<|endoftext|>"}, frozenset({0}), {})

    @checked
    def to_gguf(self, vocab_size: int) -> dict[str, Any]:
        """Return the `tokenizer.*` metadata from which `from_gguf` and llama.cpp build this tokenizer.

        vocab_size: rows of the model's embedding. Raises InputError for a tokenizer that GGUF files cannot
        describe; a note names settings that llama.cpp does not have."""
        if self.refusal is not None:
            raise InputError(f"{self.source}: the tokenizer cannot be written: {self.refusal}")
        before, _, after = self._marked("a")
        edges = {"add_bos_token": self.bos_id in before, "add_eos_token": self.eos_id in after}
        found = gguf_tokens(self.backend, self.named, edges, vocab_size, self.source)
        prefix = "tokenizer.chat_template"
        others = [name for name in self.chat_templates if name != "default"]
        templates = {f"{prefix}.{name}": self.chat_templates[name] for name in others}
        if self.chat_template is not None:
            templates[prefix] = self.chat_template
        return found | templates | ({f"{prefix}s": others} if others else {})

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added tokens; a model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        """The id of `bos_token`, or None."""
        return _id_of(self.backend, self.named.get("bos_token"))

    @property
    def eos_id(self) -> int | None:
        """The id of `eos_token`, or None."""
        return _id_of(self.backend, self.named.get("eos_token"))

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's default Jinja chat template, or None."""
        return self.chat_templates.get("default")

    @checked
    def token(self, token_id: int) -> str:
        """Return the token of an id as spelled in the vocabulary; raises InputError for an unknown id."""
        token = self.backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:
            raise InputError(f"{self.source}: token id {token_id} is not in the vocabulary")
        return token

    @checked
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Encode `text`; `add_special_tokens` adds BOS and EOS if the checkpoint configures them."""
        return self._encoded(text, add_special_tokens).ids

    def _encoded(self, text: str, add_special_tokens: bool) -> Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: character {error.start} is half a surrogate pair, which is not valid Unicode"
            ) from None
        if self.refusal is not None and text:
            raise InputError(f"{self.source}: {self.refusal}")
        return run_native(
            f"{self.source}: cannot encode the text",
            lambda: self.backend.encode(text, add_special_tokens=add_special_tokens),
        )

    @checked
    def encode_once(self, text: str, end: bool = False) -> list[int]:
        """Encode a prompt or a document like `encode`, without adding a BOS or EOS that the text already has.

        A text that is already rendered, `<s>...</s>`, would otherwise begin with two BOS tokens. end: append
        EOS if the tokenizer has one and the text does not end with it. White space before a BOS or after an
        EOS in the text, such as the last newline of ChatML, is encoded but ignored in these checks.
        """
        before, plain, after = self._marked(text)
        core = plain if text == text.strip() else self._ends_of(text.strip())
        own = 0  # number of leading tokens that the text already has in place of BOS
        if before and core[: len(before)] == before:
            before, own = [], len(before)
        elif self.bos_id in before and core[:1] == [self.bos_id]:
            before, own = before[: before.index(self.bos_id)], 1
        if after and core[own:][-len(after) :] == after:
            after = []
        ids = [*before, *plain, *after]
        opening = len(before) + own if self.bos_id == self.eos_id else 0
        closed = [*before, *core, *after][opening:][-1:] == [self.eos_id]
        return ids if not end or self.eos_id is None or closed else [*ids, self.eos_id]

    def _marked(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Return (ids that the post-processor adds before the text, ids of the text, ids added after it)."""
        found = self._encoded(text, True)
        added = found.special_tokens_mask  # 0 for all tokens of the text itself, also for special ones
        first = next((i for i, mark in enumerate(added) if not mark), len(added))
        last = len(added) - next((i for i, mark in enumerate(reversed(added)) if not mark), 0)
        return found.ids[:first], found.ids[first:last], found.ids[last:]

    def _ends_of(self, text: str) -> list[int]:
        """Ids that begin and end like those of the text; of a long text, only both ends are encoded."""
        parts = (text,) if len(text) <= 2 * _END_CHARS else (text[:_END_CHARS], text[-_END_CHARS:])
        return [i for part in parts for i in self.encode(part, add_special_tokens=False)]

    @checked
    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Decode `ids`; ids without a token, as in a padded embedding, give no text."""
        text = run_native(
            f"{self.source}: cannot decode the ids",
            lambda: self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens),
        )
        return clean_up(text) if self.clean_up else text

    @checked
    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """Return a decoder for ids that arrive one by one, as in generation."""
        # `tokenizers` compares the token string of an id, which a normalizer may have changed.
        added = self.backend.get_added_tokens_decoder().values() if skip_special_tokens else ()
        skipped = frozenset(token.content for token in added if token.special)
        return stream_decoder(self.backend, skipped, self.clean_up, self.source)

    @checked
    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> str:
        """Render a conversation to text like transformers' `apply_chat_template(tokenize=False)`.

        add_generation_prompt: append the start of an assistant message; by default, unless the final message
        is continued. tools, documents: JSON objects for the template. chat_template: another template, or the
        name of one of the checkpoint's. continue_final_message: leave the last message open for the model to
        continue; a string names its field. variables: further template variables, such as enable_thinking.
        Raises InputError, also for the keywords of `apply_chat_template` that concern batches and tensors.
        """
        options = {
            "documents": documents,
            "chat_template": chat_template,
            "continue_final_message": continue_final_message,
        }
        template = choose_template(self.chat_templates, chat_template, tools is not None, self.source)
        note_unused(template, check_options(variables), tools=tools, documents=documents)
        return self.chat_text(messages, add_generation_prompt, tools, **options, **variables)[0]

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        chat_template: str | None = None,
        **options: Any,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of `render_chat`, without its note, and the (start, end) character offsets of each
        `{% generation %}` block."""
        if add_generation_prompt is None:
            add_generation_prompt = not options.get("continue_final_message", False)
        template = choose_template(self.chat_templates, chat_template, tools is not None, self.source)
        variables: dict[str, Any] = {**self.named, **check_options(options)}
        return render_chat_spans(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **variables,
        )

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        add_generation_prompt: bool | None = ...,
        *,
        tokenize: Literal[True] = ...,
        **options: Any,
    ) -> list[int]: ...
    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        add_generation_prompt: bool | None = ...,
        *,
        tokenize: Literal[False],
        **options: Any,
    ) -> str: ...
    @checked
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        *,
        tokenize: bool = True,
        **options: Any,
    ) -> list[int] | str:
        """Token ids of a conversation, or its text with `tokenize=False`, as transformers' method of this
        name.

        Arguments and errors are those of `render_chat`. The generation prompt is added by default, unless the
        last message is continued. The template writes every special token, so none is added.
        """
        text = self.render_chat(messages, add_generation_prompt, tools, **options)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[int]:
        """Deprecated since 0.2: use `apply_chat_template`."""
        warnings.warn("encode_chat is deprecated, use apply_chat_template", DeprecationWarning, stacklevel=2)
        return cast("list[int]", self.apply_chat_template(messages, tools, add_generation_prompt, **options))

    @checked
    def save(self, folder: str | Path, model_type: str | None = None) -> None:
        """Write the files from which `from_folder` and transformers' AutoTokenizer load this tokenizer.

        model_type: `model_type` of the folder's config.json. For some types (qwen2) AutoTokenizer builds the
        tokenizer from the vocabulary alone; a note warns if the result differs from this tokenizer. Raises
        InputError if the tokenizer cannot be saved.
        """
        folder = Path(folder)
        if self.refusal is not None:
            raise InputError(f"{self.source}: the tokenizer cannot be saved: {self.refusal}")
        stated = {"tokenizer_class": "PreTrainedTokenizerFast"}
        kind = class_name(stated, {"model_type": model_type}, byte_level=False)
        config: dict[str, Any] = {
            **stated,
            **({COMPLETE: True} if kind != BACKEND else {}),
            **self.edges,
            "clean_up_tokenization_spaces": self.clean_up,
            **({CLEAN_UP_BPE: True} if self.clean_up else {}),
            **({"split_special_tokens": True} if self.backend.encode_special_tokens else {}),
            **{name: text for name, text in self.named.items() if name in NAMES},
        }
        if own := {name: text for name, text in self.named.items() if name not in NAMES}:
            config["extra_special_tokens"] = own
        named = {name: text for name, text in self.chat_templates.items() if name != "default"}
        if named:
            every = named if self.chat_template is None else {"default": self.chat_template, **named}
            config["chat_template"] = [{"name": name, "template": text} for name, text in every.items()]
        files = {
            "tokenizer.json": run_native(f"{self.source}: cannot save the tokenizer", self.backend.to_str),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }
        if kind != BACKEND and builds_another(kind, files["tokenizer.json"], self.source):
            note(
                f"{folder}: transformers builds a {kind} from the vocabulary of every {model_type} model, "
                f"which splits text into other tokens than this tokenizer; give transformers token ids"
            )
        if self.chat_template is not None and not named:
            files["chat_template.jinja"] = self.chat_template
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="")


def _id_of(backend: Backend, token: str | None) -> int | None:
    return None if token is None else backend.token_to_id(token)


def _set_edges(backend: Backend, edges: Mapping[str, bool], named: Mapping[str, str]) -> None:
    """Set the post-processor that adds BOS and EOS."""
    before, after = (
        [name] * (edges[f"add_{name}_token"] and f"{name}_token" in named) for name in ("bos", "eos")
    )
    texts = {name: named[f"{name}_token"] for name in (*before, *after)}
    tokens: Any = [
        {"id": name, "ids": [backend.token_to_id(text)], "tokens": [text]} for name, text in texts.items()
    ]
    pair = [f"{item}:1" for item in (*before, "$B", *after)]
    backend.post_processor = TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", *after, *pair], special_tokens=tokens
    )


def _end_ids(backend: Backend, named: Mapping[str, str], more: Iterable[int] = ()) -> frozenset[int]:
    eos = _id_of(backend, named.get("eos_token"))
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    ends = {name: i for name in _TURN_ENDS if (i := backend.token_to_id(name)) in special}
    if "<|return|>" in ends and "<|call|>" in ends:
        ends.pop("<|end|>", None)  # in the format with these tokens, it separates the channels of a turn
    return frozenset({*ends.values(), *more, *(() if eos is None else (eos,))})
