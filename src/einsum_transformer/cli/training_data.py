"""What `train` learns from: random tokens, or the rows of data files, some of them held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from einsum_transformer.cli import options
from einsum_transformer.errors import InputError
from einsum_transformer.notes import note

if TYPE_CHECKING:
    from einsum_transformer.models.model import Model
    from einsum_transformer.training.data import Example, RandomTokens, Rows, TextBatches
    from einsum_transformer.training.files import Data

_SHARE = 0.05
_LARGE = 1_000_000  # characters, which take about two seconds


@dataclass(frozen=True, slots=True)
class TextFlags:
    """What is learnt."""

    data: str | None = options.flag(
        metavar="FILE", help="Text, or JSON records of text, prompts or messages."
    )
    valid: str | None = options.flag(metavar="FILE", help="Data to validate with.")
    valid_share: float | None = options.flag(
        metavar="X", help="Without --valid, the part of --data that is held out; default 0.05."
    )
    mask_prompt: bool = options.flag("--mask-prompt", default=False, help="Learn the answers only.")
    pad: bool = options.flag("--pad", default=False, help="A row for each example, not packed ones.")
    long: str = options.flag(
        default="split", metavar="split|refuse", help="What becomes of examples longer than a row."
    )

    @property
    def split_long(self) -> bool:
        return self.long == "split"

    def rows(self, examples: Sequence[Example], length: int) -> Rows:
        """The rows of these examples."""
        from einsum_transformer.training.data import arrange

        return arrange(examples, length, not self.pad, self.split_long)


def batches_of(
    model: Model,
    text: TextFlags,
    resumed: str | None,
    size: int,
    length: int,
    seed: int,
    fixed: bool,
    accumulation: int,
) -> tuple[Model, RandomTokens | TextBatches, Rows | None]:
    """The model with a tokenizer, the batches, and the rows to validate with; resumed: the folder of a
    training that goes on."""
    from einsum_transformer.training.data import RandomTokens, TextBatches
    from einsum_transformer.training.files import read_data
    from einsum_transformer.training.record_keys import has_form
    from einsum_transformer.training.records import examples_of

    if text.data is None:
        _check_no_data(text)
        return model, RandomTokens(model.config.vocab_size, size, length, seed, fixed, accumulation), None
    if text.valid_share is not None and not 0 <= text.valid_share < 1:
        raise InputError(f"--valid-share {text.valid_share}: a number from 0 to less than 1 is expected")
    data = read_data(text.data, has_form)
    if len(data.text) > _LARGE:
        # Said before and not meanwhile: the tokenizer encodes a text in one call, which holds all threads.
        note(f"{text.data}: encoding {len(data.text) / 1e6:.1f} million characters, which takes a while")
    model = _with_tokenizer(model, data, resumed)
    assert model.tokenizer is not None
    examples = examples_of(data, model.tokenizer, text.mask_prompt)
    _note_long(examples, length, text)
    rows, validation = _divided(model, examples, text, size, length, seed)
    if len(rows) < size:
        note(
            f"{text.data}: gives {count_of(len(rows), 'row')} of {length} tokens, so a batch has "
            f"{len(rows)}, not {size}"
        )
        if len(rows) < accumulation <= size:
            note(f"--grad-accumulation-steps {accumulation}: it is computed in {count_of(len(rows), 'part')}")
            accumulation = len(rows)
    model.checked(rows.tokens)
    return model, TextBatches(rows, min(size, len(rows)), seed, accumulation, fixed), validation


def count_of(number: int, name: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def _check_no_data(text: TextFlags) -> None:
    for flag in fields(text):
        if getattr(text, flag.name) != flag.default:
            raise InputError(f"--{flag.name.replace('_', '-')} needs --data, a file of text")


def _note_long(examples: Sequence[Example], length: int, text: TextFlags) -> None:
    """Packed rows are cut anywhere; else it should be known that an answer stands apart from its prompt."""
    long = [len(example.tokens) for example in examples if not example.divisible]
    count = sum(size > length + 1 for size in long)
    if count and text.pad and text.split_long:
        note(
            f"{text.data}: {count} of {len(examples)} examples are longer than a row of {length} tokens and "
            f"go over several; --seq-len {max(long) - 1} holds the longest"
        )


def _divided(
    model: Model, examples: list[Example], text: TextFlags, size: int, length: int, seed: int
) -> tuple[Rows, Rows | None]:
    """Rows to train on, and rows to validate with: those of --valid, or what is held out.

    By default nothing is held out where that would leave less than a batch.
    """
    from einsum_transformer.training.data import held_out
    from einsum_transformer.training.records import read_examples

    valid = text.valid
    if valid is None and text.valid_share is None and (Path(str(text.data)) / "valid.jsonl").is_file():
        valid = text.data
    if valid is not None:
        if text.valid_share:
            raise InputError("--valid-share is the part of --data that is held out; with --valid nothing is")
        assert model.tokenizer is not None
        others = read_examples(valid, model.tokenizer, text.mask_prompt, "valid")
        if {example.divisible for example in others} != {example.divisible for example in examples}:
            note(f"{valid}: of another kind than --data (texts, or answers), so the losses do not compare")
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
        rows = found = None  # too short for a part of it
    if rows is not None and (len(rows) >= size or text.valid_share is not None or found is None):
        return rows, found
    rows = text.rows(examples, length)
    note(f"{text.data}: too little for a batch and more, so nothing is held out to validate with")
    return rows, None


def _with_tokenizer(model: Model, data: Data, resumed: str | None) -> Model:
    """The model as it is if it has a tokenizer, else with one that is trained on the data."""
    from einsum_transformer.text.tokenizer import Tokenizer
    from einsum_transformer.training.records import texts_of
    from einsum_transformer.training.state import checkpoints

    if model.tokenizer is not None:
        return model
    saved = [folder for folder in checkpoints(resumed or "") if (folder / "tokenizer.json").exists()]
    config = replace(model.config, eos_token_id=(0,))
    if resumed and saved:
        return replace(model, tokenizer=Tokenizer.from_folder(saved[-1]), config=config)
    return replace(model, tokenizer=Tokenizer.train(texts_of(data), model.config.vocab_size), config=config)
