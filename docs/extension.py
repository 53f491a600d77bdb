"""A Sphinx extension for this site: the text of `etx --help`, docstrings in plain text, links to files."""

import inspect
import re
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from einsum_transformer.cli.app import _application


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


def docstring_fields(_app: Any, _what: str, _name: str, thing: Any, _options: Any, lines: list[str]) -> None:
    """Turn the plain text of a docstring into reST.

    "name: text. other: text. Raises InputError for ..." becomes a list of parameters and errors, an indented
    paragraph a block of code.
    """
    try:
        names = "|".join(map(re.escape, inspect.signature(thing).parameters)) or "-"
    except (TypeError, ValueError):  # an attribute
        names = "-"
    name = f"(?:{names})"
    label = re.compile(
        rf"(?:^|(?<=[.;] ))((?:{name}(?:, | and | or ))*{name}: |Errors: |Raises (?=[A-Z]))", re.MULTILINE
    )
    paragraphs = []
    for paragraph in "\n".join(lines).split("\n\n"):
        if paragraph.startswith("    "):
            paragraphs.append(f".. code-block:: python\n\n{paragraph}")
            continue
        paragraph = re.sub(r"(`[^`]*`)|\*", lambda found: found[1] or r"\*", paragraph)
        if not label.search(paragraph):
            paragraphs.append(paragraph)
            continue
        before, *parts = label.split(" ".join(paragraph.split("\n")))
        fields = [field(names, text) for names, text in zip(parts[::2], parts[1::2])]
        paragraphs += [before, "\n".join(fields)]
    lines[:] = [*"\n\n".join(paragraphs).strip().splitlines(), ""]


def field(names: str, text: str) -> str:
    if names in ("Errors: ", "Raises "):
        kind, _, text = text.partition(" ")
        return f":raises {kind.rstrip(',:')}: {text}"
    return f":param {'/'.join(re.split(', | and | or ', names[:-2]))}: {text}"


def plain_defaults(*event: Any) -> tuple[str, str] | None:
    """Replace defaults that Sphinx cannot read, because they are not Python: <factory> and <class 'x.Y'>."""
    signature, returned = event[-2:]
    if signature is None:
        return None
    return re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", signature.replace("<factory>", "...")), returned


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
    app.connect("autodoc-process-docstring", docstring_fields)
    app.connect("autodoc-process-signature", plain_defaults)
    app.connect("builder-inited", command_pages)
