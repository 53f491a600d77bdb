"""generate(): budgets, ends, batches, seeds and prompts that are wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import einsum_transformer as et
from einsum_transformer.generation.decode import Generation, Settings, decode_batch, prefill
from einsum_transformer.generation.sampling import Sampling
from einsum_transformer.text.tokenizer import Tokenizer
from golden_files import Models
from tiny_models import successor_model, tiny_model, write_tiny

MODEL = tiny_model()
COUNTER = successor_model(20, max_position_embeddings=64)
PROMPTS = [[7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [11, 12, 13], [60, 0, 60]]


def byte_tokenizer(folder: Path) -> Tokenizer:
    """One token for each byte of ASCII, its id the byte."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled = [byte_level.pre_tokenize_str(chr(byte))[0][0] for byte in range(128)]
    backend = Backend(models.BPE({text: byte for byte, text in enumerate(spelled)}, []))
    backend.pre_tokenizer, backend.decoder = byte_level, decoders.ByteLevel()
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> et.Model:
    """A model that says the alphabet, and all other characters, in the order of their bytes."""
    tokenizer = byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return replace(successor_model(128), tokenizer=tokenizer)


def test_greedy_equals_argmax_of_whole_passes() -> None:
    """No cache, one pass for each token."""
    tokens = list(PROMPTS[1])
    for _ in range(12):
        tokens.append(int(np.argmax(MODEL.logits([tokens])[0, -1])))
    result = et.generate(MODEL, PROMPTS[1], max_new_tokens=12, temperature=0.0)
    expected = tokens[len(PROMPTS[1]) :]
    ended = expected.index(60) if 60 in expected else 12
    assert result.tokens == expected[:ended]


