"""The code blocks of the documentation run, and the links between its files lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
DERIVATIONS = sorted((ROOT / "docs" / "concepts" / "derivations").glob("*.md"))


@pytest.mark.parametrize(
    "page", [page for page in DERIVATIONS if page.stem != "index"], ids=lambda page: page.stem
)
def test_derivations_hold(page: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        assert "assert" in block
        subprocess.run([sys.executable, "-W", "error", "-c", block], check=True, timeout=60)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
