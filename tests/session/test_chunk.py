"""How many words of a prompt a chunk names, and how much of each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_ray.session.chunk import MORE, WORD_CHARS, WORDS_NAMED, named_words


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], ()),
        (["sunset", "lovely", "sunset"], ("sunset", "lovely")),
        (["w" * WORD_CHARS], ("w" * WORD_CHARS,)),
        (["w" * WORD_CHARS + "x"], ("w" * (WORD_CHARS - 1) + MORE,)),
    ],
)
def test_each_word_is_named_once_and_cut_when_it_is_long(
    words: list[str], named: tuple[str, ...]
) -> None:
    assert named_words(words) == named


def test_what_is_left_out_leaves_a_mark() -> None:
    words = [f"w{n}" for n in range(WORDS_NAMED + 1)]
    assert named_words(words[:-1]) == tuple(words[:-1])
    assert named_words(words) == (*words[:-1], MORE)


@given(st.lists(st.text(min_size=1, max_size=100), max_size=60))
def test_the_size_is_bounded_whatever_the_prompt(words: list[str]) -> None:
    named = named_words(words)
    assert len(named) <= WORDS_NAMED + 1
    assert all(len(word) <= WORD_CHARS for word in named)
    assert len(set(named[:WORDS_NAMED])) == len(named[:WORDS_NAMED])