def test_greedy_is_deterministic_and_needs_no_seed() -> None:
    first, again, seeded = (
        et.generate(MODEL, [5, 6], max_new_tokens=20, seed=seed).tokens for seed in (None, None, 3)
    )
    assert first == again == seeded


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_the_budget(count: int) -> None:
    result = et.generate(COUNTER, [3], max_new_tokens=count)
    assert result.tokens == [4, 5, 6, 7, 8, 9, 10][:count]
    assert result.finish_reason == "length"
    assert result.prompt_tokens == [3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_gives_what_its_rows_give_alone(temperature: float) -> None:
    """Different lengths, budgets used up or ended early."""
    model = replace(MODEL, generation_config={"eos_token_id": [3, 10, 20, 30, 40, 50, 60]})
    options: dict[str, Any] = {"max_new_tokens": 25, "temperature": temperature, "seed": 5}
    together = et.generate(model, PROMPTS, **options)
    assert len({len(result.tokens) for result in together}) > 1
    for position, result in enumerate(together):
        # The row's number belongs to its random stream, so it keeps its place, beside other rows.
        others = [[1]] * position + [PROMPTS[position]]
        alone = et.generate(model, others, **options)[position]
        assert (result.tokens, result.finish_reason) == (alone.tokens, alone.finish_reason)


def test_a_row_does_not_depend_on_what_stands_beside_it() -> None:
    def second(*others: list[int]) -> list[int]:
        batch = [others[0], [4, 5], *others[1:]]
        return et.generate(MODEL, batch, max_new_tokens=15, temperature=1.0, seed=1)[1].tokens

    assert second([1]) == second([9] * 40) == second([2, 3], [7], [8] * 9)


def test_seeds() -> None:
    """The same seed the same text, another another; rows of one prompt differ; without a seed every run
    differs."""

    def run(seed: int | None) -> list[list[int]]:
        results = et.generate(MODEL, [[1, 2]] * 3, max_new_tokens=20, temperature=1.0, seed=seed)
        return [result.tokens for result in results]

    assert run(0) == run(0) != run(1)
    assert len({tuple(row) for row in run(0)}) == 3
    assert run(None) != run(None)
    assert run(2**70) == run(2**70)


def test_the_first_token_of_many_seeds_has_the_model_distribution() -> None:
    scores = MODEL.logits([[1, 2]])[0, -1].astype(np.float64)
    kept = np.argsort(scores)[-4:]
    p = np.exp(scores[kept]) / np.exp(scores[kept]).sum()
    options: dict[str, Any] = {"max_new_tokens": 1, "temperature": 1.0, "top_k": 4}
    ignoring = replace(MODEL, config=replace(MODEL.config, eos_token_id=()))
    tokens = [et.generate(ignoring, [1, 2], seed=seed, **options).tokens[0] for seed in range(600)]
    counts = np.array([tokens.count(int(token)) for token in kept])
    assert counts.sum() == 600
    assert float(((counts - 600 * p) ** 2 / (600 * p)).sum()) <= 25.9


@pytest.mark.parametrize("ends", [[6], [9, 6], [6, 9], (6, 6)])
def test_any_of_the_end_tokens_of_the_config_ends(ends: list[int]) -> None:
    model = replace(COUNTER, config=replace(COUNTER.config, eos_token_id=tuple(ends)))
    result = et.generate(model, [3], max_new_tokens=10)
    assert result.tokens == [4, 5]
    assert result.finish_reason == "stop"
    assert len(et.generate(model, [3], max_new_tokens=10, ignore_eos=True).tokens) == 10


@pytest.mark.parametrize("ends", [6, [6], [6, 9], 0, [0]])
def test_the_end_tokens_of_generation_config_end(ends: Any) -> None:
    """Token 0 is an id like any other."""
    model = replace(COUNTER, generation_config={"eos_token_id": ends})
    last = ends if isinstance(ends, int) else ends[0]
    result = et.generate(model, [3], max_new_tokens=30)
    assert result.finish_reason == "stop"
    assert result.tokens[-1] == (last - 1) % 20


@pytest.mark.parametrize("ends", ["a", [["a"]], {"a": 1}, 1.5, [True], ["6"]])
def test_wrong_end_tokens_in_generation_config(ends: Any) -> None:
    with pytest.raises(et.InputError, match="eos_token_id"):
        et.generate(replace(COUNTER, generation_config={"eos_token_id": ends}), [3], max_new_tokens=3)


@pytest.mark.parametrize("budget", ["x", 2.5, -1, [1], True])
def test_wrong_budget_in_generation_config(budget: Any) -> None:
    with pytest.raises(et.InputError, match="max_new_tokens"):
        et.generate(replace(COUNTER, generation_config={"max_new_tokens": budget}), [3])


@pytest.mark.parametrize("budget", [None, 5])
def test_the_budget_of_generation_config(budget: int | None) -> None:
    """null is as good as absent; what the caller says goes first."""
    model = replace(COUNTER, generation_config={"max_new_tokens": budget})
    assert len(et.generate(model, [3]).tokens) >= 5
    assert len(et.generate(model, [3], max_new_tokens=2).tokens) == 2


def test_an_end_token_in_the_prompt_does_not_end() -> None:
    model = replace(COUNTER, config=replace(COUNTER.config, eos_token_id=(6,)))
    assert et.generate(model, [6], max_new_tokens=3).tokens == [7, 8, 9]


@pytest.mark.parametrize("size", [1, 2, 3, 512])
def test_the_prefill_step_changes_nothing(size: int) -> None:
    tokens = [
        result.tokens for result in et.generate(MODEL, PROMPTS, max_new_tokens=9, prefill_step_size=size)
    ]
    assert tokens == [result.tokens for result in et.generate(MODEL, PROMPTS, max_new_tokens=9)]
    ids = np.array([PROMPTS[1]])
    scores = prefill(MODEL, ids, cache := MODEL.cache(), size)
    np.testing.assert_allclose(scores, MODEL.logits(ids)[:, -1], atol=1e-5)
    assert cache.length == len(PROMPTS[1])


@pytest.fixture
def learned(golden_model: Models) -> et.Model:
    """A GPT-2 of 40 positions."""
    return golden_model("gpt2_plain")


class TestContext:
    """Of a model with 40 learned positions, which are a bound, and of one with RoPE, which goes on."""

    def test_learned_positions_end_the_text(self, learned: et.Model) -> None:
        result = et.generate(learned, [3] * 36, max_new_tokens=100)
        assert result.finish_reason == "length"
        assert len(result.tokens) == 5  # the last one is never fed back, so it needs no room
        assert len(et.generate(learned, [3] * 40, max_new_tokens=5).tokens) == 1

    def test_a_prompt_longer_than_the_learned_positions(self, learned: et.Model) -> None:
        for prompt in ([3] * 41, [[3], [3] * 41]):
            with pytest.raises(et.InputError, match=r"41.*40"):
                et.generate(learned, prompt, max_new_tokens=1)

    def test_ctx_size_beyond_the_learned_positions(self, learned: et.Model) -> None:
        with pytest.raises(
            et.InputError, match="`ctx_size` is 41: expected at most the 40 learned positions"
        ):
            et.generate(learned, [3], max_new_tokens=1, ctx_size=41)
        assert len(et.generate(learned, [3], max_new_tokens=100, ctx_size=40).tokens) == 40

    @pytest.mark.parametrize("ctx_size", [None, 1000])
    def test_rope_goes_on_with_one_note(self, ctx_size: int | None, caplog: pytest.LogCaptureFixture) -> None:
        result = et.generate(COUNTER, [3] * 60, max_new_tokens=40, ctx_size=ctx_size)
        assert result.tokens == [(4 + i) % 20 for i in range(40)]
        assert len(caplog.records) == 1
        assert "trained length of 64 tokens" in caplog.text
        caplog.clear()
        assert et.generate(COUNTER, [3] * 60, max_new_tokens=5).finish_reason == "length"
        assert not caplog.records

    def test_a_prompt_beyond_the_length_of_a_rope_model(self, caplog: pytest.LogCaptureFixture) -> None:
        results = et.generate(COUNTER, [[3] * 70, [5]], max_new_tokens=5)
        assert [result.tokens for result in results] == [[4, 5, 6, 7, 8], [6, 7, 8, 9, 10]]
        assert len(caplog.records) == 1

    @pytest.mark.parametrize(
        "rope", [{"rope_type": "yarn"}, {"rope_type": "linear"}, {"rope_type": "dynamic"}]
    )
    def test_the_note_knows_a_stretched_rope(self, rope: Any, caplog: pytest.LogCaptureFixture) -> None:
        """Qwen's recipe: factor 4, max_position_embeddings left as it was."""
        model = tiny_model(max_position_embeddings=16, eos_token_id=None, rope_scaling={"factor": 4.0} | rope)
        assert len(et.generate(model, [3] * 8, max_new_tokens=57).tokens) == 57
        assert not caplog.records
        et.generate(model, [3] * 8, max_new_tokens=58)
        assert "trained length of 64 tokens" in caplog.text

    def test_ctx_size_limits_a_rope_model(self) -> None:
        short = et.generate(COUNTER, [3], max_new_tokens=100, ctx_size=10)
        assert short.finish_reason == "length"
        assert len(short.tokens) == 10
        assert et.generate(COUNTER, [3] * 10, max_new_tokens=5, ctx_size=10).tokens == [4]
        for prompt in ([3] * 11, [[3], [3] * 11]):
            with pytest.raises(et.InputError, match=r"11.*10"):
                et.generate(COUNTER, prompt, max_new_tokens=1, ctx_size=10)

    def test_padding_takes_no_room(self) -> None:
        """A short row beside a long one may use its own context to the end."""
        both = et.generate(COUNTER, [[3] * 60, [3]], max_new_tokens=30, ctx_size=64)
        assert len(both[0].tokens) == 5
        assert both[1].tokens == et.generate(COUNTER, [3], max_new_tokens=30).tokens

    def test_a_huge_budget_takes_no_memory_in_advance(self) -> None:
        result = et.generate(COUNTER, [3], max_new_tokens=10**12, ctx_size=70)
        assert len(result.tokens) == 70
        assert result.kv_cache_bytes < 1 << 20


PROMPT_ERRORS = {
    "nothing": [],
    "nothing in an array": np.zeros(0, int),
    "a row of nothing": [[1], []],
    "rows of nothing": np.zeros((2, 0), int),
    "floats": [1.0, 2.0],
    "rows of floats": [[1.5, 2.5]],
    "array of floats": np.ones((1, 3)),
    "negative": [1, -1],
    "beyond the vocabulary": [1, 20],
    "row beyond the vocabulary": [[1], [20]],
    "beyond every integer": [2**70],
    "three axes": np.zeros((1, 2, 2), int),
    "a row of text": [["a"]],
    "none": [None],
    "text without a tokenizer": "hello",
    "rows of text without a tokenizer": ["hello"],
}


@pytest.mark.parametrize("name", PROMPT_ERRORS)
def test_wrong_prompts(name: str) -> None:
    with pytest.raises(et.InputError) as caught:
        et.generate(COUNTER, PROMPT_ERRORS[name], max_new_tokens=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        {"max_new_tokens": -1},
        {"seed": -1},
        {"ctx_size": 0},
        {"prefill_step_size": 0},
        {"stop": ("",)},
        {"top_k": -1},
    ],
    ids=str,
)
def test_wrong_settings(setting: dict[str, Any]) -> None:
    with pytest.raises(et.InputError, match=next(iter(setting))) as caught:
        et.generate(COUNTER, [1], **{"max_new_tokens": 2, "temperature": 1.0} | setting)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prompt", [[3, 4], (3, 4), np.array([3, 4]), np.array([3, 4], np.uint8), range(3, 5)]
)
def test_kinds_of_prompts(prompt: Any) -> None:
    assert et.generate(COUNTER, prompt, max_new_tokens=2).tokens == [5, 6]


