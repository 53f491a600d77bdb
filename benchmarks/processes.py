"""The process of a candidate: its task is a JSON argument; requests and answers are JSON lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# OpenMP threads spin for up to 0.2 s after their work and would take a core from the next candidate.
PAUSE = 0.3
ROOT = Path(__file__).resolve().parent.parent
PREFIX = "against-"
"""Prefix of the names of candidates that run another checkout of this project."""

Answer = Callable[[Any], None]


class Worker:
    """A client of a started process, whose `script` calls `run`.

    checkout: the folder of this project from which the process must import the package.
    """

    def __init__(self, script: str, python: str, task: dict[str, Any], checkout: Path | None = None) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        # Installed packages are compiled; Python then does it in the warm-up round.
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        if checkout is not None:
            paths = [str(checkout / "src"), os.environ.get("PYTHONPATH")]
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
            task = task | {"checkout": str(checkout)}
        command, pipe = [python, script, json.dumps(task)], subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                command, env=variables, stdin=pipe, stdout=pipe, stderr=self.errors, text=True
            )
        except OSError as error:
            raise SystemExit(f"{python}: {error.strerror}") from None

    def ask(self, do: str, **request: Any) -> Any:
        """Send a request and return its answer, after a pause in which the threads of others become idle."""
        time.sleep(PAUSE)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"a worker exited early:\n{self.errors.read()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate()
        self.errors.close()


def run(work: Callable[[dict[str, Any], Answer], None]) -> None:
    """Run work(task, answer) in this process; a candidate that cannot run answers {"failed": reason}."""
    answers = os.fdopen(os.dup(1), "w")
    # Output of libraries is redirected to stderr, so that it does not mix with the answers.
    os.dup2(2, 1)
    task = json.loads(sys.argv[1])
    checkout = task.pop("checkout", None)

    def answer(value: Any) -> None:
        check_package(checkout)
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        work(task, answer)
    except ImportError as error:
        answer({"failed": f"not installed ({error})"})
    except (ValueError, OSError) as error:
        answer({"failed": str(error).splitlines()[0]})


def check_package(checkout: str | None) -> None:
    """Check that this process imported the package of its checkout, if it imported the package."""
    package = sys.modules.get("einsum_transformer")
    if checkout is not None and package is not None:
        path = Path(package.__file__ or "").resolve()
        assert path.is_relative_to(Path(checkout, "src")), f"imported {path} instead of {checkout}/src"


def serve(engine: Any, answer: Answer, requests: Mapping[str, Callable[..., Any]]) -> None:
    """Answer requests with their functions of the engine until the input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        answer(requests[request.pop("do")](engine, **request))
