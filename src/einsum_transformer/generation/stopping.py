"""Stop strings: found in the text with its special tokens, and not shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through until a stop string appears; holds back what could still become one.

    Stop strings are looked for in the raw text, special tokens included, as transformers does; what is passed
    through is the text that is shown, without them.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self._raw = ""
        self._pieces: list[tuple[str, str]] = []
        """(raw, shown) of what is held; together `_raw`."""

    def put(self, shown: str, raw: str | None = None, last: bool = False) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was met; it and what follows are dropped).

        raw: the new text with special tokens; default: the same.
        """
        if not self.stops:
            return shown, False
        raw = shown if raw is None else raw
        self._raw += raw
        self._pieces.append((raw, shown))
        # The one that is complete first counts, so that it does not matter in what pieces the text comes.
        found = [(at + len(stop), at) for stop in self.stops if (at := self._raw.find(stop)) >= 0]
        if found:
            return self._take(min(found)[1]), True
        keep = 0 if last else max((self._partial(stop) for stop in self.stops), default=0)
        return self._take(len(self._raw) - keep, last), False

    def _take(self, count: int, last: bool = False) -> str:
        """The shown part of the first `count` raw characters, which are held no longer."""
        self._raw = self._raw[count:]
        ready = ""
        while self._pieces and (count or last or not self._pieces[0][0]):
            raw, shown = self._pieces.pop(0)
            if count < len(raw):
                # What is not shown (a special token, a space before a word) is the beginning of a piece.
                cut = max(0, count - max(0, len(raw) - len(shown)))
                self._pieces.insert(0, (raw[count:], shown[cut:]))
                return ready + shown[:cut]
            ready += shown
            count -= len(raw)
        return ready

    def _partial(self, stop: str) -> int:
        """Length of the longest end of the held text that begins the stop string."""
        longest = min(len(stop) - 1, len(self._raw))
        return next((n for n in range(longest, 0, -1) if self._raw.endswith(stop[:n])), 0)
