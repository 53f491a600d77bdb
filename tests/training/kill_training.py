"""Kills many training processes and checks that no checkpoint is lost and no result changes.

`python tests/training/kill_training.py --kills 120` trains a tiny model with `train` without interruption,
and again in processes that are killed with SIGKILL, half of them at random times and half at named points of
file operations (`before rename`, `half of write state.json`); each kill is followed by `--resume`. Linux
only: the processes are forked from one that has imported all modules.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import file_points

STEPS = 6
CONFIG = {"arch": "llama", "d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24}
FLAGS = (
    *("train", "--quiet", "--threads", "1", "--config", "tiny.json", "--data", "text.txt", "--seq-len", "8"),
    *("--optimizer", "adamw", "--lr", "0.01", "--schedule", "cosine", "--steps", str(STEPS)),
    *("--batch-size", "4", "--grad-accumulation-steps", "2", "--save-every", "1"),
)
TRAININGS = {
    "all weights": (),
    "adapters": ("--lora", "--lora-rank", "2", "--lora-targets", "all-linear", "--lora-dropout", "0.2"),
}
TEXT = "the cat sat on the mat and the dog sat on the log\n" * 12


class Broken(Exception):
    """A guarantee of checkpoints is violated."""


def expect(holds: bool, message: str) -> None:
    if not holds:
        raise Broken(message)


@dataclass(frozen=True, slots=True)
class Ended:
    """The result of a process: its exit code, negative for a signal, and its stderr."""

    code: int
    stderr: str

    @property
    def done(self) -> bool:
        # A training killed after its last checkpoint is complete, which the command reports as an error.
        return self.code == 0 or (self.code == 2 and f"all {STEPS} steps are done" in self.stderr)


class Process:
    """A forked process that calls `prepare` and then runs `train` with flags."""

    def __init__(self, flags: tuple[str, ...], prepare: Callable[[], None]) -> None:
        read, write = os.pipe()
        self.stderr, self.id = read, os.fork()
        if self.id == 0:
            os._exit(_train(flags, prepare, write))
        os.close(write)

    def kill(self) -> None:
        os.kill(self.id, signal.SIGKILL)

    def wait(self) -> Ended:
        with open(self.stderr, encoding="utf-8") as file:
            text = file.read()
        return Ended(os.waitstatus_to_exitcode(os.waitpid(self.id, 0)[1]), text)


def _train(flags: tuple[str, ...], prepare: Callable[[], None], stderr: int) -> int:
    from einsum_transformer.cli.app import main

    os.dup2(stderr, 2)
    try:
        prepare()
        main(flags)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except Broken as problem:
        print(problem, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()
    return 0


def check_start(folder: Path) -> None:
    """Patch `train` to check, before its first step, that the files of a killed process are cleaned up."""
    from einsum_transformer.training.loop import Trainer

    run = Trainer.run

    def checked(trainer: Any, steps: int) -> Any:
        left = [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]
        expect(not left, f"left over after a start: {left}")
        done = list(range(1, trainer.steps_done + 1))
        expect(list(losses(folder)) == done, f"metrics after {len(done)} steps: {losses(folder)}")
        return run(trainer, steps)

    Trainer.run = checked


def rename_by_copying() -> None:
    """The planted error: a rename that is not atomic."""
    os.rename = shutil.copytree  # type: ignore[assignment]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, tuple[float, ...]]:
    """The metrics of each step; a duplicate step is an error."""
    lines = [line for line in metrics(folder) if "loss" in line]
    found = {line["step"]: (line["loss"], line["norm"], line["lr"], line["targets"]) for line in lines}
    expect(len(found) == len(lines), f"{folder}: steps {[line['step'] for line in lines]} in metrics.jsonl")
    return found


def validation(folder: Path) -> dict[int, float]:
    return {line["step"]: line["validation_loss"] for line in metrics(folder) if "validation_loss" in line}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def newest(folder: Path) -> int:
    """The last step with a checkpoint, by the names in the folder; 0 if there is no checkpoint."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name[5:]) for name in names if re.fullmatch(r"step-\d{8}", name)), default=0)