@pytest.mark.parametrize("prompt", [[[3, 4]], np.array([[3, 4]]), [np.array([3, 4])], ((3, 4),)])
def test_a_batch_of_one_is_a_list(prompt: Any) -> None:
    (result,) = et.generate(COUNTER, prompt, max_new_tokens=2)
    assert result.tokens == [5, 6]


class TestText:
    """A model that goes on with the next character."""

    def test_text(self, speller: et.Model) -> None:
        result = et.generate(speller, "abc", max_new_tokens=5)
        assert str(result) == result.text == "defgh"
        assert result.prompt_tokens == [97, 98, 99]

    @pytest.mark.parametrize("stop", ["fg", "fghi", "d", "hijklm"])
    def test_a_stop_string_is_not_shown(self, speller: et.Model, stop: str) -> None:
        result = et.generate(speller, "abc", max_new_tokens=20, stop=(stop,))
        assert result.text == "defghijklmnop".partition(stop)[0]
        assert result.finish_reason == "stop"

    def test_a_stop_string_that_does_not_come(self, speller: et.Model) -> None:
        """What was held back for it is shown at the end."""
        result = et.generate(speller, "abc", max_new_tokens=4, stop=("fgx", "gg"))
        assert result.text == "defg"
        assert result.finish_reason == "length"

    def test_a_stop_string_in_the_prompt_does_not_stop(self, speller: et.Model) -> None:
        assert et.generate(speller, "abc", max_new_tokens=3, stop=("bc", "cd")).text == "def"

    @pytest.mark.parametrize("given", ["fg", ["fg"], ("fg", "zz")])
    def test_stop_may_be_one_string_or_several(self, speller: et.Model, given: Any) -> None:
        """A bare string is one stop string, not a set of letters."""
        assert et.generate(speller, "abc", max_new_tokens=20, stop=given).text == "de"
        assert (
            et.generate(speller, "abc", max_new_tokens=3, stop="fz" if given == "fg" else ["fz"]).text
            == "def"
        )

    def test_rows_stop_for_themselves(self, speller: et.Model) -> None:
        results = et.generate(speller, ["a", "defg", "x"], max_new_tokens=6, stop=("de", "k"))
        assert [result.text for result in results] == ["bc", "hij", "yz{|}~"]
        assert [result.finish_reason for result in results] == ["stop", "stop", "length"]

    def test_the_stream_is_the_text(self, speller: et.Model) -> None:
        results = [Generation(list(b"abc")), Generation(list(b"m"))]
        pieces: dict[int, list[str]] = {0: [], 1: []}
        for row, text in decode_batch(speller, results, Sampling(), Settings(8, stop=("hij",))):
            pieces[row].append(text)
        assert "".join(pieces[0]) == results[0].text == "defg"
        assert "".join(pieces[1]) == results[1].text == "nopqrstu"
        assert len(pieces[1]) > 1

    def test_an_empty_prompt(self, speller: et.Model) -> None:
        for prompt in ("", ["a", ""]):
            with pytest.raises(et.InputError, match="empty"):
                et.generate(speller, prompt, max_new_tokens=2)

    def test_messages_are_a_chat(self, speller: et.Model) -> None:
        """As in transformers' pipelines: one chat, or a batch of them."""
        template = "{% for m in messages %}{{ m.role[0] ~ m.content }}{% endfor %}" + (
            "{% if add_generation_prompt %}>{% endif %}"
        )
        assert speller.tokenizer is not None
        chat = replace(speller, tokenizer=replace(speller.tokenizer, chat_templates={"default": template}))
        messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
        result = et.generate(chat, messages, max_new_tokens=3)
        assert bytes(result.prompt_tokens) == b"sxuy>"
        assert result.text == "?@A"
        both = et.generate(chat, [messages, messages[1:], "a"], max_new_tokens=1)
        assert [bytes(each.prompt_tokens) for each in both] == [b"sxuy>", b"uy>", b"a"]

    @pytest.mark.parametrize(
        "messages",
        [
            [{"role": "user", "content": "x"}],
            [{"content": "x"}],
            [{"role": "user", "content": "x"}, 5],
            [{"role": "user", "content": "x"}, "y"],
            [[{"role": "user"}]],
            [{}],
            {"role": "user", "content": "x"},
        ],
        ids=str,
    )
    def test_messages_that_are_wrong_or_have_no_template(self, speller: et.Model, messages: Any) -> None:
        for model in (speller, COUNTER):
            with pytest.raises(et.InputError) as caught:
                et.generate(model, messages, max_new_tokens=1)
            assert "\n" not in str(caught.value)

    def test_a_prompt_that_begins_with_bos_has_one(self, tmp_path: Path) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import processors

        byte_tokenizer(tmp_path)
        backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing("a $A", "a $A $B", [("a", 97)])
        backend.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "a"}', encoding="utf-8")
        model = replace(successor_model(128), tokenizer=Tokenizer.from_folder(tmp_path))
        for text, tokens in (("abc", b"abc"), ("bc", b"abc"), ("", b"a"), ("aabc", b"aabc")):
            assert bytes(et.generate(model, text, max_new_tokens=1).prompt_tokens) == tokens

    def test_an_end_token_is_not_part_of_the_text(self, speller: et.Model) -> None:
        ended = replace(speller, config=replace(speller.config, eos_token_id=(ord("f"),)))
        result = et.generate(ended, "abc", max_new_tokens=9)
        assert (result.text, result.tokens, result.finish_reason) == ("de", [100, 101], "stop")


