"""Decode token ids one at a time: the joined pieces equal the text of decoding all ids at once."""

import codecs
from abc import ABC, abstractmethod

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

from einsum_transformer.text.native import checked


class StreamDecoder(ABC):
    """Decodes ids as they arrive; a piece never ends inside a character."""

    @abstractmethod
    def put(self, token_id: int) -> str:
        """Add the next id and return the text that can no longer change, often an empty string."""

    @abstractmethod
    def end(self) -> str:
        """Return the text held back so far; call this once, after the last id."""


def stream_decoder(
    backend: Tokenizer,
    skipped: frozenset[str],
    cleaned: bool = False,
    source: str = "tokenizer",
) -> StreamDecoder:
    """Return the streaming decoder for a tokenizer; tokens in `skipped` give no text.

    cleaned: remove the spaces before punctuation, see `clean_up`. source: prefix of error messages.
    """
    if cleaned:
        return CleanStream(stream_decoder(backend, skipped, source=source))
    decoder = backend.decoder
    if isinstance(decoder, ByteLevel):
        return ByteLevelStream(backend, skipped)
    reads_bytes = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
    return WindowStream(backend, skipped, reads_bytes, source)


class ByteLevelStream(StreamDecoder):
    """Byte-level BPE: tokens encode bytes, and the bytes of all tokens are UTF-8 (GPT-2's encoder.py)."""

    def __init__(self, backend: Tokenizer, skipped: frozenset[str]) -> None:
        self._backend, self._skipped = backend, skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._bytes = {character: byte for byte, character in enumerate(byte_alphabet())}

    def put(self, token_id: int) -> str:
        token = self._backend.id_to_token(token_id)
        if token is None or token in self._skipped:
            return ""
        try:
            piece = bytes(self._bytes[character] for character in token)
        except KeyError:  # an added token, which is not byte-encoded
            piece = token.encode()
        return self._utf8.decode(piece)

    def end(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowStream(StreamDecoder):
    """Any other decoder: the difference between decoding the last ids with and without the newest ones.

    A decoder processes each token separately, except that it treats the first one differently (SentencePiece
    drops its leading space), decodes a run of byte tokens (<0xE2>) together, and joins the bytes of adjacent
    tokens to characters if it is byte-level in part. So the window starts with the last token written, and
    ids are held back until a run of byte tokens or an incomplete character ends.
    """

    def __init__(self, backend: Tokenizer, skipped: frozenset[str], reads_bytes: bool, source: str) -> None:
        self._backend, self._skipped, self._reads_bytes = backend, skipped, reads_bytes
        self._source = source
        self._last: list[int] = []
        self._held: list[int] = []

    def put(self, token_id: int) -> str:
        token = self._backend.id_to_token(token_id)
        if token is None or token in self._skipped:
            return ""
        self._held.append(token_id)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return ""
        text = self._new_text()
        if self._reads_bytes and text.endswith("\ufffd"):
            return ""
        self._last = self._held[-1:] if token else self._last + self._held
        self._held = []
        return text

    def end(self) -> str:
        return self._new_text()

    def _new_text(self) -> str:
        return self._decode(self._last + self._held).removeprefix(self._decode(self._last))

    def _decode(self, ids: list[int]) -> str:
        return checked(
            f"{self._source}: cannot decode the ids",
            lambda: self._backend.decode(ids, skip_special_tokens=False),
        )


def byte_alphabet() -> list[str]:
    """Return the character of each byte in byte-level BPE: itself if printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + index) for index in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


_CLEANED = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((f" {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")),
)
# Each replacement matches at most 4 characters, so later text changes at most the last 40 characters.
_UNSETTLED = 4 * len(_CLEANED)


def clean_up(text: str) -> str:
    """Remove the spaces before punctuation and contractions like transformers' `clean_up_tokenization`."""
    for old, new in _CLEANED:
        text = text.replace(old, new)
    return text


class CleanStream(StreamDecoder):
    """Cleans up the text of another decoder; holds back `_UNSETTLED` characters until the end."""

    def __init__(self, decoder: StreamDecoder) -> None:
        self._decoder = decoder
        self._text, self._written = "", 0

    def put(self, token_id: int) -> str:
        piece = self._decoder.put(token_id)
        if not piece:
            return ""
        self._text += piece
        return self._up_to(-_UNSETTLED)

    def end(self) -> str:
        self._text += self._decoder.end()
        return self._up_to(None)

    def _up_to(self, end: int | None) -> str:
        new = clean_up(self._text)[self._written : end]
        self._written += len(new)
        return new
