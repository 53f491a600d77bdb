"""From a data file to the batches of a training: reading, tokenizing, validation data, rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from einsum_transformer.arguments import checked
from einsum_transformer.errors import InputError
from einsum_transformer.models.model import Model
from einsum_transformer.notes import note
from einsum_transformer.text.tokenizer import Tokenizer
from einsum_transformer.training.data import Example, RandomTokens, Rows, TextBatches, arrange, held_out
from einsum_transformer.training.files import Data, Record, read_data
from einsum_transformer.training.record_keys import has_form
from einsum_transformer.training.records import examples_of, texts_of
from einsum_transformer.training.state import checkpoints

Texts = str | Path | Sequence[str | Mapping[str, Any]]
"""A data file, or a list of texts and JSON records."""

_SHARE = 0.05
_LARGE = 1_000_000  # characters; encoding them takes about two seconds


@checked
@dataclass(frozen=True, slots=True)
class TextSettings:
    """The training data; the fields are arguments of `train`."""

    data: Texts | None = None
    valid: Texts | None = None
    valid_share: float | None = None
    mask_prompt: bool = False
    pad: bool = False
    long: Literal["split", "refuse"] = "split"

    def __post_init__(self) -> None:
        if self.data is None:
            for each in fields(self):
                if getattr(self, each.name) != each.default:
                    raise InputError(f"`{each.name}` needs `data`, the text to train on")
        if self.valid_share is not None and not 0 <= self.valid_share < 1:
            raise InputError(f"`valid_share` is {self.valid_share}: expected a number from 0 to below 1")

    def rows(self, examples: Sequence[Example], length: int) -> Rows:
        """Arrange examples in rows."""
        return arrange(examples, length, not self.pad, self.long == "split")


def batches_of(
    model: Model,
    text: TextSettings,
    resumed: str | None,
    size: int,
    length: int,
    seed: int,
    fixed: bool,
    accumulation: int,
) -> tuple[Model, RandomTokens | TextBatches, Rows | None]:
    """Return the model with a tokenizer, the batches and the validation rows; resumed: the folder of the
    training that is resumed."""
    if text.data is None:
        return model, RandomTokens(model.config.vocab_size, size, length, seed, fixed, accumulation), None
    data, name = _read(text.data, "train"), _name(text.data)
    if len(data.text) > _LARGE:
        # Noted in advance: the tokenizer encodes a text in one call, which blocks all threads.
        note(f"{name}: encoding {len(data.text) / 1e6:.1f} million characters, which takes a while")
    model = _with_tokenizer(model, data, resumed)
    assert model.tokenizer is not None
    examples = examples_of(data, model.tokenizer, text.mask_prompt)
    _note_long(examples, length, text)
    rows, validation = _divided(model, examples, text, size, length, seed)
    if len(rows) < size:
        note(
            f"{name}: yields {count_of(len(rows), 'row')} of {length} tokens, so the batch size is "
            f"{len(rows)} instead of {size}"
        )
        if len(rows) < accumulation <= size:
            parts = count_of(len(rows), "part")
            note(f"`grad_accumulation_steps` is {accumulation}: the batch is computed in {parts}")
            accumulation = len(rows)
    model.checked(rows.tokens)
    return model, TextBatches(rows, min(size, len(rows)), seed, accumulation, fixed), validation


def _read(texts: Texts, part: str) -> Data:
    if isinstance(texts, (str, Path)):
        return read_data(texts, has_form, part)
    if not texts:
        raise InputError("`data` is empty: expected at least one text")
    records = [{"text": text} if isinstance(text, str) else dict(text) for text in texts]
    return Data(Path("data"), "", [Record(record, f"data[{i}]") for i, record in enumerate(records)])


def _name(texts: Texts | None) -> str:
    return str(texts) if isinstance(texts, (str, Path)) else "data"


def count_of(number: int, name: str) -> str:
    """Return `1 row` or `2 rows`."""
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _note_long(examples: Sequence[Example], length: int, text: TextSettings) -> None:
    """Note examples that are split over several padded rows, so that an answer is apart from its prompt."""
    long = [len(example.tokens) for example in examples if not example.divisible]
    count = sum(size > length + 1 for size in long)
    if count and text.pad and text.long == "split":
        note(
            f"{_name(text.data)}: {count} of {len(examples)} examples are longer than a row of {length} "
            f"tokens and are split over several rows; the longest fits in `seq_len` {max(long) - 1}"
        )


def _divided(
    model: Model, examples: list[Example], text: TextSettings, size: int, length: int, seed: int
) -> tuple[Rows, Rows | None]:
    """Return the training rows and the validation rows, which come from `valid` or are held out.

    By default no data is held out if less than a batch would remain.
    """
    valid, data = text.valid, text.data
    if valid is None and text.valid_share is None and isinstance(data, (str, Path)):
        valid = data if (Path(data) / "valid.jsonl").is_file() else None
    if valid is not None:
        if text.valid_share:
            raise InputError(
                "`valid_share` is the share of `data` to hold out, but `valid` gives the validation data: "
                "choose one"
            )
        assert model.tokenizer is not None
        others = examples_of(_read(valid, "valid"), model.tokenizer, text.mask_prompt)
        if {example.divisible for example in others} != {example.divisible for example in examples}:
            note(
                f"{_name(valid)}: one of `valid` and `data` is text, the other answers: their losses are not "
                "comparable"
            )
        return text.rows(examples, length), text.rows(others, length)
    if text.valid_share == 0:
        return text.rows(examples, length), None
    try:
        train, others = held_out(examples, _SHARE if text.valid_share is None else text.valid_share, seed)
        rows = text.rows(train, length)
        found = text.rows(others, length) if others else None
    except InputError:
        if text.valid_share is not None:
            raise
        rows = found = None  # too short to hold out a part
    if rows is not None and (len(rows) >= size or text.valid_share is not None or found is None):
        return rows, found
    rows = text.rows(examples, length)
    note(f"{_name(text.data)}: too short for a batch and validation data, so no data is held out")
    return rows, None


def _with_tokenizer(model: Model, data: Data, resumed: str | None) -> Model:
    """Return the model with a tokenizer: its own, or one that is trained on the data."""
    if model.tokenizer is not None:
        return model
    saved = [folder for folder in checkpoints(resumed or "") if (folder / "tokenizer.json").exists()]
    config = replace(model.config, eos_token_id=(0,))
    if resumed and saved:
        return replace(model, tokenizer=Tokenizer.from_folder(saved[-1]), config=config)
    return replace(model, tokenizer=Tokenizer.train(texts_of(data), model.config.vocab_size), config=config)
