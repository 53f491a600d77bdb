"""The tokenizer and the chat template that an adapter's folder may hold beside the adapter."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from einsum_transformer.errors import InputError
from einsum_transformer.models.model import Model
from einsum_transformer.notes import note
from einsum_transformer.text.chat_template import template_variables
from einsum_transformer.text.folder import templates_in
from einsum_transformer.text.tokenizer import Tokenizer


def with_own_text(model: Model, folder: str | Path) -> Model:
    """The model with the tokenizer and chat template of an adapter's folder: those it was trained with.

    Where the base has others, one note says what was taken. A tokenizer of more tokens than the model has is
    not used.
    """
    folder, base = Path(folder), model.tokenizer
    own, templates = Tokenizer.in_folder(folder), _own_templates(folder)
    if own is None:
        return _with_templates(model, folder, templates)
    if own.vocab_size > model.config.vocab_size:
        note(
            f"{folder}: its tokenizer has {own.vocab_size:,} tokens, the model {model.config.vocab_size:,}: "
            "it is not used"
        )
        return model
    own = replace(own, chat_templates=templates)
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


def _with_templates(model: Model, folder: Path, own: Mapping[str, str]) -> Model:
    base = model.tokenizer
    if base is None or not own:
        return model
    templates = {**base.chat_templates, **own}
    if base.chat_templates and templates != base.chat_templates:
        note(f"{folder}: its chat template is used, which is not the base model's")
    return replace(model, tokenizer=replace(base, chat_templates=templates))


def _own_templates(folder: Path) -> dict[str, str]:
    """The chat templates of the folder. Errors: InputError names the file of one that is wrong."""
    found = templates_in(folder)
    for template, path in found.values():
        try:
            template_variables(template)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return {name: template for name, (template, _) in found.items()}