def reported(folder: Path) -> int:
    """The last step whose checkpoint is reported in train.log."""
    log = folder / "train.log"
    steps = re.findall(r"checkpoint step-(\d{8})\n", log.read_text()) if log.exists() else []
    return max(map(int, steps), default=0)


@dataclass
class Trial:
    """A training that is killed repeatedly, and the same training without interruption."""

    name: str
    root: Path
    chance: random.Random
    planted: bool = False
    trainer: Any = None
    whole: dict[str, dict[str, bytes]] = field(default_factory=dict)
    points: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    hit: set[str] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        return self.root / "killed"

    def flags(self, folder: Path, keep: int = 2, resume: bool = False) -> tuple[str, ...]:
        flags = (*FLAGS, *TRAININGS[self.name], "--keep-last", str(keep), "-o", str(folder))
        return (*flags, "--resume") if resume else flags

    def uninterrupted(self) -> None:
        """Train in this process, which imports all modules, and in a fork that records its points."""
        from einsum_transformer.training import state

        save = state.save

        def recording(trainer: Any, *others: Any) -> Path:
            self.trainer = trainer
            return save(trainer, *others)

        state.save = recording
        code = _train(self.flags(self.root / "whole", keep=STEPS), lambda: None, 2)
        state.save = save
        expect(code == 0, f"the uninterrupted training ended with {code}")
        # A forked process does not have the threads of its parent, and their locks would never be released.
        expect(len(os.listdir("/proc/self/task")) == 1, "there are threads in the process to be forked")
        self.whole = {path.name: content(path) for path in (self.root / "whole").glob("step-*")}
        expect(len(self.whole) == STEPS, f"checkpoints of {sorted(self.whole)}")
        begin = time.monotonic()
        ended = Process(self.flags(self.folder), self._recorded).wait()
        self.seconds = time.monotonic() - begin
        expect(ended.code == 0, f"a training in a forked process ended with {ended}")
        self.points = Counter(json.loads((self.root / "points.json").read_text()))
        if not self.planted:
            self.compare()
        shutil.rmtree(self.folder)

    def _recorded(self) -> None:
        """Leave the points of a training in points.json when it ends."""
        from einsum_transformer.api.train import _Run

        seen: Counter[str] = Counter()
        report = _Run.result

        def written(*arguments: Any) -> Any:
            counted = dict(seen)
            (self.root / "points.json").write_text(json.dumps(counted))
            return report(*arguments)

        _Run.result = written
        if self.planted:
            rename_by_copying()
        file_points.record(seen)

    def kill(self, kills: int) -> None:
        """Kill `kills` processes, every second one at a point; restart completed trainings."""
        left: list[str] = []
        while self.counts["kills"] < kills:
            left = left or self.chance.sample(sorted(self.points), len(self.points))
            point = left.pop(0) if self.counts["kills"] % 2 else ""
            before, resume = max(newest(self.folder), reported(self.folder)), self.folder.exists()
            ended = self._end_one(resume, point)
            self.counts["processes"] += 1
            if ended.code == -signal.SIGKILL:
                self.counts["kills"] += 1
                self.counts["at points" if point else "at random moments"] += 1
                self.hit |= {point} - {""}
                self.examine(before, point or "a random moment")
                continue
            expect(ended.done, f"a training ended with {ended.code}: {ended.stderr}")
            left = [point, *left] if point else left
            self.finish()
        while self.folder.exists():
            ended = Process(self.flags(self.folder, resume=True), lambda: check_start(self.folder)).wait()
            expect(ended.done, f"the last training ended with {ended.code}: {ended.stderr}")
            self.finish()

    def _end_one(self, resume: bool, point: str) -> Ended:
        occurrence = self.chance.randint(1, min(2, self.points[point])) if point else 0
        delay = self.chance.uniform(0, self.seconds)

        def prepare() -> None:
            check_start(self.folder)
            if self.planted:
                rename_by_copying()
            if point:
                file_points.die_at(point, occurrence)

        process = Process(self.flags(self.folder, resume=resume), prepare)
        if not point:
            time.sleep(delay)
            process.kill()
        return process.wait()

    def examine(self, before: int, killed_at: str) -> None:
        """Check the checkpoints after a kill."""
        from einsum_transformer.errors import InputError
        from einsum_transformer.training import state

        found = state.checkpoints(self.folder)
        least = max(before, reported(self.folder))
        last = newest(self.folder)
        expect(last >= least, f"killed at {killed_at}: step {least} was saved, {last} is the newest")
        for folder in found:
            try:
                state.restore(self.trainer, folder)
            except InputError as error:
                raise Broken(f"killed at {killed_at}: {error}") from None
            expect(self.trainer.steps_done == int(folder.name[5:]), f"{folder} restores another step")
            same = content(folder) == self.whole[folder.name]
            expect(same, f"killed at {killed_at}: {folder} differs from the uninterrupted training")
            self.counts["checkpoints restored"] += 1

    def finish(self) -> None:
        self.compare()
        self.counts["trainings finished"] += 1
        shutil.rmtree(self.folder)

    def compare(self) -> None:
        """Check that a completed training equals the uninterrupted one bit for bit."""
        self.examine(STEPS, "no point")
        whole = self.root / "whole"
        expect(losses(self.folder) == losses(whole), f"{losses(self.folder)} instead of {losses(whole)}")
        expect(validation(self.folder) == validation(whole), f"validation {validation(self.folder)}")
        names = {path.name for path in self.folder.iterdir()}
        last = {f"step-{STEPS - 1:08d}", f"step-{STEPS:08d}"}
        expect(
            names == {"run.json", "train.log", "metrics.jsonl", *last}, f"the folder contains {sorted(names)}"
        )

    def fill_disk(self) -> None:
        """Limit the size of files: expect one line, exit code 2, and that the last checkpoint resumes."""
        folder = self.folder
        ended = Process(
            self.flags(folder), lambda: file_points.die_at("before rename .step-#.#.tmp step-#", 3)
        )
        expect(ended.wait().code == -signal.SIGKILL, "the training should be killed at its third checkpoint")
        good = {path.name: content(path) for path in folder.glob("step-*")}
        sizes = {len(data) for files in good.values() for data in files.values()}
        logs = {
            (folder / name).stat().st_size + more
            for name in ("train.log", "metrics.jsonl")
            for more in (-1, 40)
        }
        for limit in sorted({0, 1, *(size - 1 for size in sizes), *logs}):
            ended = Process(self.flags(folder, resume=True), partial(_limit_files, limit)).wait()
            case = f"files of at most {limit} bytes: exit code {ended.code}, {ended.stderr!r}"
            expect(ended.code == 2 and ended.stderr.count("\n") == 1, case)
            expect(re.match(rf"error: \S*{folder.name}/\S+: File too large", ended.stderr) is not None, case)
            expect(not list(folder.glob(".*")), f"{case}: left {list(folder.glob('.*'))}")
            expect({path.name: content(path) for path in folder.glob("step-*")} == good, case)
            self.counts["full disks"] += 1
        ended = Process(self.flags(folder, resume=True), lambda: check_start(folder)).wait()
        expect(ended.code == 0, f"after the full disk: {ended}")
        self.finish()

    def report(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        return f"{self.name}: {counts}; {len(self.hit)} of {len(self.points)} points hit"


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=120, help="total; half for each kind of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--plant", action="store_true", help="rename by copying, an error that must be detected"
    )
    flags = parser.parse_args()
    os.environ |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1") | {
        "TOKENIZERS_PARALLELISM": "false"
    }
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("tiny.json").write_text(json.dumps(CONFIG | {"vocab_size": 270}))
        Path("text.txt").write_text(TEXT)
        for number, name in enumerate(TRAININGS):
            Path(str(number)).mkdir()
            trial = Trial(name, Path(str(number)), random.Random(flags.seed + number), flags.plant)
            try:
                trial.uninterrupted()
                trial.kill(flags.kills // len(TRAININGS))
                if not flags.plant:
                    trial.fill_disk()
            except Broken as problem:
                sys.exit(f"BROKEN after {trial.counts['kills']} kills: {name}: {problem}")
            print(trial.report())
    print(f"nothing lost, nothing changed; {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
