"""Symbolic links in a checkpoint folder: allowed within it and its hub cache, elsewhere only on request."""

from pathlib import Path

from einsum_transformer.errors import FormatError

BROKEN_LINK = "a broken link: its target does not exist; download the file again"


def is_broken_link(path: Path) -> bool:
    """Return whether a path is a link to a file that does not exist."""
    try:
        return path.is_symlink() and not path.exists()
    except (OSError, RuntimeError):  # a cycle of links
        return True


def inside(folder: Path, name: str, allow_links: bool = False) -> Path:
    """Return the path of a file in `folder`; raise FormatError for a link out of it that is not allowed.

    In a Hugging Face cache `<repo>/snapshots/<revision>/<name>` is a link to `<repo>/blobs/<hash>`, which may
    itself link to `<cache>/blobs/<prefix>/<hash>`, where repositories share files.
    """
    path = folder / name
    try:
        root, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # a cycle of links
        raise FormatError(f"{path}: {BROKEN_LINK}") from None
    allowed = allow_links or real.is_relative_to(root)
    if root.parent.name == "snapshots":
        repo = root.parent.parent
        allowed |= real.parent == repo / "blobs" or real.parent.parent == repo.parent / "blobs"
    if not allowed:
        raise FormatError(
            f"{path}: a link out of the folder, to {real}; copy the file into the folder, or follow the link "
            "with `allow_links`"
        )
    return path
