"""The code blocks of the documentation run, its links lead to files, and its reference is complete."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from typer.main import get_command

import einsum_transformer as et
from einsum_transformer.cli.app import _application
from einsum_transformer.models.run_config import RunConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    page
    for page in (*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md")
    if "_build" not in page.parts and page.name != "_commands.md"
]
DERIVATIONS = [page for page in PAGES if page.parent.name == "derivations" and page.stem != "index"]

ELSEWHERE = ("pip install ", "python tools/dump_reference.py ", "python benchmarks/")
"""How the lines of bash begin that do not run here: they install packages, or need torch and transformers."""

SWIGLU = """
import numpy as np
from types import SimpleNamespace
from einsum_transformer.engine import einsum, einsums
from einsum_transformer.numerics.activations import silu
x, self = np.ones((1, 2, 3)), SimpleNamespace(gate_proj=np.ones((4, 3)), up_proj=np.ones((4, 3)))
self.down_proj = np.ones((3, 4))
"""
GIVEN = {
    "README.md": SWIGLU,
    "docs/index.md": SWIGLU,
}
"""What the first block of a page needs: the excerpt of a file has no imports."""


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^ *(`{3,})([^\n`]*)\n(.*?)^ *\1 *$", text, flags=re.DOTALL | re.MULTILINE)
    return [Block(each[2].strip(), each[3], text[: each.start(3)].count("\n")) for each in found]


def run_python(code: str, line: int, page: str, names: dict[str, Any]) -> None:
    exec(compile("\n" * line + code, page, "exec"), names)


def run_bash(code: str) -> None:
    lines = [line for line in code.splitlines() if not line.startswith(ELSEWHERE)]
    # A line that fails ends the block, and -x shows which one it was.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", "\n".join(lines)],
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in DERIVATIONS and blocks(page)], ids=lambda page: page.stem
)
def test_blocks_run(page: Path) -> None:
    name = str(page.relative_to(ROOT))
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(GIVEN.get(name, ""), names)
    # Not in pytest's folder, which remains: some pages write models of half a gigabyte.
    with TemporaryDirectory() as folder, chdir(folder):
        for language, text, line in blocks(page):
            if language == "python":
                run_python(text, line, name, names)
            elif language == "bash":
                run_bash(text)
            elif language == "json":
                json.loads(text)
            else:  # output, or a directive of Sphinx
                assert re.fullmatch(r"text|\{[\w-]+\}.*", language), f"{name}:{line}: {language!r}"


@pytest.mark.parametrize("page", DERIVATIONS, ids=lambda page: page.stem)
def test_derivations_hold(page: Path) -> None:
    found = [block.text for block in blocks(page) if block.language == "python"]
    assert found
    for block in found:
        assert "assert" in block
        subprocess.run([sys.executable, "-W", "error", "-c", block], check=True, timeout=60)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "reference" / "python.md").read_text()
    names = re.findall(r"^\.\. auto(?:function|class|exception):: (\w+)$", text, flags=re.MULTILINE)
    assert sorted(names) == sorted(et.__all__)
    named = re.findall(
        r"\{py:\w+\}`[^`]*einsum_transformer\.(\w+)", "".join(page.read_text() for page in PAGES)
    )
    assert set(named) <= set(names)


def test_every_command_is_beside_its_call() -> None:
    text = (DOCS / "reference" / "commands-and-calls.md").read_text()
    rows = re.findall(r"^\| `etx (\w+).*?\| `.*?\bet\.(\w+)", text, flags=re.MULTILINE)
    assert {command for command, _ in rows} == set(get_command(_application()).commands)  # type: ignore[attr-defined]
    assert {call for _, call in rows} <= set(et.__all__)


def test_every_key_of_a_config_is_in_the_reference() -> None:
    text = (DOCS / "reference" / "configs.md").read_text()
    packaged, keys = text.split("## Keys")
    assert set(re.findall(r"^\| `(\w+)` \|", packaged, flags=re.MULTILINE)) == set(et.available_configs())
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", keys, flags=re.MULTILINE))
    fields = [field for field in dataclasses.fields(RunConfig) if field.name != "source"]
    assert list(rows) == [field.name for field in fields]
    for field in fields:
        required = field.default is dataclasses.MISSING
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        assert rows[field.name] == ("required" if required else f"`{json.dumps(default)}`"), field.name
