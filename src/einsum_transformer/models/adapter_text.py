"""The tokenizer and the chat template that an adapter folder may contain."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from einsum_transformer.errors import InputError
from einsum_transformer.models.model import Model
from einsum_transformer.notes import note
from einsum_transformer.text.chat_template import template_variables
from einsum_transformer.text.folder import templates_in
from einsum_transformer.text.tokenizer import Tokenizer


def with_adapter_tokenizer(model: Model, folder: str | Path) -> Model:
    """The model with the tokenizer and chat template of an adapter folder: those used for its training.

    A note names what differs from the base model's. One with more tokens than the model is ignored.
    """
    folder, base = Path(folder), model.tokenizer
    own, templates = Tokenizer.in_folder(folder), _own_templates(folder)
    if own is None:
        return _with_templates(model, folder, templates)
    if own.vocab_size > model.config.vocab_size:
        note(
            f"{folder}: its tokenizer is ignored: it has {own.vocab_size:,} tokens, the model "
            f"{model.config.vocab_size:,}"
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
            note(
                f"{folder}: using its tokenizer, whose {' and '.join(differing)} differs from the base "
                "model's"
            )
    return replace(model, tokenizer=own)


def _with_templates(model: Model, folder: Path, own: Mapping[str, str]) -> Model:
    base = model.tokenizer
    if base is None or not own:
        return model
    templates = {**base.chat_templates, **own}
    if base.chat_templates and templates != base.chat_templates:
        note(f"{folder}: using its chat template, which differs from the base model's")
    return replace(model, tokenizer=replace(base, chat_templates=templates))


def _own_templates(folder: Path) -> dict[str, str]:
    """The chat templates of the folder. Errors: InputError that names the file of an invalid one."""
    found = templates_in(folder)
    for template, path in found.values():
        try:
            template_variables(template)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return {name: template for name, (template, _) in found.items()}
