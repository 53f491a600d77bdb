"""Streamed decoding: the pieces joined are the decoded text, for every decoder and every sequence of ids."""

import random
from typing import Any

import pytest
import tokenizers
from text_golden import byte_level, from_golden
from tokenizers import AddedToken, decoders
from tokenizers.models import BPE

from einsum_transformer.text.streaming import ByteLevelStream, byte_alphabet, stream_decoder

CHARACTERS = ("é", "中文", "👩‍👩‍👧", "\ufffd", "𐍈", "ﬁ", "▁", "a", " ")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)] + ["<0x4a>", "<0x+5>"]
PIECES = [*BYTES, *CHARACTERS, "▁▁", "▁▁▁", "▁a", "▁the", "x▁", "\n", "", "</s>", "<s>"]
WORDS = ["##a", "b", "##c", "!", "'s", "n't", "a</w>", "</w>", "."]
SPACES, FALLBACK, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
STRIP = decoders.Strip(" ", 1, 0)


def byte_level_tokens() -> list[str]:
    alphabet = byte_alphabet()
    chance = random.Random(1)
    cut = ["".join(chance.choices(alphabet, k=chance.randint(2, 4))) for _ in range(300)]
    spelled = ["".join(alphabet[byte] for byte in text.encode()) for text in CHARACTERS]
    return list(dict.fromkeys([*alphabet, *cut, *spelled, *CHARACTERS, "<s>"]))


DECODERS: dict[str, tuple[Any, list[str]]] = {
    "byte level": (decoders.ByteLevel(), byte_level_tokens()),
    "byte level in a sequence": (decoders.Sequence([decoders.ByteLevel()]), byte_level_tokens()),
    "llama": (decoders.Sequence([SPACES, FALLBACK, FUSE, STRIP]), PIECES),
    "gemma": (decoders.Sequence([SPACES, FALLBACK, FUSE]), PIECES),
    "metaspace": (decoders.Metaspace(), PIECES),
    "metaspace with bytes": (decoders.Sequence([FALLBACK, decoders.Metaspace()]), PIECES),
    "wordpiece": (decoders.WordPiece(), WORDS),
    "bpe with suffix": (decoders.BPEDecoder(), WORDS),
    "none": (None, PIECES),
}


@pytest.mark.parametrize("name", DECODERS)
def test_pieces_joined_are_the_text(name: str) -> None:
    decoder, tokens = DECODERS[name]
    backend = tokenizers.Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, []))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens([AddedToken(token) for token in ("<s>", "</s>") if token in tokens])
    special = frozenset({"<s>", "</s>"} & {*tokens})
    chance = random.Random(2)
    for _ in range(1500):
        low = chance.choice((0, max(0, len(tokens) - 30)))
        ids = [chance.randrange(low, len(tokens) + 2) for _ in range(chance.randint(0, 12))]
        for skip in (True, False):
            stream = stream_decoder(backend, special if skip else frozenset())
            pieces = [stream.put(token_id) for token_id in ids]
            assert "".join(pieces) + stream.end() == backend.decode(ids, skip_special_tokens=skip), ids


def test_alphabet() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(byte_alphabet()) == sorted(ByteLevel.alphabet())


@pytest.mark.parametrize(
    "make", [byte_level, lambda: from_golden("sentencepiece"), lambda: from_golden("unigram")]
)
def test_no_piece_ends_inside_a_character(make: Any) -> None:
    tokenizer = make()
    text = " 日本 👩‍👩‍👧 é x 𐍈 end"
    stream = tokenizer.stream()
    pieces = [stream.put(token_id) for token_id in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) + stream.end() == text
    assert "\ufffd" not in "".join(pieces)
    assert sum(piece != "" for piece in pieces) > 5


def test_byte_level_text_arrives_as_soon_as_it_is_certain() -> None:
    tokenizer = byte_level()
    stream = tokenizer.stream()
    assert isinstance(stream, ByteLevelStream)
    ids = [tokenizer.backend.token_to_id(byte_alphabet()[byte]) for byte in "a€".encode()]
    assert [stream.put(token_id) for token_id in ids] == ["a", "", "", "€"]
    assert [stream.put(ids[1]), stream.end()] == ["", "\ufffd"]


def test_special_tokens() -> None:
    tokenizer = byte_level()
    ids = [tokenizer.bos_id or 0, *tokenizer.encode("hello", add_special_tokens=False), 10**6]
    for skip, expected in ((True, "hello"), (False, "<|begin|>hello")):
        stream = tokenizer.stream(skip_special_tokens=skip)
        assert "".join([*map(stream.put, ids), stream.end()]) == expected == tokenizer.decode(ids, skip)


def test_a_long_run_of_byte_tokens_is_decoded_once() -> None:
    tokenizer = from_golden("sentencepiece")
    stream = tokenizer.stream()
    decoded: list[int] = []
    whole = stream._decode
    stream._decode = lambda ids: decoded.append(len(ids)) or whole(ids)
    ids = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in ("ก" * 2000).encode()]
    assert "".join(map(stream.put, ids)) + stream.end() == "ก" * 2000
    assert sum(decoded) <= len(ids) + 2
