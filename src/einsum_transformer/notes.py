"""Notes: warnings about accepted inputs, such as a config key that is not used.

They are logged as warnings to the logger "einsum_transformer": printed to stderr by default, configurable
with the standard `logging` module, and suppressed by the command line's `--quiet`.
"""

import logging
from functools import lru_cache

LOGGER = logging.getLogger("einsum_transformer")


def note(text: str) -> None:
    """Log a one-line warning."""
    LOGGER.warning("%s", text)


@lru_cache(maxsize=1024)
def note_once(text: str, about: str = "") -> None:
    """Log a one-line warning only once, even if called in a loop.

    about: the subject of the warning, such as a model's source, if the text does not name it.
    """
    note(text)
