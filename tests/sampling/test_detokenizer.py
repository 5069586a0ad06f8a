"""Pieces of text add up to the text; characters and stop strings are never cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isobit.sampling.detokenizer import Detokenizer
from isobit.sampling.params import SamplingParams
from isobit.sampling.stop_strings import find_stop, held_back

TEXTS = [
    "Hello, world! It's 5 o'clock.\n\n  Indented\tcode:  x = 1",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 done",
    "中文字符,日本語のテキスト、한국어 텍스트",
    "combining: e\u0301 a\u0308\u0323 नमस्ते ก็ \U0001d518\U0001d52b",
    "a genuine \ufffd in the middle and at the end \ufffd",
]


def pieces(
    tokenizer: Any,
    token_ids: Sequence[int],
    params: SamplingParams | None = None,
    prompt: Sequence[int] = (),
) -> tuple[list[str], str | None]:
    """All pieces, the last one from ``finish``, and the stop string."""
    detokenizer = Detokenizer(tokenizer, params or SamplingParams(), prompt)
    result = []
    for token_id in token_ids:
        result.append(detokenizer.append(token_id))
        if detokenizer.matched_stop is not None:
            break
    result.append(detokenizer.finish())
    return result, detokenizer.matched_stop


def text_of(*args: Any) -> str:
    return "".join(pieces(*args)[0])


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_a_real_tokenizer(smollm2_tokenizer: Any, text: str) -> None:
    token_ids = smollm2_tokenizer.encode(text, add_special_tokens=False)
    given_out, _ = pieces(smollm2_tokenizer, token_ids)
    assert "".join(given_out) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in given_out)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 49_151), max_size=80), st.booleans())
def test_random_tokens_of_a_real_tokenizer(
    smollm2_tokenizer: Any, token_ids: list[int], skip: bool
) -> None:
    whole = smollm2_tokenizer.decode(
        token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
    )
    assert text_of(smollm2_tokenizer, token_ids, SamplingParams(skip_special_tokens=skip)) == whole


byte_runs = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=40),
        st.text(min_size=1, max_size=12).map(lambda s: s.encode("utf-8", "surrogatepass")),
        st.sampled_from(
            [b"\xff" * 30, b"\xe4" * 30, b"\xf0\x9f" * 25, b"\x80" * 40, b"\xef\xbf\xbd"]
        ),
    ),
    max_size=6,
).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(byte_runs, st.integers(0, 200))
def test_any_bytes_one_token_each(byte_tokenizer: Any, data: bytes, cut: int) -> None:
    assert text_of(byte_tokenizer, data) == data.decode("utf-8", "replace")
    prompt, output = data[:cut], data[cut:]
    before, after = prompt.decode("utf-8", "replace"), data.decode("utf-8", "replace")
    if not before.endswith("\ufffd"):
        assert text_of(byte_tokenizer, output, None, prompt) == after[len(before) :]


def test_a_character_is_never_given_out_in_part(byte_tokenizer: Any) -> None:
    given_out, _ = pieces(byte_tokenizer, "é中😀".encode())
    assert given_out == ["", "é", "", "", "中", "", "", "", "😀", ""]


def test_an_unfinished_character_comes_out_at_the_end(byte_tokenizer: Any) -> None:
    assert pieces(byte_tokenizer, b"a\xe4\xb8")[0] == ["a", "", "", "\ufffd"]


def test_a_character_that_the_prompt_began_belongs_to_the_output(byte_tokenizer: Any) -> None:
    assert text_of(byte_tokenizer, b"\xad!", None, b"x\xe4\xb8") == "中!"
    assert text_of(byte_tokenizer, b"\xb8\xad!", None, b"x\xe4") == "中!"
    assert text_of(byte_tokenizer, b"yz", None, "x\ufffd".encode()) == "yz"


def test_spaces_and_bytes_of_a_sentencepiece_tokenizer(fallback_tokenizer: Any) -> None:
    hello, world, comma, first_byte = 1, 2, 5, 6
    heart = [first_byte + b for b in "❤中".encode()]
    ids = [hello, comma, world, *heart, world, first_byte + 0xFF, hello]
    given_out, _ = pieces(fallback_tokenizer, ids)
    assert (
        "".join(given_out) == fallback_tokenizer.decode(ids) == "Hello, world❤中 world\ufffd Hello"
    )
    assert given_out[3:9] == ["", "", "❤", "", "", "中"]
    assert text_of(fallback_tokenizer, [world], None, [hello]) == " world"
    eos = fallback_tokenizer.eos_token_id
    assert text_of(fallback_tokenizer, [hello, eos, eos, world, world]) == "Hello world world"


def test_special_tokens(byte_tokenizer: Any) -> None:
    ids = [*b"a", 256, *b"b"]
    assert text_of(byte_tokenizer, ids) == "ab"
    assert text_of(byte_tokenizer, ids, SamplingParams(skip_special_tokens=False)) == "a<eos>b"
    assert text_of(byte_tokenizer, [256] * 100 + [*b"b"]) == "b"


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert text_of(None, [1, 2, 3]) == ""


def test_the_window_stays_short(byte_tokenizer: Any) -> None:
    class Counting:
        longest = 0

        def decode(self, ids: list[int], **kwargs: Any) -> str:
            Counting.longest = max(Counting.longest, len(ids))
            return str(byte_tokenizer.decode(ids, **kwargs))

    for data in (b"plain text " * 50, b"\xff" * 400, b"\xe4" * 400, "中".encode() * 200):
        assert text_of(Counting(), data) == data.decode("utf-8", "replace")
    assert Counting.longest <= 26


def test_the_token_that_ends_the_request(byte_tokenizer: Any) -> None:
    hidden = Detokenizer(byte_tokenizer, SamplingParams(stop=["xx"]), ())
    shown = Detokenizer(
        byte_tokenizer, SamplingParams(stop=["xx"], include_stop_str_in_output=True), ()
    )
    for detokenizer, text in ((hidden, "x"), (shown, "xx")):
        out = detokenizer.append(ord("x")) + detokenizer.append(ord("x"), ends=True)
        assert out + detokenizer.finish() == text
        assert detokenizer.matched_stop is None


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_at_every_boundary(smollm2_tokenizer: Any, include: bool) -> None:
    text = "The answer: it's 42 or 四十二 😀! Next line\nQuestion: why?"
    ids = smollm2_tokenizer.encode(text, add_special_tokens=False)
    for start in range(len(text)):
        for length in (1, 2, 5, 11):
            stop = text[start : start + length]
            params = SamplingParams(stop=stop, include_stop_str_in_output=include)
            given_out, matched = pieces(smollm2_tokenizer, ids, params)
            end = text.index(stop) + (len(stop) if include else 0)
            assert matched == stop
            assert "".join(given_out) == text[:end]


def naive_stop(text: str, stops: Sequence[str], first_end: int = 1) -> tuple[int, int, str] | None:
    """The match that ends first; of those the longest."""
    for end in range(first_end, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if len(stop) <= end and text[:end].endswith(stop):
                return end - len(stop), end, stop
    return None


ab = st.text("ab", min_size=1, max_size=6)


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("ab", max_size=40),
    stops=st.lists(ab, max_size=3),
    least=st.integers(0, 12),
    include=st.booleans(),
)
def test_stop_strings_token_by_token(
    byte_tokenizer: Any, text: str, stops: list[str], least: int, include: bool
) -> None:
    params = SamplingParams(
        stop=stops, min_tokens=least, max_tokens=None, include_stop_str_in_output=include
    )
    given_out, matched = pieces(byte_tokenizer, text.encode(), params)
    expected = naive_stop(text, stops, max(least, 1))
    if expected is None:
        assert (matched, "".join(given_out)) == (None, text)
    else:
        start, end, stop = expected
        assert (matched, "".join(given_out)) == (stop, text[: end if include else start])


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab", max_size=20), stops=st.lists(ab, max_size=3), after=st.integers(0, 10))
def test_find_stop_and_held_back(text: str, stops: list[str], after: int) -> None:
    assert find_stop(text, stops, after) == naive_stop(text, stops, after + 1)
    tails = (text[i:] for i in range(len(text)))
    possible = (t for t in tails if any(s.startswith(t) and s != t for s in stops))
    assert held_back(text, stops) == len(next(possible, ""))


def test_text_that_may_become_a_stop_string_is_held_back(byte_tokenizer: Any) -> None:
    params = SamplingParams(stop=["STOP"])
    assert pieces(byte_tokenizer, b"aSTxSTOPz", params) == (
        ["a", "", "", "STx", "", "", "", "", ""],
        "STOP",
    )
    assert pieces(byte_tokenizer, b"aST", params) == (["a", "", "", "ST"], None)
