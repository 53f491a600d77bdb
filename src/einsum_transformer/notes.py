"""Notes: what a user should know about an input that is accepted, such as a key that is not used.

They go to the logger "einsum_transformer" as warnings: to stderr by default, wherever a program sends them
with the standard library's logging, and nowhere with the command line's `--quiet`.
"""

import logging
from functools import lru_cache

LOGGER = logging.getLogger("einsum_transformer")


def note(text: str) -> None:
    """Log one line."""
    LOGGER.warning("%s", text)


@lru_cache(maxsize=1024)
def note_once(text: str, about: str = "") -> None:
    """Log one line the first time only, for what may be called in a loop.

    about: what the line is about, such as a model's source, where the text does not name it.
    """
    note(text)
