"""Stop strings: matched in the text with its special tokens, and removed from the output."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Returns text until a stop string occurs; holds back text that may be the beginning of a stop string.

    As in transformers, stop strings are matched in the raw text, including special tokens; the returned text
    is the shown text, without special tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self._raw = ""
        self._pieces: list[tuple[str, str]] = []
        """Pairs (raw, shown) of the text held back; the joined raw parts are `_raw`."""

    def put(self, shown: str, raw: str | None = None, last: bool = False) -> tuple[str, bool]:
        """Return (text that is safe to show, whether a stop string occurred). The stop string and the text
        after it are dropped.

        raw: the new text with special tokens; default: `shown`.
        """
        if not self.stops:
            return shown, False
        raw = shown if raw is None else raw
        self._raw += raw
        self._pieces.append((raw, shown))
        # The stop string that ends first is used, so that the result does not depend on the pieces.
        found = [(at + len(stop), at) for stop in self.stops if (at := self._raw.find(stop)) >= 0]
        if found:
            return self._take(min(found)[1]), True
        keep = 0 if last else max((self._partial(stop) for stop in self.stops), default=0)
        return self._take(len(self._raw) - keep, last), False

    def _take(self, count: int, last: bool = False) -> str:
        """Release the first `count` raw characters and return their shown part."""
        self._raw = self._raw[count:]
        ready = ""
        while self._pieces and (count or last or not self._pieces[0][0]):
            raw, shown = self._pieces.pop(0)
            if count < len(raw):
                # The raw text that is not shown (a special token, a space before a word) begins a piece.
                cut = max(0, count - max(0, len(raw) - len(shown)))
                self._pieces.insert(0, (raw[count:], shown[cut:]))
                return ready + shown[:cut]
            ready += shown
            count -= len(raw)
        return ready

    def _partial(self, stop: str) -> int:
        """Return the length of the longest suffix of the held text that is a prefix of the stop string."""
        longest = min(len(stop) - 1, len(self._raw))
        return next((n for n in range(longest, 0, -1) if self._raw.endswith(stop[:n])), 0)
