"""Links in a checkpoint folder: followed inside of it and inside a hub cache, elsewhere only if allowed."""

from pathlib import Path

from einsum_transformer.errors import FormatError

LEADS_NOWHERE = "a link that leads nowhere: the file that it names is gone; fetch it again"


def leads_nowhere(path: Path) -> bool:
    """Whether a path is a link to a file that does not exist."""
    try:
        return path.is_symlink() and not path.exists()
    except (OSError, RuntimeError):  # links in a circle
        return True


def inside(folder: Path, name: str, allow_links: bool = False) -> Path:
    """The path of a member of `folder`, unless it is a link that leads out of it and links are not allowed.

    In a Hugging Face cache `<repo>/snapshots/<revision>/<name>` is a link to `<repo>/blobs/<hash>`, which may
    be one to `<cache>/blobs/<prefix>/<hash>`, where repositories share files.
    """
    path = folder / name
    try:
        home, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # links in a circle
        raise FormatError(f"{path}: {LEADS_NOWHERE}") from None
    allowed = allow_links or real.is_relative_to(home)
    if home.parent.name == "snapshots":
        repo = home.parent.parent
        allowed |= real.parent == repo / "blobs" or real.parent.parent == repo.parent / "blobs"
    if not allowed:
        raise FormatError(
            f"{path}: a link out of the folder, to {real}; put the file itself there, or allow such links "
            "with --allow-links (in Python allow_links=True)"
        )
    return path
