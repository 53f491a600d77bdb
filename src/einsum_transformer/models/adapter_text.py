"""The tokenizer and the chat template that an adapter's folder may hold beside the adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from einsum_transformer.errors import FormatError
from einsum_transformer.models.model import Model
from einsum_transformer.notes import note
from einsum_transformer.text.tokenizer import Tokenizer

TEMPLATE = "chat_template.jinja"
_LARGEST_TEMPLATE = 1 << 24


def with_own_text(model: Model, folder: str | Path) -> Model:
    """The model with the tokenizer and chat template of an adapter's folder: those it was trained with.

    Where the base has others, one note says what was taken. A tokenizer of more tokens than the model has is
    not used.
    """
    folder, base = Path(folder), model.tokenizer
    own = Tokenizer.in_folder(folder)
    if own is None:
        return _with_template(model, folder)
    if own.vocab_size > model.config.vocab_size:
        note(
            f"{folder}: its tokenizer has {own.vocab_size:,} tokens, the model {model.config.vocab_size:,}: "
            "it is not used"
        )
        return model
    if base is not None:
        same = own.backend.get_vocab() == base.backend.get_vocab()
        if same and not own.chat_templates:
            own = replace(own, chat_templates=base.chat_templates)
        differing = ["vocabulary"] * (not same) + ["chat template"] * (
            own.chat_templates != base.chat_templates
        )
        if differing:
            note(f"{folder}: its tokenizer is used, whose {' and '.join(differing)} is not the base model's")
    return replace(model, tokenizer=own)


def _with_template(model: Model, folder: Path) -> Model:
    path, base = folder / TEMPLATE, model.tokenizer
    if base is None or not path.is_file():
        return model
    if path.stat().st_size > _LARGEST_TEMPLATE:
        raise FormatError(f"{path}: larger than {_LARGEST_TEMPLATE >> 20} MiB, no template is")
    try:
        template = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{path}: is not UTF-8 text") from None
    templates = {**base.chat_templates, "default": template}
    if base.chat_templates and templates != base.chat_templates:
        note(f"{folder}: its chat template is used, which is not the base model's")
    return replace(model, tokenizer=replace(base, chat_templates=templates))