def test_a_cache_is_continued() -> None:
    """Its tokens precede the prompt's."""
    cache = MODEL.cache()
    MODEL.decoder.forward(np.array([[1, 2, 3]]), cache, "none")
    results = [Generation([4, 5])]
    for _ in decode_batch(MODEL, results, Sampling(), Settings(10), cache):
        pass
    assert results[0].tokens == et.generate(MODEL, [1, 2, 3, 4, 5], max_new_tokens=10).tokens


def test_a_cache_with_prompts_of_two_lengths() -> None:
    """Right, or refused: the shorter one's padding must not be taken for text."""
    cache = MODEL.cache()
    MODEL.decoder.forward(np.array([[1, 2, 3]] * 2), cache, "none")
    results = [Generation([4, 5, 6]), Generation([7])]
    try:
        for _ in decode_batch(MODEL, results, Sampling(), Settings(10), cache):
            pass
    except et.InputError:
        return
    assert results[1].tokens == et.generate(MODEL, [1, 2, 3, 7], max_new_tokens=10).tokens


def test_settings_from_a_folder(tmp_path: Path) -> None:
    """generation_config.json is read, obeyed and saved."""
    COUNTER.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [6, 9], "max_new_tokens": 4})
    )
    model = et.load(tmp_path)
    assert et.generate(model, [3]).tokens == [4, 5]
    assert et.generate(model, [9]).tokens == [10, 11, 12, 13]
    model.save(tmp_path / "again")
    assert et.generate(et.load(tmp_path / "again"), [3]).tokens == [4, 5]


@pytest.mark.parametrize("prompt", [b"abc", bytearray(b"abc"), [True, False], [b"ab", b"cd"], [[True]]])
def test_bytes_and_bools_are_no_token_ids(prompt: Any, tmp_path: Path) -> None:
    model = et.load(write_tiny(tmp_path)[0])
    with pytest.raises(et.InputError, match="prompt"):
        et.generate(model, prompt)


def test_a_draft_model_is_a_model(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)[0]
    with pytest.raises(et.InputError, match=r"`draft_model` is .*, expected Model or None"):
        et.generate(et.load(folder), [1, 2], draft_model=folder)


def test_a_generation_file_is_noted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = replace(et.load(write_tiny(tmp_path)[0]), generation_config={"num_beams": 4, "eos_token_id": 5})
    for _ in range(3):
        et.generate(model, [1, 2], max_new_tokens=1)
    assert len(caplog.records) == 1
    et.generate(replace(model, source="another"), [1, 2], max_new_tokens=1)
    assert len(caplog.records) == 2
