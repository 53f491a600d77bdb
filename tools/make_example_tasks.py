"""Write the data of the tasks in examples/tasks from examples/shakespeare.txt.

Three tasks for lm-evaluation-harness: the next line of a speech (four choices), scenes (perplexity), and the
last word of a line (generation).

    python tools/make_example_tasks.py
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples"
QUESTIONS, SCENES, WORDS, EXAMPLES_OF_WORDS = 16, 4, 16, 3
SCENE_CHARACTERS = 1200


def main() -> None:
    text = (EXAMPLES / "shakespeare.txt").read_text(encoding="utf-8")
    rng = random.Random(0)
    speeches = verse(text)
    write("next_line", next_lines(speeches, rng))
    write("scenes", [{"text": scene} for scene in scenes(text)])
    words = last_words(speeches, rng)
    write("last_word", words[EXAMPLES_OF_WORDS:])
    write("last_word_examples", words[:EXAMPLES_OF_WORDS])


def verse(text: str) -> list[list[str]]:
    """The speeches of four lines or more without stage directions, each line of 30 to 60 characters."""
    found = []
    for block in re.split(r"\n{2,}", text):
        _, *lines = block.split("\n")
        plain = all(30 <= len(line) <= 60 and line[0].isupper() for line in lines)
        if len(lines) >= 4 and plain and not re.search(r"[\[\]_{}]", block):
            found.append(lines)
    return found


def next_lines(speeches: list[list[str]], rng: random.Random) -> list[dict[str, Any]]:
    """Questions: three lines of a speech, and which of four lines follows."""
    rows = []
    for lines in rng.sample(speeches, QUESTIONS):
        others = [each[3] for each in rng.sample(speeches, 4) if each is not lines][:3]
        answer = rng.randrange(4)
        choices = [*others[:answer], lines[3], *others[answer:]]
        rows.append({"context": "\n".join(lines[:3]), "choices": choices, "answer": answer})
    return rows


def scenes(text: str) -> list[str]:
    """The beginnings of scenes, cut at the end of a line."""
    found = []
    for scene in re.split(r"\n(?=SCENE [IVX]+\.)", text)[1:]:
        if len(scene) > SCENE_CHARACTERS and len(found) < SCENES:
            found.append(scene[: scene.rindex("\n", 0, SCENE_CHARACTERS)])
    return found


def last_words(speeches: list[list[str]], rng: random.Random) -> list[dict[str, Any]]:
    """Lines and their last words."""
    lines = sorted({line for speech in speeches for line in speech if re.search(r"\w{3,}\W*$", line)})
    chosen = rng.sample([line for line in lines if "'" not in line], WORDS + EXAMPLES_OF_WORDS)
    return [{"line": line, "word": re.findall(r"\w+", line)[-1]} for line in chosen]


def write(name: str, rows: list[dict[str, Any]]) -> None:
    target = EXAMPLES / "tasks" / f"{name}.jsonl"
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    target.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    print(f"{target.name}: {len(rows)} rows, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
