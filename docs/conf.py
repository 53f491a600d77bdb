"""Sphinx: `sphinx-build -W --keep-going -b html docs docs/_build/html`."""

import inspect
import re
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

import einsum_transformer
from einsum_transformer.cli.app import _application

project = "Einsum Transformer"
copyright = "the Einsum Transformer authors"
release = version = einsum_transformer.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "reference/_commands.md"]
default_role = "code"

myst_enable_extensions = ["deflist", "fieldlist"]
myst_heading_anchors = 4

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_custom_sections = [("Errors", "Raises")]

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"


def command_pages(*_: object) -> None:
    """Write reference/_commands.md: the text of `etx COMMAND --help` for every command."""
    commands = get_command(_application()).commands  # type: ignore[attr-defined]
    text = "".join(command_page(f"etx {name}", command) for name, command in commands.items())
    target = Path(__file__).parent / "reference" / "_commands.md"
    if not target.exists() or target.read_text() != text:  # a new time stamp would rebuild the page
        target.write_text(text)


def command_page(name: str, command: Any) -> str:
    context = typer.Context(command, info_name=name)
    lines = [f"## {name}", f"```text\n{' '.join(command.get_usage(context).split())}\n```"]
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        # Click leaves the lines of a paragraph that begins with \b as they are: these are the examples.
        lines.append(f"```text\n{paragraph[2:]}\n```" if paragraph.startswith("\b") else escaped(paragraph))
    for parameter in command.params:
        if record := parameter.get_help_record(context):
            lines.append(f"`{record[0]}`\n: {escaped(record[1])}")
    return "\n\n".join(lines) + "\n\n"


def escaped(text: str) -> str:
    return text.replace("*", r"\*").replace("[", r"\[").replace("<", r"\<")


def parameter_lists(_app: Any, _what: str, _name: str, thing: Any, _options: Any, lines: list[str]) -> None:
    """Make "name: text. other: text. Errors: InputError where ..." of a docstring a list of fields."""
    try:
        names = [name for name in inspect.signature(thing).parameters if name != "self"]
    except (TypeError, ValueError):
        return
    name = "|".join(map(re.escape, names)) or "-"
    label = re.compile(
        rf"(?:^|(?<=[.;] ))((?:(?:{name})(?:, | and | or ))*(?:{name}): |Errors: )", re.MULTILINE
    )
    paragraphs = []
    for paragraph in "\n".join(lines).split("\n\n"):
        before, *parts = label.split(
            " ".join(paragraph.split("\n")) if label.search(paragraph) else paragraph
        )
        fields = [field(names, text) for names, text in zip(parts[::2], parts[1::2])]
        paragraphs += [before, "\n".join(fields)] if fields else [before]
    lines[:] = [*"\n\n".join(paragraphs).strip().splitlines(), ""]


def field(names: str, text: str) -> str:
    if names == "Errors: ":
        kind, _, text = text.partition(" ")
        return f":raises {kind}: {text}"
    return f":param {'/'.join(re.split(', | and | or ', names[:-2]))}: {text}"


def links_out_of_the_site(_app: Any, name: str, source: list[str]) -> None:
    """Replace a link to a file of the repository that is not a page by its text and the name of the file."""
    link = re.compile(r"\[([^]]*)\]\(((?:\.\./)+)([^)]*)\)")

    def plain(found: re.Match[str]) -> str:
        text, up, path = found.groups()
        outside = up.count("../") > name.count("/")
        return (text if path.endswith(text) else f"{text} (`{path}`)") if outside else found[0]

    source[0] = link.sub(plain, source[0])


def setup(app: Any) -> None:
    app.connect("source-read", links_out_of_the_site)
    app.connect("autodoc-process-docstring", parameter_lists)
    app.connect("builder-inited", command_pages)
